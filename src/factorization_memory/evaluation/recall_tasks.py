"""Recall tasks: key-value pairs and copying; recall_needles.py has needles in a haystack of real text.

What is drawn belongs to the split of an item (see recall_draws.py). Text does not: pass text that the model was not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from factorization_memory.evaluation.recall_draws import Draws, Split, drawn

IGNORED = -100
"""Target at positions where nothing is asked."""


def associative_recall(pairs: int, split: Split, first: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Items `first` to `first + count - 1` of multi-query associative recall (arXiv 2312.04927) with a vocabulary of its own.

    A sequence has P pairs of a key (out of 4 P, all different) and a value (out of 4 P), then 4 P positions: P have the keys
    again in random order, the others a filler. Ids: keys from 0, values from 4 P, filler 8 P.

    Args:
        pairs: P, at least 2.
        seed: different seeds give different items of the same split.

    Returns tokens and targets, int64 [count, 6 P]: the target of a repeated key is its value, all others are `IGNORED`.
    """
    if pairs < 2:
        raise ValueError(f"pairs={pairs}: use 2 or more; a single pair has too few forms to split")
    symbols = places = 4 * pairs
    tokens = np.full((count, 2 * pairs + places), 2 * symbols, dtype=np.int64)
    targets = np.full_like(tokens, IGNORED)
    for row in range(count):
        draws = Draws("associative", pairs, split, seed, first + row)
        head = drawn(lambda d=draws: np.stack((d.distinct(symbols, pairs), d.below(symbols, pairs) + symbols), 1), split)  # type: ignore[misc]
        where = 2 * pairs + draws.distinct(places, pairs)
        tokens[row, : 2 * pairs] = head.ravel()
        tokens[row, where], targets[row, where] = head.T
    return tokens, targets


@dataclass(frozen=True)
class Associations:
    """Pairs of tokens, then the same pairs in another order: each key determines its value.

    Attributes:
        tokens: int64 [4 P].
        asked: positions of the repeated keys; the token after each is its value. Int64 [P], ascending.
        distances: how many tokens earlier each key first occurred, int64 [P].
        values: all values, the candidates, int64 [P].
    """

    tokens: np.ndarray
    asked: np.ndarray
    distances: np.ndarray
    values: np.ndarray


def associations(vocabulary: np.ndarray, pairs: int, split: Split, index: int) -> Associations:
    """An item of associative recall in a tokenizer's vocabulary: P keys and P values, all different ids of `vocabulary`."""
    if len(vocabulary) < 2 * pairs:
        raise ValueError(f"pairs={pairs}: needs {2 * pairs} different tokens, but the vocabulary has {len(vocabulary)}")
    draws = Draws("associations", pairs, split, index)
    ids = drawn(lambda: vocabulary[draws.distinct(len(vocabulary), 2 * pairs)], split).reshape(pairs, 2)
    order = draws.distinct(pairs, pairs)
    asked = 2 * pairs + 2 * np.arange(pairs)
    return Associations(np.concatenate((ids, ids[order])).ravel(), asked, asked - 2 * order, ids[:, 1])


def random_stretch(vocabulary: np.ndarray, length: int, split: Split, index: int) -> np.ndarray:
    """Tokens drawn from `vocabulary` with replacement, int64 [length]."""
    draws = Draws("random stretch", length, split, index)
    return drawn(lambda: vocabulary[draws.below(len(vocabulary), length)].astype(np.int64), split)


def text_stretch(text: np.ndarray, length: int, split: Split, index: int) -> np.ndarray:
    """A stretch of `text`, int64 [length]."""
    if len(text) < length:
        raise ValueError(f"length={length}: the text has {len(text)} tokens; use shorter stretches or a longer text")
    start = int(Draws("text stretch", length, split, index).below(len(text) - length + 1, 1)[0])
    return np.asarray(text[start : start + length], dtype=np.int64)


def copied(stretch: np.ndarray, separator: Sequence[int]) -> tuple[np.ndarray, int, int]:
    """Separator, stretch, separator, stretch: int64; and where the two copies begin."""
    mark = np.asarray(separator, dtype=np.int64)
    return np.concatenate((mark, stretch, mark, stretch)), len(mark), 2 * len(mark) + len(stretch)
