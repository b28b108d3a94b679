"""Checks that all contenders of a comparison read the same text in the same order."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from factorization_memory.data.loader import BatchLoader

if TYPE_CHECKING:
    from factorization_memory.config import RunConfig
    from factorization_memory.data.shards import PackedCorpus

CHECKED_STEPS = 3
"""Steps at the beginning of a training whose text is compared, beside the last."""


def same_order(corpus: PackedCorpus, configs: dict[str, RunConfig], seed: int) -> str:
    """Digest of the text that the first steps and the last of a training with `seed` read, the same for every contender.

    Raises RuntimeError if it is not.
    """
    digests: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, config in configs.items():
        steps = config.training.steps
        # The loader depends on nothing else of a run.
        known = (config.data.__repr__(), config.sequences_per_step, config.micro_batch_size, config.training.carry_state, steps)
        if known not in digests:
            digest = hashlib.blake2b(digest_size=8)
            for step in sorted({*range(min(CHECKED_STEPS, steps)), steps - 1}):
                with BatchLoader(
                    corpus,
                    dataclasses.replace(config.data, read_ahead=0),
                    sequences_per_step=config.sequences_per_step,
                    micro_batch_size=config.micro_batch_size,
                    carry_state=config.training.carry_state,
                    seed=seed,
                    start_step=step,
                ) as loader:
                    batches = next(loader)
                # Packed sequences are laid out flat: the tokens in their order, however they are cut.
                for part in ("tokens", "targets"):
                    for batch in batches:
                        digest.update(getattr(batch, part).numpy().tobytes())
            digests[known] = digest.hexdigest()
        found[name] = digests[known]
    first, *others = found
    for name in others:
        if found[name] != found[first]:
            raise RuntimeError(f"contender {name!r}: would read the text in another order than {first!r}; nothing was trained")
    return found[first]
