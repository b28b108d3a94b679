"""The binary tree of `ops/memory/decay_tree.py` in registers, shared by `gates` and `gate_gradients`.

Blocks are `[states, tokens]`. Their columns hold tokens in a special order (`token_of`), so that two halves that merge at a
level of the tree are in registers of the same thread. Only SPREAD parts of a block, of consecutive tokens each, are spread
over threads; they merge last, when threads exchange only one decay per part and state. A level then costs one matrix product
for P, and hardly more than one multiplication per element.

When two halves merge, tokens of the right half only read and those of the left half only write: one block `met` holds the
reads of the former and the writes of the latter, and is both operands of the product.

A program has one tile of up to TILE tokens. A chunk of two tiles has one more level, for which each program also reads the
other tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from factorization_memory.ops.memory.kernels.layout import Layout

TILE = 64
"""Tokens per program: the rows of a matrix product of four warps on Hopper, and what fits in registers."""
BLOCK_STATES = 64
"""States that a program processes at a time; always this many in backward, for the same reason."""
NUM_WARPS = 4


@triton.jit
def token_of(column, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """The token of a column: column `[i, j, k]` in `[C / SPREAD / LOW, SPREAD, LOW]` holds token `[j, i, k]`."""
    return column // LOW % SPREAD * (C // SPREAD) + column // (SPREAD * LOW) * LOW + column % LOW


@triton.constexpr_function
def distance(level, C, SPREAD, LOW):
    """Columns between two tokens that are 2^level apart."""
    tokens = 1 << level
    if tokens < LOW:
        return tokens
    return tokens * SPREAD if tokens < C // SPREAD else tokens // (C // SPREAD) * LOW


@triton.jit
def swap(x, DISTANCE: tl.constexpr):
    """x `[N, C]` with columns that are DISTANCE, a power of two, apart swapped."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    # (a + b) - a is b for integers, whatever their bits; within a thread the compiler optimizes it away.
    bits = tl.reshape(x.to(tl.int32, bitcast=True), [N, C // (2 * DISTANCE), 2, DISTANCE])
    return tl.reshape(tl.sum(bits, axis=2, keep_dims=True) - bits, [N, C]).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """x `[N, C]`, constant within each of SPREAD parts, to `[N, SPREAD]`."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.max(tl.max(tl.reshape(x, [N, C // (SPREAD * LOW), SPREAD, LOW]), axis=3), axis=1)


@triton.jit
def fold(x, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """Sums `[N, SPREAD]` of x `[N, C]` over the tokens of each of SPREAD parts."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.sum(tl.sum(tl.reshape(x, [N, C // (SPREAD * LOW), SPREAD, LOW]), axis=3), axis=1)


@triton.jit
def widen(x, C: tl.constexpr, LOW: tl.constexpr):
    """x `[N, SPREAD]` to `[N, C]`; unchanged if x already has C columns."""
    N: tl.constexpr = x.shape[0]
    SPREAD: tl.constexpr = x.shape[1]
    if SPREAD == C:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x[:, None, :, None], [N, C // (SPREAD * LOW), SPREAD, LOW]), [N, C])


@triton.jit
def meet_totals(total, LEVEL: tl.constexpr, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """One level up: for each token the decay over the other half, and over both halves, from that over its own half.

    `[N, C]` each while halves are within a thread, then `[N, SPREAD]`.
    """
    if (1 << LEVEL) == C // SPREAD:
        total = narrow(total, SPREAD, LOW)
    DISTANCE: tl.constexpr = distance(LEVEL, C, SPREAD, LOW)
    partner = swap(total, DISTANCE if (1 << LEVEL) < C // SPREAD else DISTANCE // LOW)
    return partner, total * partner


@triton.jit
def decays(theta, LEVELS: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """For every level the decay over the other half (see `meet_totals`); and the decay over all tokens, `[N]`."""
    total = 1 - theta
    partners = ()
    for level in tl.static_range(LEVELS):
        partner, total = meet_totals(total, level, theta.shape[1], SPREAD, LOW)
        partners = partners + (partner,)
    return partners, tl.max(total, axis=1)


def layout_arguments(layout: Layout, update: Tensor) -> tuple[Tensor | int, ...]:
    """The layout arguments of both kernels."""
    table = update if layout.table is None else layout.table
    return table, layout.length, layout.chunks, layout.segments, layout.segment_chunks


def constants_of(layout: Layout, update: Tensor, padded: int, precision: str) -> dict[str, Any]:
    """The constants of both kernels."""
    tile = min(layout.chunk, TILE)
    return {
        "HEADS": update.shape[2],
        "STATES": update.shape[3],
        "PADDED": padded,
        "CHUNK": layout.chunk,
        "C": tile,
        "LEVELS": tile.bit_length() - 1,
        "PACKED": layout.packed,
        "PRECISION": precision,
        "num_warps": NUM_WARPS,
        "num_stages": 1,
    }
