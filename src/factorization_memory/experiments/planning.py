"""From contenders to the plan of their comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factorization_memory.config import ConfigError
from factorization_memory.data.shards import PackedCorpus
from factorization_memory.evaluation.recall_suite import ITEMS
from factorization_memory.experiments.contenders import Contender
from factorization_memory.experiments.plan import Corpus, Plan, make_entries
from factorization_memory.experiments.reading_order import same_order


def make_plan(
    contenders: Sequence[Contender],
    corpus: PackedCorpus,
    folder: Path,
    *,
    rates: Mapping[str, tuple[float, ...]],
    seeds: Mapping[str, tuple[int, ...]],
    match_to: int | str,
    own_schedules: bool = False,
    search_seed: int = 1000,
    search_steps: int | None = None,
    search_fraction: float = 0.2,
    alone_steps: int = 0,
    positions: tuple[int, ...] = (4, 16),
    max_tokens: int | None = None,
    stretches: int = 8,
    recall: bool = False,
) -> Plan:
    """The plan of a comparison on `corpus`, in `folder`.

    Args:
        rates: learning rates to choose from, by contender.
        seeds: of the trainings, by contender.
        match_to: number of parameters outside the embedding for all, or the contender that sets it.
        own_schedules: each contender keeps its own learning rate schedule; else all use the first's.
        search_seed: of the short trainings that choose the learning rate.
        search_steps: their steps; None means `search_fraction` of all.
        alone_steps: steps that each contender runs alone, to measure its speed.
        positions: multiples of the training context to evaluate at.
        max_tokens: held-out tokens per source to measure the loss on; None means all.
        stretches: stretches of text per source for the loss by position.
        recall: also run the recall suite.

    Raises ConfigError for what cannot be compared, RuntimeError where contenders would read another text.
    """
    if any(search_seed in own for own in seeds.values()):
        raise ConfigError(f"search_seed={search_seed}: it is one of --seeds; the learning rate must be chosen with another")
    known = Corpus(corpus.folder, corpus.fingerprint, corpus.tokenizer.fingerprint, corpus.tokenizer.vocab_size)
    entries = make_entries(contenders, known, dict(rates), dict(seeds), match_to, own_schedules)
    first = entries[0].config
    steps = first.training.steps
    search_steps = search_steps or max(1, round(search_fraction * steps))
    if search_steps > steps:
        raise ConfigError(f"search_steps={search_steps}: use at most training.steps={steps}")
    evaluation: dict[str, Any] = {
        "max_position": max(positions, default=0) * first.data.context_length,
        "max_tokens": max_tokens,
        "stretches": stretches,
    }
    if recall:
        evaluation["recall_items"] = ITEMS
    every = dict.fromkeys(seed for own in seeds.values() for seed in own)
    order = {str(seed): same_order(corpus, {each.name: each.config for each in entries}, seed) for seed in every}
    return Plan(folder, entries, known, search_seed, search_steps, alone_steps, positions, evaluation, order)
