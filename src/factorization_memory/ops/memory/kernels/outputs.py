"""Outputs of chunks: `y = P v + Q h`, and the gradient of values, `dv = P^T dy + K dh'`, which has the same form."""

from __future__ import annotations

import triton
import triton.language as tl

from factorization_memory.ops.memory.kernels.layout import VARYING, locate, place


@triton.jit(do_not_specialize=VARYING)
def walk_kernel(
    value,  # v [tokens, H, D]
    read,  # P and Q, concatenated [slots, H, C, C + MP]
    write,  # P^T and K, same shape
    total,  # G [slots, H, MP]
    initial,  # h_0 [N, H, M, D]
    carry,  # initial states of segments [segments, H, MP, D]
    output,  # out: y [tokens, H, D]
    final,  # out: final h [N, H, M, D]
    table,
    heads,
    num_states,
    width,
    length,
    chunks,
    segments,
    segment_chunks,
    C: tl.constexpr,
    MP: tl.constexpr,
    BD: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    KEEP_FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs and states in one walk over a segment, with all states of a block of columns on chip."""
    tiles = tl.cdiv(width, BD)
    segment = tl.program_id(0) // tiles
    head = tl.program_id(1)
    row = segment // segments
    part = segment % segments
    j = tl.arange(0, MP)
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    c = tl.arange(0, C)
    inside = d < width
    tile = j[:, None] * width + d[None, :]
    lines = c[:, None] * (heads * width) + d[None, :]
    kept = (j < num_states)[:, None] & inside[None, :]
    dtype = read.dtype.element_ty

    state = tl.zeros((MP, BD), dtype=tl.float32)
    if HAS_CARRY:
        state = tl.load(carry + (segment.to(tl.int64) * heads + head) * MP * width + tile, mask=inside[None, :], other=0.0)
    elif HAS_INITIAL and not PACKED:
        source = (row.to(tl.int64) * heads + head) * num_states * width
        state = tl.load(initial + source + tile, mask=kept, other=0.0).to(tl.float32)

    begin = part * segment_chunks
    for chunk in tl.range(begin, tl.minimum(begin + segment_chunks, chunks), num_stages=STAGES):
        if PACKED:
            sequence = tl.load(table + chunk * 4 + 2)
            if sequence >= 0:
                state = tl.zeros((MP, BD), dtype=tl.float32)
                if HAS_INITIAL:
                    source = (sequence * heads + head) * num_states * width
                    state = tl.load(initial + source + tile, mask=kept, other=0.0).to(tl.float32)
        at = (segment * segment_chunks + chunk - begin).to(tl.int64) * heads + head
        first, tokens = place(row, chunk, table, length, chunks, C, PACKED)
        base = (first * heads + head) * width
        there = (c < tokens)[:, None] & inside[None, :]
        v = tl.load(value + base + lines, mask=there, other=0.0)
        side = at * C * (C + MP)
        p = tl.load(read + side + c[:, None] * (C + MP) + c[None, :])
        q = tl.load(read + side + c[:, None] * (C + MP) + (C + j)[None, :])
        k = tl.load(write + side + c[:, None] * (C + MP) + (C + j)[None, :])
        g = tl.load(total + at * MP + j)
        y = tl.dot(p, v, input_precision=PRECISION)
        y = tl.dot(q, state.to(dtype), acc=y, input_precision=PRECISION)
        state = tl.dot(tl.trans(k), v, acc=state * g[:, None], input_precision=PRECISION)
        tl.store(output + base + lines, y.to(output.dtype.element_ty), mask=there)
        if PACKED and KEEP_FINAL:
            sequence = tl.load(table + chunk * 4 + 3)
            if sequence >= 0:
                tl.store(final + (sequence * heads + head) * num_states * width + tile, state, mask=kept)
    if KEEP_FINAL and not PACKED:
        if part == segments - 1:
            tl.store(final + (row.to(tl.int64) * heads + head) * num_states * width + tile, state, mask=kept)


@triton.jit(do_not_specialize=VARYING)
def outputs_kernel(
    rows,  # v or dy [tokens, H, D]
    weights,  # P and Q, or P^T and K, concatenated [slots, H, C, C + MP]
    states,  # h or dh' [slots of the slice, H, MP, D]
    output,  # out: y or dv [tokens, H, D]
    table,
    first_slot,
    heads,
    width,
    length,
    chunks,
    segments,
    segment_chunks,
    C: tl.constexpr,
    MP: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs of a chunk whose state is in memory: one matrix product, with `v` stacked on `h`."""
    tiles = tl.cdiv(width, BD)
    index = tl.program_id(0) // tiles
    head = tl.program_id(1)
    slot = first_slot + index
    first, tokens = locate(slot, table, length, chunks, segments, segment_chunks, C, PACKED)
    if tokens == 0:
        return
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    c = tl.arange(0, C)
    k = tl.arange(0, BK)
    inside = d < width
    weights += (slot.to(tl.int64) * heads + head) * C * (C + MP) + c[:, None] * (C + MP)
    rows += (first * heads + head) * width
    states += (index.to(tl.int64) * heads + head) * MP * width
    y = tl.zeros((C, BD), dtype=tl.float32)
    for block in tl.range(0, C + MP, BK, num_stages=STAGES):
        within = block < C
        w = tl.load(weights + (block + k)[None, :])
        source = tl.where(within, rows + block * heads * width, states + (block - C) * width)
        step = tl.where(within, heads * width, width)
        last = tl.where(within, tokens - block, BK)
        x = tl.load(source + k[:, None] * step + d[None, :], mask=(k < last)[:, None] & inside[None, :], other=0.0)
        y = tl.dot(w, x, acc=y, input_precision=PRECISION)
    output += (first * heads + head) * width
    to = c[:, None] * (heads * width) + d[None, :]
    tl.store(output + to, y.to(output.dtype.element_ty), mask=(c < tokens)[:, None] & inside[None, :])
