"""The order of training text: what sequence n of a run reads, as a pure function of the seed and n.

Nothing is stored or drawn at random: a run resumes at any step, with any batch size, from that number alone. Three parts:

1. `draw` assigns sequence n to a source, so that after any number of sequences each source had its share, to within less
   than the number of sources, and counts the sequence within its source.
2. `window_start` orders the windows of a source: each epoch visits all of them once, permuted by a keyed Feistel network.
3. `stream_start` is the alternative (carried state): every row of a batch continues where it stopped.

The tokens of a source are treated as circular, the first document following the last: each epoch cuts them into windows at a
different offset, so that text is cut at different points in each epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

_ROUNDS = 6
_MASK = (1 << 64) - 1
_WEIGHT_UNITS = 1 << 32


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Integers proportional to `weights` (to one part in 2^32), with which `draw` computes exactly.

    A positive weight stays positive.
    """
    total = sum(map(Fraction, weights))
    return [max(1, round(Fraction(weight) / total * _WEIGHT_UNITS)) if weight > 0 else 0 for weight in weights]


def counts(n: int, weights: Sequence[int]) -> list[int]:
    """How many of the first `n` sequences each source has; nondecreasing in n, and sums to n."""
    result = []
    rest, total = n, sum(weights)
    for weight in weights:
        # The first source takes its share of all sequences, the second its share of the rest, and so on.
        own = rest * weight // total if total else 0
        result.append(own)
        rest -= own
        total -= weight
    return result


def draw(n: int, weights: Sequence[int]) -> tuple[int, int]:
    """Sequence `n` (from 0) of the mixture as (source, k): it is the k-th (from 0) sequence of that source."""
    before, after = counts(n, weights), counts(n + 1, weights)
    source = next(s for s in range(len(weights)) if after[s] > before[s])
    return source, before[source]


def shared_rows(rows: int, weights: Sequence[int]) -> list[int]:
    """Distributes `rows` among the sources by weight, at least one to each of positive weight (Sainte-Laguë's method).

    Raises ValueError if there are fewer rows than such sources.
    """
    shares = [1 if weight else 0 for weight in weights]
    if sum(shares) > rows:
        raise ValueError(f"got {rows} row(s) for {sum(shares)} sources")
    while sum(shares) < rows:
        shares[max(range(len(weights)), key=lambda s: Fraction(weights[s], 2 * shares[s] + 1))] += 1
    return shares


def window_start(seed: int, source: str, k: int, num_tokens: int, length: int) -> int:
    """Where on the ring of `num_tokens` tokens the `k`-th window, of `length` tokens, of `source` starts.

    An epoch is num_tokens // length windows (num_tokens >= length); no two windows of one epoch overlap.
    """
    windows = num_tokens // length
    epoch, index = divmod(k, windows)
    key = _key(seed, source, epoch)
    return (key + permute(index, windows, key) * length) % num_tokens


def stream_start(seed: int, source: str, row: int, rows: int, step: int, num_tokens: int, length: int) -> int:
    """Where on the ring of `num_tokens` tokens row `row` of the `rows` rows of `source` reads its `length` tokens of `step`.

    The rows start evenly spread over the source, and each continues where it stopped.
    """
    return (_key(seed, source, 0) + row * num_tokens // rows + step * length) % num_tokens


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under the permutation of range(size) given by `key` (64 bits)."""
    # A Feistel network permutes numbers of an even number of bits; walking its cycles until it lands below `size` permutes
    # range(size). The domain is less than four times as large, so this takes few iterations.
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(right + key + turn * 0x9E3779B97F4A7C15) & mask)
        index = left << half | right
        if index < size:
            return index


def _key(seed: int, source: str, epoch: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{source}\0{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(x: int) -> int:
    """A bijection of 64 bits whose every output bit depends on every input bit (the finaliser of splitmix64)."""
    x &= _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
