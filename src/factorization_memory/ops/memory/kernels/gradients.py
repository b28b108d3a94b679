"""Gradients within a chunk, from its values, output gradients and the states (and their gradients) at its borders:

dP = dy v^T    dQ = dy h^T    dK = v dh'^T    dG = sum_d h dh'    dv = P^T dy + K dh'
"""

from __future__ import annotations

import triton
import triton.language as tl

from factorization_memory.ops.memory.kernels.layout import VARYING, locate


@triton.jit(do_not_specialize=VARYING)
def gradients_kernel(
    value,  # v [tokens, H, D]
    d_output,  # dy [tokens, H, D]
    states,  # h before each chunk [slots of the slice, H, MP, D]
    d_states,  # dh', gradients of the states after each chunk, same shape
    write,  # P^T and K, concatenated [slots, H, C, C + MP]
    d_inner,  # out: dP [slots of the slice, H, C, C]
    d_read,  # out: dQ [slots of the slice, H, C, MP]
    d_write,  # out: dK [slots of the slice, H, C, MP]
    d_total,  # out: dG [slots of the slice, H, MP]
    d_value,  # out: dv [tokens, H, D]
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
    BM: tl.constexpr,
    BD: tl.constexpr,
    INNER: tl.constexpr,
    STATES: tl.constexpr,
    VALUE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums over all D columns: for the inner part (dP), for a block of states (dQ, dK, dG), or for both; with both and all
    states in one block also dv."""
    blocks = MP // BM if STATES else 1
    index = tl.program_id(0) // blocks
    head = tl.program_id(1)
    slot = first_slot + index
    first, tokens = locate(slot, table, length, chunks, segments, segment_chunks, C, PACKED)
    if tokens == 0:
        return
    c = tl.arange(0, C)
    j = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BD)
    at = slot.to(tl.int64) * heads + head
    to = index.to(tl.int64) * heads + head
    base = (first * heads + head) * width
    value += base
    d_output += base
    if STATES:
        states += to * MP * width
        d_states += to * MP * width
    if VALUE:
        d_value += base
    lines = c[:, None] * (heads * width)
    held = j[:, None] * width
    if VALUE:
        write += at * C * (C + MP) + c[:, None] * (C + MP)
        p = tl.load(write + c[None, :])
        k = tl.load(write + (C + j)[None, :])
    if INNER:
        d_p = tl.zeros((C, C), dtype=tl.float32)
    if STATES:
        d_q = tl.zeros((C, BM), dtype=tl.float32)
        d_k = tl.zeros((C, BM), dtype=tl.float32)
        d_g = tl.zeros((BM,), dtype=tl.float32)
    for start in tl.range(0, width, BD, num_stages=STAGES):
        d = start + columns
        inside = (d < width)[None, :]
        there = (c < tokens)[:, None] & inside
        v = tl.load(value + lines + d[None, :], mask=there, other=0.0)
        d_y = tl.load(d_output + lines + d[None, :], mask=there, other=0.0)
        if INNER:
            d_p = tl.dot(d_y, tl.trans(v), acc=d_p, input_precision=PRECISION)
        if STATES:
            h = tl.load(states + held + d[None, :], mask=inside, other=0.0)
            d_h = tl.load(d_states + held + d[None, :], mask=inside, other=0.0)
            d_q = tl.dot(d_y, tl.trans(h), acc=d_q, input_precision=PRECISION)
            d_k = tl.dot(v, tl.trans(d_h), acc=d_k, input_precision=PRECISION)
            d_g += tl.sum(h.to(tl.float32) * d_h.to(tl.float32), axis=1)
        if VALUE:
            d_v = tl.dot(p, d_y, input_precision=PRECISION)
            d_v = tl.dot(k, d_h, acc=d_v, input_precision=PRECISION)
            tl.store(d_value + lines + d[None, :], d_v.to(d_value.dtype.element_ty), mask=there)
    if INNER:
        tl.store(d_inner + to * C * C + c[:, None] * C + c[None, :], d_p)
    if STATES:
        tl.store(d_read + to * C * MP + c[:, None] * MP + j[None, :], d_q)
        tl.store(d_write + to * C * MP + c[:, None] * MP + j[None, :], d_k)
        tl.store(d_total + to * MP + j, d_g)
