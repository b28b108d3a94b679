"""Checks for the recall suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from factorization_memory.config import ConfigError

if TYPE_CHECKING:
    from factorization_memory.data.shards import PackedCorpus


def check_recall(corpus: PackedCorpus, lengths: Sequence[int]) -> None:
    """Raises ConfigError early if the held-out text is too short for the recall suite, before the rest is evaluated."""
    from factorization_memory.evaluation.recall_suite import held_out_texts

    longest = max(map(len, held_out_texts(corpus).values()), default=0)
    if longest < min(lengths):
        raise ConfigError(
            f"--recall: the longest held-out text of the corpus has {longest} tokens, fewer than the {min(lengths)} of the "
            "shortest haystack; pack it with a larger held-out share, or leave --recall out"
        )
