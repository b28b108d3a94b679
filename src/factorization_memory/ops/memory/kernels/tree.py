"""The binary tree of `ops/memory/decay_tree.py` in registers: what `gates` and `gate_gradients` share.

Blocks of numbers are `[states, tokens]`. Their columns hold tokens in an order of its own (`token_of`), chosen so that two
halves that meet at a level of the tree lie in registers of the same thread. Only SPREAD parts of a block, of consecutive
tokens each, are spread over threads; they meet last, when one decay for each part and state is all that must be exchanged.
A level then costs one matrix product for P, and per number hardly more than one multiplication.

Both kernels know that of the tokens that meet in pairs of halves, the right half's only read and the left half's only write:
one block `met` holds the reads of the former and the writes of the latter, and is both operands of the product.

A program has one tile of up to TILE tokens. A chunk of two tiles has a level above them, for which each program also looks
at the other tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from factorization_memory.ops.memory.kernels.layout import Layout

TILE = 64
"""Tokens of a program: the rows that a matrix product of four warps has on Hopper, and what registers hold."""
BLOCK_STATES = 64
"""States that a program takes at a time; backward always this many, for the same reason."""
NUM_WARPS = 4


@triton.jit
def token_of(column, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """The token in a column: of column `[i, j, k]` in `[C / SPREAD / LOW, SPREAD, LOW]`, it is token `[j, i, k]`."""
    return column // LOW % SPREAD * (C // SPREAD) + column // (SPREAD * LOW) * LOW + column % LOW


@triton.constexpr_function
def distance(level, C, SPREAD, LOW):
    """Columns between two tokens that lie 2^level apart."""
    tokens = 1 << level
    if tokens < LOW:
        return tokens
    return tokens * SPREAD if tokens < C // SPREAD else tokens // (C // SPREAD) * LOW


@triton.jit
def swap(x, DISTANCE: tl.constexpr):
    """x `[N, C]` with the columns exchanged that lie DISTANCE, a power of two, apart."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    # (a + b) - a is b for whole numbers, whatever bits they are; within a thread the compiler leaves nothing of it.
    bits = tl.reshape(x.to(tl.int32, bitcast=True), [N, C // (2 * DISTANCE), 2, DISTANCE])
    return tl.reshape(tl.sum(bits, axis=2, keep_dims=True) - bits, [N, C]).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """`[N, SPREAD]` of x `[N, C]`, the same for all tokens of each of SPREAD parts."""
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
    """`[N, C]` of x `[N, SPREAD]`; x as it is if it has C columns already."""
    N: tl.constexpr = x.shape[0]
    SPREAD: tl.constexpr = x.shape[1]
    if SPREAD == C:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x[:, None, :, None], [N, C // (SPREAD * LOW), SPREAD, LOW]), [N, C])


@triton.jit
def meet_totals(total, LEVEL: tl.constexpr, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """One level up: of each token the decay over the other half, and that over both, from the one over its own half.

    `[N, C]` each while halves lie within a thread, then `[N, SPREAD]`.
    """
    if (1 << LEVEL) == C // SPREAD:
        total = narrow(total, SPREAD, LOW)
    DISTANCE: tl.constexpr = distance(LEVEL, C, SPREAD, LOW)
    partner = swap(total, DISTANCE if (1 << LEVEL) < C // SPREAD else DISTANCE // LOW)
    return partner, total * partner


@triton.jit
def decays(theta, LEVELS: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """Of every level the decay over the other half (see `meet_totals`); and `[N]`, the one over all tokens."""
    total = 1 - theta
    partners = ()
    for level in tl.static_range(LEVELS):
        partner, total = meet_totals(total, level, theta.shape[1], SPREAD, LOW)
        partners = partners + (partner,)
    return partners, tl.max(total, axis=1)


def layout_arguments(layout: Layout, update: Tensor) -> tuple[Tensor | int, ...]:
    """What both kernels take of a layout."""
    table = update if layout.table is None else layout.table
    return table, layout.length, layout.chunks, layout.segments, layout.segment_chunks


def constants_of(layout: Layout, update: Tensor, padded: int, precision: str) -> dict[str, Any]:
    """What both kernels are compiled for."""
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
