"""Gradients of update and merge weights from those of P, Q, K and G: backward through the tree (see `tree`).

d_met is the gradient of `met`. Everything but dP stays in registers, in the layout of a matrix product's result and, with
columns reordered, of its operand (`_load`, `_even_first`). What a level needs of the levels below is recomputed from theta,
phi and decays.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from factorization_memory.ops.memory.kernels.layout import Layout, locate
from factorization_memory.ops.memory.kernels.tree import (
    BLOCK_STATES,
    constants_of,
    decays,
    distance,
    fold,
    layout_arguments,
    swap,
    token_of,
    widen,
)
from factorization_memory.ops.runtime.launcher import launch

LAST_AXIS_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))
"""Whether Triton assigns axes to threads from last to first or, before 3.7, from first to last, if it cannot tell which axis
is contiguous in memory. Affects register use, not results."""


@triton.jit
def _axis(SIZE: tl.constexpr, AXIS: tl.constexpr):
    """0 to SIZE along one axis of `_load`'s block."""
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
    """The index of the SPREAD parts along its axis."""
    return _axis(SPREAD, 5 if LAST_AXIS_FIRST else 0)


@triton.jit
def _grid(C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """Tokens and states of the elements of `_load`'s block, each split into an index across threads and one within a thread.
    Its shape is `[SPREAD, 8, 4, 2, LOW, C / SPREAD / LOW]` or the reverse: Triton assigns the first two axes to threads, the
    third to warps, and the others to each thread."""
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
    """Offsets of the elements of a block with token stride ROW, and their mask."""
    token, token_in_thread, state, state_in_thread = _grid(C, SPREAD, LOW)
    offset = (token.to(tl.int64) * ROW + state * unit) + (token_in_thread.to(tl.int64) * ROW + state_in_thread)
    return offset, token_in_thread < tl.where(state < states - state_in_thread, count, 0) - token


@triton.jit
def _load(source, ROW: tl.constexpr, unit, count, states, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """Loads `[64, C]`, 64 states and C tokens, in the register layout of a matrix product's result over four warps."""
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
    """x `[N, C]` with columns 0, 2, 4, 6, 1, 3, 5, 7 of every eight: a thread then holds the same elements of x as an operand
    that it held of x as a matrix product's result."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [N, C // 8, 4, 2]), (0, 1, 3, 2)), [N, C])


@triton.jit
def _even_first_column(column):
    """Source column of each column of `_even_first`."""
    return column // 8 * 8 + column % 4 * 2 + column % 8 // 4


@triton.jit
def _even_spaced(x):
    """The reverse of `_even_first`."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [N, C // 8, 2, 4]), (0, 1, 3, 2)), [N, C])


@triton.jit
def _half(x, DISTANCE: tl.constexpr, RIGHT: tl.constexpr):
    """The left or right one, `[N, C / 2]`, of every two columns of x `[N, C]` that are DISTANCE apart."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    bits = tl.reshape(x.to(tl.int32, bitcast=True), [N, C // (2 * DISTANCE), 2, DISTANCE])
    wanted = tl.arange(0, 2)[None, None, :, None] == (1 if RIGHT else 0)
    return tl.reshape(tl.sum(tl.where(wanted, bits, 0), axis=2), [N, C // 2]).to(tl.float32, bitcast=True)


@triton.jit
def _twice(x, DISTANCE: tl.constexpr):
    """Inverse of `_half`: x `[N, C / 2]` to `[N, C]`, the same in both columns that are DISTANCE apart."""
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
    DISTANCE: tl.constexpr = distance(LEVEL, C, SPREAD, LOW)
    index = tl.arange(0, C // 2)
    # Without the lowest column bit, the operand already has the right register layout, but the result does not.
    if DISTANCE == 1:
        inside = index
        outside = index // 8 * 8 + index % 2 * 4 + index % 8 // 2
    else:
        inside = _even_first_column(index)
        outside = index
    inside = inside // DISTANCE * (2 * DISTANCE) + inside % DISTANCE + (0 if TO_READS else DISTANCE)
    outside = outside // DISTANCE * (2 * DISTANCE) + outside % DISTANCE + (DISTANCE if TO_READS else 0)
    inside = token_of(inside, C, SPREAD, LOW)[:, None]
    outside = token_of(outside, C, SPREAD, LOW)[None, :]
    t = outside if TO_READS else inside
    s = inside if TO_READS else outside
    return tl.load(d_inner + (t * CHUNK + s), mask=(s ^ t) < tl.where(t < count, 2 << LEVEL, 0), other=0)


@triton.jit
def _corners(
    d_inner, count, LEVEL: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr
):
    """dP between the halves that merge at a level, as `_through` expects it."""
    if C > 16 and (1 << LEVEL) < C // SPREAD:
        return (
            _half_corner(d_inner, count, LEVEL, True, CHUNK, C, SPREAD, LOW),
            _half_corner(d_inner, count, LEVEL, False, CHUNK, C, SPREAD, LOW),
        )
    else:
        column = tl.arange(0, C)
        inside = token_of(_even_first_column(column), C, SPREAD, LOW)[:, None]
        outside = token_of(column, C, SPREAD, LOW)[None, :]
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
    """`_through` to the reads of right halves or the writes of left ones, as a product of half the size along each
    dimension."""
    DISTANCE: tl.constexpr = distance(LEVEL, C, SPREAD, LOW)
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
    """d_met `[N, C]` plus the gradient from P between halves that merge at a level: through the writes of left halves to the
    reads of right ones, and vice versa."""
    if C > 16 and (1 << LEVEL) < C // SPREAD:
        d_right = _through_half(met, d_met, corners[0], LEVEL, True, C, SPREAD, LOW, PRECISION)
        d_left = _through_half(met, d_met, corners[1], LEVEL, False, C, SPREAD, LOW, PRECISION)
        return tl.where(right, d_right, d_left)
    else:
        return tl.dot(_even_first(met), corners[0], d_met, input_precision=PRECISION)


@triton.jit
def _before(theta, read, right, partners, LEVEL: tl.constexpr, C: tl.constexpr, SPREAD: tl.constexpr, LOW: tl.constexpr):
    """Reads of right halves and writes of left ones, `[N, C]`, just before the halves merge at a level.

    theta and read (phi times 1 - theta) are those of the lowest level; right, `[1, C]` or a scalar, marks right halves.
    """
    time = token_of(tl.arange(0, C), C, SPREAD, LOW)
    met = tl.where(right, read, theta)
    if LEVEL > 0:
        factor = tl.fma(-met, swap(theta, distance(0, C, SPREAD, LOW)), met)
        met = tl.where(right == (time & 1 == 1)[None, :], factor, met)
    for lower in tl.static_range(LEVEL - 1, 0, -1):
        met *= tl.where(right == (time >> lower & 1 == 1)[None, :], widen(partners[lower], C, LOW), 1)
    return met


# `unit` is 1, but hidden from the compiler, which would otherwise assign states to threads in fours.
@triton.jit(do_not_specialize=["length", "chunks", "segments", "segment_chunks", "first_slot", "unit"])
def backward_kernel(
    update,  # theta [tokens, H, M]
    merge,  # phi [tokens, H, M]
    d_inner,  # dP [n, H, CHUNK, CHUNK]
    d_read_in,  # dQ [n, H, CHUNK, M']
    d_write_in,  # dK [n, H, CHUNK, M']
    d_total_in,  # dG [n, H, M']
    d_update,  # out: of theta [tokens, H, M]
    d_merge,  # out: of phi [tokens, H, M]
    table,
    length,
    chunks,
    segments,
    segment_chunks,
    first_slot,
    unit,
    HEADS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,  # M'
    CHUNK: tl.constexpr,
    C: tl.constexpr,  # tokens per tile
    LEVELS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of C tokens of one chunk and head, for 64 states."""
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
    time = token_of(tl.arange(0, C), C, SPREAD, LOW)
    state = tl.arange(0, 64)
    d_total = tl.load(d_total_in + here * PADDED + block + state, mask=state < states, other=0)
    if TILES == 2:
        # The level above: the second tile's reads merge with the first one's writes, and vice versa.
        source = ((first + other) * HEADS + head) * STATES + block
        theta = _load(update + source, ROW, unit, count - other, states, C, SPREAD, LOW)
        read = _load(merge + source, ROW, unit, tl.where(last, 0, count - other), states, C, SPREAD, LOW) * (1 - theta)
        partners, decay = decays(theta, LEVELS, SPREAD, LOW)
        met = _before(theta, read, tile == 0, partners, LEVELS, C, SPREAD, LOW)
        beyond = tl.where(last, d_write_in, d_read_in) + ((here * CHUNK + other) * PADDED + block)
        d_met = _load(beyond, PADDED, unit, count - other, states, C, SPREAD, LOW)
        d_total = d_total * decay + tl.sum(d_met * met, axis=1)
        inside = token_of(_even_first_column(tl.arange(0, C)), C, SPREAD, LOW)[:, None]
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
    partners, _ = decays(theta, LEVELS, SPREAD, LOW)
    d_total = d_total[:, None] + tl.zeros([64, SPREAD], tl.float32)
    # d_met holds gradients of reads where `reads` is true, of writes elsewhere; d_rest holds the others.
    for level in tl.static_range(LEVELS - 1, -1, -1):
        right = (time >> level & 1 == 1)[None, :]
        corners = _corners(d_inner, count, level, CHUNK, C, SPREAD, LOW)
        met = _before(theta, read, right, partners, level, C, SPREAD, LOW)
        if TILES == 1 and level == LEVELS - 1:
            # Load the other gradients later, to save registers.
            upper = _part(SPREAD) >= SPREAD // 2
            d_met = _load(tl.where(upper, d_read_in, d_write_in) + target, PADDED, unit, count, states, C, SPREAD, LOW)
        else:
            same = reads == right
            d_met, d_rest = tl.where(same, d_met, d_rest), tl.where(same, d_rest, d_met)
        reads = right
        passed = d_met * met
        if (1 << level) < C // SPREAD:
            d_total = widen(d_total, C, LOW)
            for lower in tl.static_range(level):
                passed += swap(passed, distance(lower, C, SPREAD, LOW))
            passed = swap(passed, distance(level, C, SPREAD, LOW))
        else:
            passed = fold(passed, SPREAD, LOW)
            for lower in tl.static_range(level):
                if (1 << lower) >= C // SPREAD:
                    passed += swap(passed, distance(lower, C, SPREAD, LOW) // LOW)
            passed = swap(passed, distance(level, C, SPREAD, LOW) // LOW)
        if level > 0:
            d_total = d_total * partners[level] + passed
            d_met *= widen(partners[level], C, LOW)
        else:
            partner = swap(theta, distance(0, C, SPREAD, LOW))
            d_total = tl.fma(-d_total, partner, d_total) + passed
            d_met = tl.fma(-d_met, partner, d_met)
        d_met = _through(met, d_met, right, corners, level, C, SPREAD, LOW, PRECISION)
        if TILES == 1 and level == LEVELS - 1:
            d_rest = _load(tl.where(upper, d_write_in, d_read_in) + target, PADDED, unit, count, states, C, SPREAD, LOW)
    d_read, d_write = tl.where(reads, d_met, d_rest), tl.where(reads, d_rest, d_met)
    d_diagonal = tl.load(d_inner + time * (CHUNK + 1), mask=time < count, other=0)[None, :]
    # Reload: there are no registers to keep it.
    phi = _load(merge + source, ROW, unit, count, states, C, SPREAD, LOW)
    d_theta = d_write + (d_diagonal - d_read) * phi - d_total
    d_phi = tl.fma(-d_read, theta, d_read) + d_diagonal * theta
    _store(d_update + source, d_theta, ROW, unit, count, states, C, SPREAD, LOW)
    _store(d_merge + source, d_phi, ROW, unit, count, states, C, SPREAD, LOW)


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
    """Gradients of theta and phi of the tokens in some slots.

    Args:
        update: theta, contiguous `[B, T, H, M]`.
        merge: phi, same.
        layout: as in forward.
        slots: first slot and number of slots n that the gradients below belong to.
        d_inner: of P, float32 `[n, H, C, C]`; entries above the diagonal and rows of missing tokens are ignored.
        d_read: of Q, float32 `[n, H, C, M']`; missing tokens and states are ignored.
        d_write: of K, same.
        d_total: of G, float32 `[n, H, M']`.
        d_update: output, contiguous `[B, T, H, M]`, any float dtype.
        d_merge: output, same.
        precision: as in forward.
    """
    first, count = slots
    constants = constants_of(layout, update, d_read.shape[-1], precision)
    tiles = layout.chunk // constants["C"]
    launch(
        backward_kernel,
        (count * tiles, update.shape[2], -(-update.shape[3] // BLOCK_STATES)),
        update,
        merge,
        d_inner,
        d_read,
        d_write,
        d_total,
        d_update,
        d_merge,
        *layout_arguments(layout, update),
        first,
        1,
        **constants,
    )
