"""The random numbers of items of recall tasks, and the split that they belong to.

Every item is a pure function of the task, its sizes, the split and an index, on every machine and with every version of numpy:
only the bit stream of PCG64 is used, which numpy guarantees to be stable, not `Generator`, whose draws may change. The splits
are disjoint by construction: a hash of what is drawn decides its split, and an item is redrawn until it falls into the right
one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np

VERSION = "recall-1"
"""Seeds every item: change it whenever the items change."""

Split = Literal["train", "test"]


class Draws:
    """The random numbers of an item."""

    def __init__(self, *name: str | int) -> None:
        seed = hashlib.sha256("/".join(map(str, (VERSION, *name))).encode()).digest()[:16]
        self._bits = np.random.PCG64(int.from_bytes(seed, "little"))

    def below(self, bound: int, count: int) -> np.ndarray:
        """`count` integers from 0 to `bound` - 1, int64. The bias of the remainder is below bound / 2^64."""
        return (self._bits.random_raw(count) % np.uint64(bound)).astype(np.int64)

    def distinct(self, bound: int, count: int) -> np.ndarray:
        """`count` different integers from 0 to `bound` - 1 in random order, int64."""
        return np.argsort(self._bits.random_raw(bound), kind="stable")[:count]


def split_of(content: np.ndarray) -> Split:
    """The split that drawn numbers belong to: about a quarter is test."""
    return "test" if hashlib.sha256(content.astype("<i8").tobytes()).digest()[0] < 64 else "train"


def drawn(draw: Callable[[], np.ndarray], split: Split) -> np.ndarray:
    """The first draw that belongs to `split`."""
    while split_of(found := draw()) != split:
        pass
    return found
