"""An interpolated byte n-gram model: the baseline of small runs, fitted and scored on the same text as the model.

Modified Kneser-Ney smoothing (Chen and Goodman 1998, three discounts per order), interpolated down to the uniform
distribution: the strongest standard n-gram smoothing. Counts are kept in sorted arrays of 64-bit keys, up to eight bytes per
key, so fitting is a few sorts and scoring a few binary searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_ORDER = 8
"""Bytes that fit in a 64-bit key."""


@dataclass(frozen=True)
class _Order:
    """Counts of one order: n-grams of k bytes, and their contexts of k - 1 bytes."""

    grams: np.ndarray  # uint64, sorted
    kept: np.ndarray  # float64, discounted count over the context's total
    contexts: np.ndarray  # uint64, sorted
    backoff: np.ndarray  # float64, weight of the next lower order after each context


class NgramModel:
    """Byte n-gram model fitted on texts.

    Args:
        documents: training texts; no n-gram crosses from one to the next.
        order: n, from 1 to 8; a byte is predicted from the previous n - 1.
    """

    def __init__(self, documents: Sequence[bytes], order: int = 5) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order={order}: use 1 to {MAX_ORDER}")
        if not any(documents):
            raise ValueError("documents: no text to fit; give at least one byte")
        self.order = order
        data, position = _concatenate(documents)
        self._orders = [_fit(data, position, k, highest=k == order) for k in range(1, order + 1)]

    def bits(self, document: bytes) -> np.ndarray:
        """Cost in bits of each byte of a text given the previous ones: float64 [len(document)]."""
        data, position = _concatenate([document])
        probability = np.full(len(data), 1 / 256)
        for k, order in enumerate(self._orders, start=1):
            known = position >= k - 1
            gram = _keys(data, k)[known]
            probability[known] = _interpolate(order, gram, gram >> np.uint64(8), probability[known])
        return -np.log2(probability)

    def probabilities(self, context: bytes) -> np.ndarray:
        """Distribution of the byte after a context, float64 [256]."""
        probability = np.full(256, 1 / 256)
        for k, order in enumerate(self._orders[: len(context) + 1], start=1):
            key = np.uint64(int.from_bytes(context[len(context) - k + 1 :], "big"))
            gram = (np.full(256, key) << np.uint64(8)) | np.arange(256, dtype=np.uint64)
            probability = _interpolate(order, gram, np.full(256, key), probability)
        return probability

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Mean bits per byte over texts, each scored from its beginning. Raises ValueError if they are empty."""
        size = sum(map(len, documents))
        if not size:
            raise ValueError("documents: no text to score; give at least one byte")
        return float(sum(self.bits(document).sum() for document in documents)) / size


def _concatenate(documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All bytes, uint64 [N], and the position of each in its document, int64 [N]."""
    data = np.frombuffer(b"".join(documents), dtype=np.uint8).astype(np.uint64)
    return data, np.concatenate([np.arange(len(document)) for document in documents])


def _keys(data: np.ndarray, k: int) -> np.ndarray:
    """The k bytes that end at each index as one big-endian key, uint64 [N]; the first k - 1 of a document are meaningless."""
    keys = np.zeros_like(data)
    for back in range(min(k, len(data))):
        keys[back:] |= data[: len(data) - back] << np.uint64(8 * back)
    return keys


def _fit(data: np.ndarray, position: np.ndarray, k: int, highest: bool) -> _Order:
    if highest:
        grams, counts = np.unique(_keys(data, k)[position >= k - 1], return_counts=True)
    else:
        # Lower orders count the distinct bytes that precede a gram, plus one if it occurs at a document's start, where no byte
        # precedes it.
        longer = np.unique(_keys(data, k + 1)[position >= k])
        first = np.unique(_keys(data, k)[position == k - 1])
        mask = np.uint64((1 << (8 * k)) - 1)
        grams, counts = np.unique(np.concatenate([longer & mask, first]), return_counts=True)
    counts = counts.astype(np.float64)
    of_gram, starts = np.unique(grams >> np.uint64(8), return_index=True)
    discount = _discounts(counts)[np.minimum(counts, 3).astype(np.int64)]
    size = np.diff(np.append(starts, len(grams)))
    total = np.add.reduceat(counts, starts) if len(grams) else np.zeros(0)
    freed = np.add.reduceat(discount, starts) if len(grams) else np.zeros(0)
    return _Order(grams, (counts - discount) / np.repeat(total, size), of_gram, freed / total)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """The discounts of counts 0, 1, 2 and 3 or more: float64 [4]."""
    n1, n2, n3, n4 = (max(int((counts == c).sum()), 1) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    estimate = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Few or unusual counts can put the estimates out of range: a discount must be above zero and below its count.
    return np.clip(estimate, [0, 0.1, 0.1, 0.1], [0, 0.95, 1.9, 2.85])


def _interpolate(order: _Order, gram: np.ndarray, context: np.ndarray, lower: np.ndarray) -> np.ndarray:
    kept = _lookup(order.grams, order.kept, gram, 0.0)
    return kept + _lookup(order.contexts, order.backoff, context, 1.0) * lower


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    if not len(keys):
        return np.full(len(wanted), missing)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], missing)
