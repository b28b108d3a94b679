"""P, Q, K and G of every chunk, from update and merge weights (see `tree`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorization_memory.ops.memory.kernels.layout import Layout, locate
from factorization_memory.ops.memory.kernels.tree import (
    BLOCK_STATES,
    constants_of,
    decays,
    layout_arguments,
    meet_totals,
    token_of,
    widen,
)
from factorization_memory.ops.runtime.launcher import launch


@triton.jit
def _in_order(x, SPREAD: tl.constexpr):
    """x `[C, C]` with rows and columns reordered from `token_of`'s order (LOW 1) to that of tokens."""
    C: tl.constexpr = x.shape[0]
    x = tl.permute(tl.reshape(x, [C // SPREAD, SPREAD, C // SPREAD, SPREAD]), (1, 0, 3, 2))
    return tl.reshape(x, [C, C])


# Model shapes are constants, so that offsets within a block are too. Alignment of rows is hidden from the compiler, so that a
# thread loads single elements, all of one state, and time stays within a thread.
@triton.jit(
    do_not_specialize=["length", "chunks", "segments", "segment_chunks"],
    do_not_specialize_on_alignment=["update", "merge", "read_out", "write_out", "total_out"],
)
def forward_kernel(
    update,  # theta [tokens, H, M]
    merge,  # phi [tokens, H, M]
    read_out,  # out: P and Q, concatenated [slots, H, CHUNK, CHUNK + M']; writes Q
    write_out,  # out: P^T and K, concatenated, same shape; writes K
    inner_out,  # `read_out`; writes P
    inner_transposed_out,  # `write_out`; writes P^T
    total_out,  # out: G [slots, H, M']
    table,
    length,
    chunks,
    segments,
    segment_chunks,
    HEADS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,  # M'
    CHUNK: tl.constexpr,
    C: tl.constexpr,  # tokens per tile
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPREAD: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of C tokens of one chunk and head, for all states, BLOCK at a time."""
    TILES: tl.constexpr = CHUNK // C
    SIDE: tl.constexpr = CHUNK + PADDED
    tile = tl.program_id(0) % TILES
    slot = tl.program_id(0) // TILES
    head = tl.program_id(1)
    first, count = locate(slot, table, length, chunks, segments, segment_chunks, CHUNK, PACKED)
    here = slot.to(tl.int64) * HEADS + head
    time = token_of(tl.arange(0, C), C, SPREAD, 1)
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
            # Rows of right halves, columns of the half before each.
            inner = tl.where(tl.where(half & 1 == 1, half, -1)[:, None] == half[None, :] + 1, inner + meet, inner)
            partner, total = meet_totals(total, level, C, SPREAD, 1)
            partner = widen(partner, C, 1)
            read = tl.where(right, read * partner, read)
            write = tl.where(right, write, write * partner)
        decay = tl.max(total, axis=1)
        if TILES == 2:
            source = ((first + other) * HEADS + head) * STATES
            there = time[None, :] < tl.where(state < STATES, count - other, 0)[:, None]
            before = tl.load(update + source + offset, mask=there, other=0).to(tl.float32)
            partners, beyond = decays(before, LEVELS, SPREAD, 1)
            if tile == 1:
                for level in tl.static_range(LEVELS):
                    right = (time >> level & 1 == 1)[None, :]
                    before = tl.where(right, before, before * widen(partners[level], C, 1))
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
    # P goes left of Q, its transpose left of K: the same tensors, but here alignment helps.
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


def gates_forward(
    update: Tensor,
    merge: Tensor,
    layout: Layout,
    states: int,
    dtype: torch.dtype,
    precision: str,
    block_states: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes P, Q, K, G of every chunk.

    Args:
        update: theta, contiguous `[B, T, H, M]`, any float dtype; arithmetic is float32.
        merge: phi, same.
        layout: layout of S slots of C tokens, 16 to 128.
        states: M', at least M, a multiple of 16.
        dtype: dtype of P, Q and K.
        precision: `input_precision` of the matrix products: "tf32", "tf32x3" or "ieee".
        block_states: states that a program processes at a time, a power of two, at least 16.

    Returns:
        P and Q, concatenated, and P^T and K, concatenated, each `[S, H, C, C + M']` in `dtype`; G `[S, H, M']` in float32.
        Missing tokens and states count as theta = phi = 0.
    """
    heads, chunk = update.shape[2], layout.chunk
    read, write = (update.new_empty(layout.slots, heads, chunk, chunk + states, dtype=dtype) for _ in range(2))
    total = update.new_empty(layout.slots, heads, states, dtype=torch.float32)
    constants = constants_of(layout, update, states, precision)
    block = block_states or min(BLOCK_STATES, 1 << (states - 1).bit_length())
    # One element per thread of 128: first over all states of a block, then over as many parts of the tokens as remain.
    launch(
        forward_kernel,
        (layout.slots * (chunk // constants["C"]), heads),
        update,
        merge,
        read,
        write,
        read,
        write,
        total,
        *layout_arguments(layout, update),
        BLOCK=block,
        SPREAD=max(128 // block, 1),
        **constants,
    )
    return read, write, total
