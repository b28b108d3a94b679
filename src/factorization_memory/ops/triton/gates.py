"""P, Q, K and G of every chunk, and their gradients: the binary tree of `ops/chunked.py` as two kernels.

Blocks of numbers are `[states, tokens]`. Their columns hold tokens in an order of its own (`_time`), chosen so that two
halves that meet at a level of the tree lie in registers of the same thread. Only SPREAD parts of a block, of consecutive
tokens each, are spread over threads; they meet last, when one decay for each part and state is all that must be exchanged.
A level then costs one matrix product for P, and per number hardly more than one multiplication.

Both kernels know that of the tokens that meet in pairs of halves, the right half's only read and the left half's only write:
one block `met` holds the reads of the former and the writes of the latter, and is both operands of the product.

Backward, d_met likewise holds the gradients of both. Everything but dP stays in registers, which are laid out as a matrix
product wants them in its result and, with columns reordered, in its operand (`_load`, `_even_first`). What a level needs of
the tree below it is built anew from theta, phi and the decays.

A program has one tile of up to TILE tokens. A chunk of two tiles has a level above them, for which each program also looks
at the other tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorization_memory.ops.triton.layout import Layout, locate

TILE = 64
"""Tokens of a program: the rows that a matrix product of four warps has on Hopper, and what registers hold."""
BLOCK_STATES = 64
"""States that a program takes at a time; backward always this many, for the same reason."""
NUM_WARPS = 4
LAST_AXIS_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))
"""Whether Triton deals axes to threads from the last to the first, or, as it did before 3.7, from the first to the last, when
it knows of none that numbers lie side by side in memory along it. Results do not depend on it, but registers do."""


@triton.jit
def _time(column, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """The token in a column: of column `[i, j, k]` in `[C / SPREAD / LOW, SPREAD, LOW]`, it is token `[j, i, k]`."""
    return column // LOW % SPREAD * (C // SPREAD) + column // (SPREAD * LOW) * LOW + column % LOW


@triton.constexpr_function
def _distance(level, C, SPREAD, LOW):
    """Columns between two tokens that lie 2^level apart."""
    tokens = 1 << level
    if tokens < LOW:
        return tokens
    return tokens * SPREAD if tokens < C // SPREAD else tokens // (C // SPREAD) * LOW


@triton.jit
def _swap(x, DISTANCE: tl.constexpr):
    """x `[N, C]` with the columns exchanged that lie DISTANCE, a power of two, apart."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    # (a + b) - a is b for whole numbers, whatever bits they are; within a thread the compiler leaves nothing of it.
    bits = tl.reshape(x.to(tl.int32, bitcast=True), [N, C // (2 * DISTANCE), 2, DISTANCE])
    return tl.reshape(tl.sum(bits, axis=2, keep_dims=True) - bits, [N, C]).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(x, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """`[N, SPREAD]` of x `[N, C]`, the same for all tokens of each of SPREAD parts."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.max(tl.max(tl.reshape(x, [N, C // (SPREAD * LOW), SPREAD, LOW]), axis=3), axis=1)


@triton.jit
def _fold(x, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """Sums `[N, SPREAD]` of x `[N, C]` over the tokens of each of SPREAD parts."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.sum(tl.sum(tl.reshape(x, [N, C // (SPREAD * LOW), SPREAD, LOW]), axis=3), axis=1)


@triton.jit
def _widen(x, C: tl.constexpr, LOW: tl.constexpr):
    """`[N, C]` of x `[N, SPREAD]`; x as it is if it has C columns already."""
    N: tl.constexpr = x.shape[0]
    SPREAD: tl.constexpr = x.shape[1]
    if SPREAD == C:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x[:, None, :, None], [N, C // (SPREAD * LOW), SPREAD, LOW]), [N, C])


@triton.jit
def _meet_totals(total, LEVEL: tl.constexpr, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """One level up: of each token the decay over the other half, and that over both, from the one over its own half.

    `[N, C]` each while halves lie within a thread, then `[N, SPREAD]`.
    """
    if (1 << LEVEL) == C // SPREAD:
        total = _narrow(total, SPREAD, LOW)
    DISTANCE: tl.constexpr = _distance(LEVEL, C, SPREAD, LOW)
    partner = _swap(total, DISTANCE if (1 << LEVEL) < C // SPREAD else DISTANCE // LOW)
    return partner, total * partner


@triton.jit
def _decays(theta, LEVELS: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """Of every level the decay over the other half (see `_meet_totals`); and `[N]`, the one over all tokens."""
    total = 1 - theta
    partners = ()
    for level in tl.static_range(LEVELS):
        partner, total = _meet_totals(total, level, theta.shape[1], SPREAD, LOW)
        partners = partners + (partner,)
    return partners, tl.max(total, axis=1)


@triton.jit
def _in_order(x, SPREAD: tl.constexpr):
    """x `[C, C]` with rows and columns in the order of tokens instead of `_time`'s (LOW 1)."""
    C: tl.constexpr = x.shape[0]
    x = tl.permute(tl.reshape(x, [C // SPREAD, SPREAD, C // SPREAD, SPREAD]), (1, 0, 3, 2))
    return tl.reshape(x, [C, C])


# Shapes of the model are constants, so that offsets within a block are. Nothing is known of how rows are aligned: a thread
# then loads single numbers, all of one state, and time stays within it.
@triton.jit(
    do_not_specialize=["length", "chunks", "segments", "segment_chunks"],
    do_not_specialize_on_alignment=["update", "merge", "read_out", "write_out", "total_out"],
)
def forward_kernel(
    update,
    merge,
    read_out,
    write_out,
    inner_out,
    inner_transposed_out,
    total_out,
    table,
    length,
    chunks,
    segments,
    segment_chunks,
    HEADS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPREAD: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of C tokens of one chunk and head; all states, BLOCK at a time."""
    TILES: tl.constexpr = CHUNK // C
    SIDE: tl.constexpr = CHUNK + PADDED
    tile = tl.program_id(0) % TILES
    slot = tl.program_id(0) // TILES
    head = tl.program_id(1)
    first, count = locate(slot, table, length, chunks, segments, segment_chunks, CHUNK, PACKED)
    here = slot.to(tl.int64) * HEADS + head
    time = _time(tl.arange(0, C), C, SPREAD, 1)
    rows = time.to(tl.int64)[None, :]
    own = tile * C
    other = C - own
    inner = tl.zeros([C, C], tl.float32)
    reach = tl.zeros([C, C], tl.float32)
    diagonal = tl.zeros([C, 16], tl.float32)
    for block in range(0, PADDED, BLOCK):
        state = block + tl.arange(0, BLOCK)
        source = ((first + own) * HEADS + head) * STATES
        offset = rows * (HEADS * STATES) + state[:, None]
        there = time[None, :] < tl.where(state < STATES, count - own, 0)[:, None]
        theta = tl.load(update + source + offset, mask=there, other=0).to(tl.float32)
        phi = tl.load(merge + source + offset, mask=there, other=0).to(tl.float32)
        diagonal = tl.dot(tl.trans(phi * theta), tl.full([BLOCK, 16], 1, tl.float32), diagonal, input_precision=PRECISION)
        total = 1 - theta
        read = phi * total
        write = theta
        for level in tl.static_range(LEVELS):
            half = time >> level
            right = (half & 1 == 1)[None, :]
            met = tl.where(right, read, write)
            meet = tl.dot(tl.trans(met), met, input_precision=PRECISION)
            # Rows of right halves, and of each the columns of the half before it.
            inner = tl.where(tl.where(half & 1 == 1, half, -1)[:, None] == half[None, :] + 1, inner + meet, inner)
            partner, total = _meet_totals(total, level, C, SPREAD, 1)
            partner = _widen(partner, C, 1)
            read = tl.where(right, read * partner, read)
            write = tl.where(right, write, write * partner)
        decay = tl.max(total, axis=1)
        if TILES == 2:
            source = ((first + other) * HEADS + head) * STATES
            there = time[None, :] < tl.where(state < STATES, count - other, 0)[:, None]
            before = tl.load(update + source + offset, mask=there, other=0).to(tl.float32)
            partners, beyond = _decays(before, LEVELS, SPREAD, 1)
            if tile == 1:
                for level in tl.static_range(LEVELS):
                    right = (time >> level & 1 == 1)[None, :]
                    before = tl.where(right, before, before * _widen(partners[level], C, 1))
                reach = tl.dot(tl.trans(read), before, reach, input_precision=PRECISION)
            read *= tl.where(tile == 1, beyond, 1)[:, None]
            write *= tl.where(tile == 0, beyond, 1)[:, None]
            decay *= beyond
        target = (here * CHUNK + own) * SIDE + CHUNK
        offset = rows * SIDE + state[:, None]
        tl.store(read_out + target + offset, read.to(read_out.dtype.element_ty), mask=(state < PADDED)[:, None])
        tl.store(write_out + target + offset, write.to(write_out.dtype.element_ty), mask=(state < PADDED)[:, None])
        tl.store(total_out + here * PADDED + state, decay, mask=(state < PADDED) & (tile == 0))
    inner = tl.where(time[:, None] == time[None, :], tl.max(diagonal, axis=1)[:, None], inner)
    # P to the left of Q, its transpose to the left of K: the same tensors, but here alignment is welcome.
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inner = _in_order(inner.to(read_out.dtype.element_ty), SPREAD)
    inner_out += here * CHUNK * SIDE
    inner_transposed_out += here * CHUNK * SIDE
    tl.store(inner_out + (own + row) * SIDE + own + column, inner)
    tl.store(inner_transposed_out + (own + row) * SIDE + own + column, tl.trans(inner))
    if TILES == 2:
        reach = _in_order(reach.to(read_out.dtype.element_ty), SPREAD)
        tl.store(inner_out + (own + row) * SIDE + other + column, reach)
        tl.store(inner_transposed_out + (other + row) * SIDE + own + column, tl.trans(reach))


@triton.jit
def _axis(SIZE: tl.constexpr, AXIS: tl.constexpr):
    """0 to SIZE along one axis of the shape that `_load` reads in."""
    index = tl.arange(0, SIZE)
    if AXIS == 0:
        return index[:, None, None, None, None, None]
    elif AXIS == 1:
        return index[None, :, None, None, None, None]
    elif AXIS == 2:
        return index[None, None, :, None, None, None]
    elif AXIS == 3:
        return index[None, None, None, :, None, None]
    elif AXIS == 4:
        return index[None, None, None, None, :, None]
    else:
        return index[None, None, None, None, None, :]


@triton.jit
def _part(SPREAD: tl.constexpr):
    """The part of the tokens along its axis."""
    return _axis(SPREAD, 5 if LAST_AXIS_FIRST else 0)


@triton.jit
def _grid(C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """Tokens and states of the numbers of a block, each in what threads share among them and what a thread has for its own,
    in the shape that `_load` reads in: `[SPREAD, 8, 4, 2, LOW, C / SPREAD / LOW]` or the reverse, of which Triton deals the
    first two axes to threads, the third to warps, and leaves the others to each thread."""
    HIGH: tl.constexpr = C // (SPREAD * LOW)
    token = _part(SPREAD) * (C // SPREAD)
    if LAST_AXIS_FIRST:
        state = _axis(8, 4) + _axis(4, 3) * 16
        state_in_thread = _axis(2, 2) * 8
        token_in_thread = _axis(LOW, 1) + _axis(HIGH, 0) * LOW
    else:
        state = _axis(8, 1) + _axis(4, 2) * 16
        state_in_thread = _axis(2, 3) * 8
        token_in_thread = _axis(LOW, 4) + _axis(HIGH, 5) * LOW
    return token, token_in_thread, state, state_in_thread


@triton.jit
def _places(ROW: tl.constexpr, unit, count, states, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """Offsets of the numbers of a block, ROW from token to token, and which of them are there."""
    token, token_in_thread, state, state_in_thread = _grid(C, SPREAD, LOW)
    offset = (token.to(tl.int64) * ROW + state * unit) + (token_in_thread.to(tl.int64) * ROW + state_in_thread)
    return offset, token_in_thread < tl.where(state < states - state_in_thread, count, 0) - token


@triton.jit
def _load(source, ROW: tl.constexpr, unit, count, states, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """`[64, C]` of 64 states and C tokens, each thread of four warps with the numbers that it has of a product's result."""
    offset, there = _places(ROW, unit, count, states, C, SPREAD, LOW)
    x = tl.load(source + offset, mask=there, other=0).to(tl.float32)
    return tl.reshape(tl.permute(x, (3, 2, 4, 0, 5, 1) if LAST_AXIS_FIRST else (2, 3, 1, 5, 0, 4)), [64, C])


@triton.jit
def _store(target, x, ROW: tl.constexpr, unit, count, states, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """The reverse of `_load`."""
    offset, there = _places(ROW, unit, count, states, C, SPREAD, LOW)
    x = tl.reshape(x.to(target.dtype.element_ty), [4, 2, 8, C // (SPREAD * LOW), SPREAD, LOW])
    x = tl.permute(x, (3, 5, 1, 0, 2, 4) if LAST_AXIS_FIRST else (4, 2, 0, 1, 5, 3))
    tl.store(target + offset, x, mask=there)


@triton.jit
def _even_first(x):
    """x `[N, C]` with columns 0, 2, 4, 6, 1, 3, 5, 7 of every eight: as a product's operand, a thread's part of x is the one
    that it had of x as a product's result."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [N, C // 8, 4, 2]), (0, 1, 3, 2)), [N, C])


@triton.jit
def _even_first_column(column):
    """Where `_even_first` has a column from."""
    return column // 8 * 8 + column % 4 * 2 + column % 8 // 4


@triton.jit
def _even_spaced(x):
    """The reverse of `_even_first`."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [N, C // 8, 2, 4]), (0, 1, 3, 2)), [N, C])


@triton.jit
def _half(x, DISTANCE: tl.constexpr, RIGHT: tl.constexpr):
    """Of every two columns of x `[N, C]` that lie DISTANCE apart the left or right one, `[N, C / 2]`."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    bits = tl.reshape(x.to(tl.int32, bitcast=True), [N, C // (2 * DISTANCE), 2, DISTANCE])
    wanted = tl.arange(0, 2)[None, None, :, None] == (1 if RIGHT else 0)
    return tl.reshape(tl.sum(tl.where(wanted, bits, 0), axis=2), [N, C // 2]).to(tl.float32, bitcast=True)


@triton.jit
def _twice(x, DISTANCE: tl.constexpr):
    """`[N, C]` of x `[N, C / 2]`: the same in both columns that lie DISTANCE apart."""
    N: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // DISTANCE
    x = tl.broadcast_to(tl.reshape(x, [N, PAIRS, 1, DISTANCE]), [N, PAIRS, 2, DISTANCE])
    return tl.reshape(x, [N, 2 * PAIRS * DISTANCE])


@triton.jit
def _half_corner(
    d_inner,
    count,
    LEVEL: tl.constexpr,
    TO_READS: tl.constexpr,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    SPREAD: tl.constexpr,
    LOW: tl.constexpr,
):
    """dP `[C / 2, C / 2]` between left and right halves, from the tokens summed over to those of the result."""
    DISTANCE: tl.constexpr = _distance(LEVEL, C, SPREAD, LOW)
    index = tl.arange(0, C // 2)
    # Without the lowest column bit, the operand lies in threads as it must already, and the result does not.
    if DISTANCE == 1:
        inside = index
        outside = index // 8 * 8 + index % 2 * 4 + index % 8 // 2
    else:
        inside = _even_first_column(index)
        outside = index
    inside = inside // DISTANCE * (2 * DISTANCE) + inside % DISTANCE + (0 if TO_READS else DISTANCE)
    outside = outside // DISTANCE * (2 * DISTANCE) + outside % DISTANCE + (DISTANCE if TO_READS else 0)
    inside = _time(inside, C, SPREAD, LOW)[:, None]
    outside = _time(outside, C, SPREAD, LOW)[None, :]
    t = outside if TO_READS else inside
    s = inside if TO_READS else outside
    return tl.load(d_inner + (t * CHUNK + s), mask=(s ^ t) < tl.where(t < count, 2 << LEVEL, 0), other=0)


@triton.jit
def _corners(
    d_inner, count, LEVEL: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr
):
    """dP between the halves that meet at a level, as `_through` takes it."""
    if C > 16 and (1 << LEVEL) < C // SPREAD:
        return (
            _half_corner(d_inner, count, LEVEL, True, CHUNK, C, SPREAD, LOW),
            _half_corner(d_inner, count, LEVEL, False, CHUNK, C, SPREAD, LOW),
        )
    else:
        column = tl.arange(0, C)
        inside = _time(_even_first_column(column), C, SPREAD, LOW)[:, None]
        outside = _time(column, C, SPREAD, LOW)[None, :]
        right = outside >> LEVEL & 1 == 1
        meets = (inside >> LEVEL) ^ 1 == (outside >> LEVEL)
        corner = tl.load(
            d_inner + tl.where(right, outside * CHUNK + inside, inside * CHUNK + outside),
            mask=tl.where(right, outside, inside) < tl.where(meets, count, 0),
            other=0,
        )
        return (corner,)


@triton.jit
def _through_half(
    met,
    d_met,
    corner,
    LEVEL: tl.constexpr,
    TO_READS: tl.constexpr,
    C: tl.constexpr,
    SPREAD: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`_through` to the reads of right halves, or to the writes of left ones, as a product of half the size each way."""
    DISTANCE: tl.constexpr = _distance(LEVEL, C, SPREAD, LOW)
    met = _half(met, DISTANCE, not TO_READS)
    d_met = _half(d_met, DISTANCE, TO_READS)
    if DISTANCE == 1:
        d_met = _even_first(tl.dot(met, corner, _even_spaced(d_met), input_precision=PRECISION))
    else:
        d_met = tl.dot(_even_first(met), corner, d_met, input_precision=PRECISION)
    return _twice(d_met, DISTANCE)


@triton.jit
def _through(
    met,
    d_met,
    right,
    corners,
    LEVEL: tl.constexpr,
    C: tl.constexpr,
    SPREAD: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_met `[N, C]` plus what comes from the weights between halves that meet at a level: through the writes of left halves
    to the reads of right ones, and the other way round."""
    if C > 16 and (1 << LEVEL) < C // SPREAD:
        d_right = _through_half(met, d_met, corners[0], LEVEL, True, C, SPREAD, LOW, PRECISION)
        d_left = _through_half(met, d_met, corners[1], LEVEL, False, C, SPREAD, LOW, PRECISION)
        return tl.where(right, d_right, d_left)
    else:
        return tl.dot(_even_first(met), corners[0], d_met, input_precision=PRECISION)


@triton.jit
def _before(theta, read, right, partners, LEVEL: tl.constexpr, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """Reads of right halves, writes of left ones, `[N, C]`, as they are when the halves meet at a level.

    theta, read (phi times 1 - theta) as at the bottom; right `[1, C]` or a scalar tells the halves apart.
    """
    time = _time(tl.arange(0, C), C, SPREAD, LOW)
    met = tl.where(right, read, theta)
    if LEVEL > 0:
        factor = tl.fma(-met, _swap(theta, _distance(0, C, SPREAD, LOW)), met)
        met = tl.where(right == (time & 1 == 1)[None, :], factor, met)
    for lower in tl.static_range(LEVEL - 1, 0, -1):
        met *= tl.where(right == (time >> lower & 1 == 1)[None, :], _widen(partners[lower], C, LOW), 1)
    return met


# `unit` is 1, but the compiler must not know: it would deal states to threads in fours.
@triton.jit(do_not_specialize=["length", "chunks", "segments", "segment_chunks", "first_slot", "unit"])
def backward_kernel(
    update,
    merge,
    d_inner,
    d_read_in,
    d_write_in,
    d_total_in,
    d_update,
    d_merge,
    table,
    length,
    chunks,
    segments,
    segment_chunks,
    first_slot,
    unit,
    HEADS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of C tokens of one chunk and head, 64 states."""
    SPREAD: tl.constexpr = 4
    LOW: tl.constexpr = 2
    TILES: tl.constexpr = CHUNK // C
    ROW: tl.constexpr = HEADS * STATES
    tile = tl.program_id(0) % TILES
    slot = tl.program_id(0) // TILES
    head = tl.program_id(1)
    block = tl.program_id(2) * 64
    first, count = locate(first_slot + slot, table, length, chunks, segments, segment_chunks, CHUNK, PACKED)
    here = slot.to(tl.int64) * HEADS + head
    d_inner += here * CHUNK * CHUNK
    states = STATES - block
    own = tile * C
    other = C - own
    last = tile == TILES - 1
    time = _time(tl.arange(0, C), C, SPREAD, LOW)
    state = tl.arange(0, 64)
    d_total = tl.load(d_total_in + here * PADDED + block + state, mask=state < states, other=0)
    if TILES == 2:
        # The level above: this tile's reads (if it is the second) met the other one's writes, or the other way round.
        source = ((first + other) * HEADS + head) * STATES + block
        theta = _load(update + source, ROW, unit, count - other, states, C, SPREAD, LOW)
        read = _load(merge + source, ROW, unit, tl.where(last, 0, count - other), states, C, SPREAD, LOW) * (1 - theta)
        partners, decay = _decays(theta, LEVELS, SPREAD, LOW)
        met = _before(theta, read, tile == 0, partners, LEVELS, C, SPREAD, LOW)
        beyond = tl.where(last, d_write_in, d_read_in) + ((here * CHUNK + other) * PADDED + block)
        d_met = _load(beyond, PADDED, unit, count - other, states, C, SPREAD, LOW)
        d_total = d_total * decay + tl.sum(d_met * met, axis=1)
        inside = _time(_even_first_column(tl.arange(0, C)), C, SPREAD, LOW)[:, None]
        corner = tl.load(
            d_inner + C * CHUNK + tl.where(last, time[None, :] * CHUNK + inside, inside * CHUNK + time[None, :]),
            mask=tl.where(last, time[None, :], inside) < count - C,
            other=0,
        )
        near = tl.where(last, d_read_in, d_write_in) + ((here * CHUNK + own) * PADDED + block)
        d_met = _load(near, PADDED, unit, count - own, states, C, SPREAD, LOW) * decay[:, None]
        d_met = tl.dot(_even_first(met), corner, d_met, input_precision=PRECISION)
        far = tl.where(last, d_write_in, d_read_in) + ((here * CHUNK + own) * PADDED + block)
        d_rest = _load(far, PADDED, unit, count - own, states, C, SPREAD, LOW)
        reads = last
    count -= own
    d_inner += own * (CHUNK + 1)
    source = ((first + own) * HEADS + head) * STATES + block
    target = (here * CHUNK + own) * PADDED + block
    theta = _load(update + source, ROW, unit, count, states, C, SPREAD, LOW)
    read = _load(merge + source, ROW, unit, count, states, C, SPREAD, LOW) * (1 - theta)
    partners, _ = _decays(theta, LEVELS, SPREAD, LOW)
    d_total = d_total[:, None] + tl.zeros([64, SPREAD], tl.float32)
    # d_met are gradients of reads where `reads` says so, of writes elsewhere; d_rest are the others.
    for level in tl.static_range(LEVELS - 1, -1, -1):
        right = (time >> level & 1 == 1)[None, :]
        corners = _corners(d_inner, count, level, CHUNK, C, SPREAD, LOW)
        met = _before(theta, read, right, partners, level, C, SPREAD, LOW)
        if TILES == 1 and level == LEVELS - 1:
            # The other gradients are not wanted yet: they would fill registers.
            upper = _part(SPREAD) >= SPREAD // 2
            d_met = _load(tl.where(upper, d_read_in, d_write_in) + target, PADDED, unit, count, states, C, SPREAD, LOW)
        else:
            same = reads == right
            d_met, d_rest = tl.where(same, d_met, d_rest), tl.where(same, d_rest, d_met)
        reads = right
        passed = d_met * met
        if (1 << level) < C // SPREAD:
            d_total = _widen(d_total, C, LOW)
            for lower in tl.static_range(level):
                passed += _swap(passed, _distance(lower, C, SPREAD, LOW))
            passed = _swap(passed, _distance(level, C, SPREAD, LOW))
        else:
            passed = _fold(passed, SPREAD, LOW)
            for lower in tl.static_range(level):
                if (1 << lower) >= C // SPREAD:
                    passed += _swap(passed, _distance(lower, C, SPREAD, LOW) // LOW)
            passed = _swap(passed, _distance(level, C, SPREAD, LOW) // LOW)
        if level > 0:
            d_total = d_total * partners[level] + passed
            d_met *= _widen(partners[level], C, LOW)
        else:
            partner = _swap(theta, _distance(0, C, SPREAD, LOW))
            d_total = tl.fma(-d_total, partner, d_total) + passed
            d_met = tl.fma(-d_met, partner, d_met)
        d_met = _through(met, d_met, right, corners, level, C, SPREAD, LOW, PRECISION)
        if TILES == 1 and level == LEVELS - 1:
            d_rest = _load(tl.where(upper, d_write_in, d_read_in) + target, PADDED, unit, count, states, C, SPREAD, LOW)
    d_read, d_write = tl.where(reads, d_met, d_rest), tl.where(reads, d_rest, d_met)
    d_diagonal = tl.load(d_inner + time * (CHUNK + 1), mask=time < count, other=0)[None, :]
    # Read again: there was no room to keep it.
    phi = _load(merge + source, ROW, unit, count, states, C, SPREAD, LOW)
    d_theta = d_write + (d_diagonal - d_read) * phi - d_total
    d_phi = tl.fma(-d_read, theta, d_read) + d_diagonal * theta
    _store(d_update + source, d_theta, ROW, unit, count, states, C, SPREAD, LOW)
    _store(d_merge + source, d_phi, ROW, unit, count, states, C, SPREAD, LOW)


def _arguments(layout: Layout, update: Tensor) -> tuple[Tensor | int, ...]:
    """What both kernels take of a layout."""
    table = update if layout.table is None else layout.table
    return table, layout.length, layout.chunks, layout.segments, layout.segment_chunks


def _constants(layout: Layout, update: Tensor, padded: int, precision: str) -> dict[str, Any]:
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


def gates_forward(
    update: Tensor,
    merge: Tensor,
    layout: Layout,
    states: int,
    dtype: torch.dtype,
    precision: str,
    block_states: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """P, Q, K, G of every chunk.

    Args:
        update: theta, contiguous `[B, T, H, M]`, of any float dtype; computed with in float32.
        merge: phi, likewise.
        layout: the cut into S slots of C tokens, 16 to 128.
        states: M', at least M, a multiple of 16.
        dtype: of P, Q and K.
        precision: `input_precision` of the matrix products: "tf32", "tf32x3" or "ieee".
        block_states: states that a program takes at a time, a power of two, at least 16.

    Returns:
        P and Q, side by side, and P^T and K, likewise, `[S, H, C, C + M']` of `dtype`; G `[S, H, M']` in float32. Tokens and
        states that are not there count as theta = phi = 0.
    """
    heads, chunk = update.shape[2], layout.chunk
    read, write = (update.new_empty(layout.slots, heads, chunk, chunk + states, dtype=dtype) for _ in range(2))
    total = update.new_empty(layout.slots, heads, states, dtype=torch.float32)
    constants = _constants(layout, update, states, precision)
    block = block_states or min(BLOCK_STATES, 1 << (states - 1).bit_length())
    # One number for each of 128 threads: of all states of a block first, then of as many parts of the tokens as that leaves.
    forward_kernel[(layout.slots * (chunk // constants["C"]), heads)](
        update,
        merge,
        read,
        write,
        read,
        write,
        total,
        *_arguments(layout, update),
        BLOCK=block,
        SPREAD=max(128 // block, 1),
        **constants,
    )
    return read, write, total


def gates_backward(
    update: Tensor,
    merge: Tensor,
    layout: Layout,
    slots: tuple[int, int],
    d_inner: Tensor,
    d_read: Tensor,
    d_write: Tensor,
    d_total: Tensor,
    d_update: Tensor,
    d_merge: Tensor,
    precision: str,
) -> None:
    """Gradients of theta and phi of the tokens of some slots.

    Args:
        update: theta, contiguous `[B, T, H, M]`.
        merge: phi, likewise.
        layout: as forward.
        slots: first slot and number of slots n that the gradients below belong to.
        d_inner: of P, float32 `[n, H, C, C]`, of which what lies above the diagonal, or in rows of tokens that are not there,
            is not looked at.
        d_read: of Q, float32 `[n, H, C, M']`; tokens and states that are not there are not looked at either.
        d_write: of K, likewise.
        d_total: of G, float32 `[n, H, M']`.
        d_update: written, contiguous `[B, T, H, M]`, of any float dtype.
        d_merge: written, likewise.
        precision: as forward.
    """
    first, count = slots
    constants = _constants(layout, update, d_read.shape[-1], precision)
    tiles = layout.chunk // constants["C"]
    backward_kernel[(count * tiles, update.shape[2], -(-update.shape[3] // BLOCK_STATES))](
        update,
        merge,
        d_inner,
        d_read,
        d_write,
        d_total,
        d_update,
        d_merge,
        *_arguments(layout, update),
        first,
        1,
        **constants,
    )
