"""States at the borders of chunks: the sequential part of the recurrence.

Forward, `h' = G h + K^T v` from chunk to chunk; backward is the same with time reversed, `dh = G dh' + Q^T dy`. A program
holds a tile of the state and walks the chunks of a segment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from factorization_memory.ops.memory.kernels.layout import VARYING, place


@triton.jit(do_not_specialize=VARYING)
def states_kernel(
    rows,  # v or dy [tokens, H, D]
    weights,  # P^T and K, or P and Q, concatenated [slots, H, C, C + MP]
    total,  # G [slots, H, MP]
    enter,  # initial states, or gradients of final states in reverse [N, H, M, D]
    leave,  # out: final states, or gradients of initial states in reverse [N, H, M, D]
    carry,  # initial states of segments (at their end, in reverse) [segments, H, MP, D]
    states,  # out: states before each chunk in walking order [slots of the slice, H, MP, D]
    local,  # out, with SUMMARY: final state of a segment from a zero initial state [segments, H, MP, D]
    decay,  # out, with SUMMARY: decay over a segment [segments, H, MP]
    table,
    first_segment,
    heads,
    num_states,
    width,
    length,
    chunks,
    segments,
    segment_chunks,
    C: tl.constexpr,
    MP: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    SUMMARY: tl.constexpr,
    HAS_ENTER: tl.constexpr,
    HAS_LEAVE: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walks the chunks of one segment, for a block of states and columns: stores the state before each chunk, then applies
    the chunk."""
    blocks = MP // BM
    tiles = blocks * tl.cdiv(width, BD)
    block = tl.program_id(0) % tiles
    segment = first_segment + tl.program_id(0) // tiles
    head = tl.program_id(1)
    row = segment // segments
    part = segment % segments
    if SUMMARY and not PACKED:
        # No segment follows the last one of a row (the first, in reverse).
        if part == (0 if REVERSE else segments - 1):
            return

    j = (block % blocks) * BM + tl.arange(0, BM)
    d = (block // blocks) * BD + tl.arange(0, BD)
    c = tl.arange(0, C)
    inside = d < width
    tile = j[:, None] * width + d[None, :]
    lines = c[:, None] * (heads * width) + d[None, :]
    kept = (j < num_states)[:, None] & inside[None, :]
    padded = MP * width

    state = tl.zeros((BM, BD), dtype=tl.float32)
    product = tl.full((BM,), 1.0, dtype=tl.float32)
    if HAS_CARRY:
        state = tl.load(carry + (segment.to(tl.int64) * heads + head) * padded + tile, mask=inside[None, :], other=0.0)
    elif HAS_ENTER and not PACKED and not SUMMARY:
        source = (row.to(tl.int64) * heads + head) * num_states * width
        state = tl.load(enter + source + tile, mask=kept, other=0.0).to(tl.float32)

    begin = part * segment_chunks
    count = tl.minimum(segment_chunks, chunks - begin)
    for i in tl.range(0, count, num_stages=STAGES):
        chunk = begin + (count - 1 - i if REVERSE else i)
        slot = segment * segment_chunks + chunk - begin
        if PACKED:
            sequence = tl.load(table + chunk * 4 + (3 if REVERSE else 2))
            if sequence >= 0:
                product = tl.zeros((BM,), dtype=tl.float32)
                state = tl.zeros((BM, BD), dtype=tl.float32)
                if HAS_ENTER:
                    source = (sequence * heads + head) * num_states * width
                    state = tl.load(enter + source + tile, mask=kept, other=0.0).to(tl.float32)
        at = slot.to(tl.int64) * heads + head
        if not SUMMARY:
            to = at - tl.cast(first_segment, tl.int64) * segment_chunks * heads
            tl.store(states + to * padded + tile, state.to(states.dtype.element_ty), mask=inside[None, :])
        first, tokens = place(row, chunk, table, length, chunks, C, PACKED)
        x = tl.load(
            rows + (first * heads + head) * width + lines,
            mask=(c < tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(weights + at * C * (C + MP) + c[:, None] * (C + MP) + (C + j)[None, :])
        g = tl.load(total + at * MP + j)
        state = tl.dot(tl.trans(w), x, acc=state * g[:, None], input_precision=PRECISION)
        if SUMMARY:
            product *= g
        if PACKED and HAS_LEAVE and not SUMMARY:
            sequence = tl.load(table + chunk * 4 + (2 if REVERSE else 3))
            if sequence >= 0:
                tl.store(leave + (sequence * heads + head) * num_states * width + tile, state, mask=kept)

    if SUMMARY:
        at = segment.to(tl.int64) * heads + head
        tl.store(local + at * padded + tile, state, mask=inside[None, :])
        if block // blocks == 0:
            tl.store(decay + at * MP + j, product)
    elif HAS_LEAVE and not PACKED:
        if part == (0 if REVERSE else segments - 1):
            tl.store(leave + (row.to(tl.int64) * heads + head) * num_states * width + tile, state, mask=kept)


@triton.jit(do_not_specialize=VARYING)
def carry_kernel(
    local,  # in, final states of segments from zero initial states; out, their initial states [segments, H, MP, D]
    decay,  # decay over a segment [segments, H, MP]
    enter,  # initial states, or gradients of final states in reverse [rows, H, M, D]
    heads,
    num_states,
    width,
    segments,
    MP: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_ENTER: tl.constexpr,
):
    """A scan over the segments of a row."""
    blocks = MP // BM
    tiles = blocks * tl.cdiv(width, BD)
    block = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.program_id(1)
    j = (block % blocks) * BM + tl.arange(0, BM)
    d = (block // blocks) * BD + tl.arange(0, BD)
    inside = (d < width)[None, :]
    tile = j[:, None] * width + d[None, :]
    state = tl.zeros((BM, BD), dtype=tl.float32)
    if HAS_ENTER:
        kept = (j < num_states)[:, None] & inside
        state = tl.load(enter + (row * heads + head) * num_states * width + tile, mask=kept, other=0.0).to(tl.float32)
    for i in range(segments):
        at = (row * segments + (segments - 1 - i if REVERSE else i)) * heads + head
        # The state after the last segment is neither known nor needed.
        follows = i < segments - 1
        end = tl.load(local + at * MP * width + tile, mask=inside & follows, other=0.0)
        g = tl.load(decay + at * MP + j, mask=(j < MP) & follows, other=0.0)
        tl.store(local + at * MP * width + tile, state, mask=inside)
        # If a sequence begins within the segment, no earlier state passes, not even a non-finite one.
        state = tl.where((g == 0)[:, None], end, end + g[:, None] * state)
