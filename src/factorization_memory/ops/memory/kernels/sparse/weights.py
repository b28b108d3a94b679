"""P, Q, K and G of a sparse memory's slots, from the lists of its states, and their backward.

With a_u = 1 - theta_u along the list of a state, decay(i, k) = prod of a_u over i < u <= k. P at the tokens of k and i is the
sum over all states of phi_k decay(i, k) theta_i; Q is phi_k times the decay from the list's beginning to k, K is theta_i times
the decay from i to its end, and G is the decay of the whole list. Each decay is a product of its own factors, never a
quotient, so that theta = 1 is exact.

Backward needs, for each state, the products A of output gradients with values at its tokens, which are entries of P's
gradient. An initial state acts as one more entry before the list, written with theta = 1, whose products are Q's gradient; a
final state acts as one more reader after the list, whose products are K's gradient. With R_ki the sum over i' < i of A_ki'
theta_i' decay(i', i - 1), the gradient of phi_k is R_k,k+1 and that of theta_i the sum over k >= i of phi_k decay(i, k) (A_ki
- R_ki).

Shapes: S slots, L tokens per slot, H heads, M memory states, K selected states.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorization_memory.ops.memory.kernels.sparse.lists import Lists
from factorization_memory.ops.runtime.launcher import launch

BLOCK = 32
"""Entries of a list processed at a time."""
GRADIENT_BLOCK, GRADIENT_WARPS = 16, 1
"""Entries that `gradients_kernel` processes at a time, and its warps."""


@triton.jit
def _products(x):
    """Cumulative product along the last axis."""
    return tl.cumprod(x, len(x.shape) - 1)


@triton.jit
def _last(x, step, N: tl.constexpr):
    """The last element of x `[N]`."""
    return tl.sum(tl.where(step == N - 1, x, 0.0), 0)


@triton.jit
def rows_kernel(
    indices,  # [tokens, H, K]
    place,  # int32 [S, H, L, K]
    begin,  # int32 [S, H, M]
    origin,  # int32 [S, H, L K]
    update,  # theta by entry, float32 [S, H, L K]
    merge,  # phi by entry, float32 [S, H, L K]
    inner,  # in and out, zero-initialised: P, float32 [slots of this call, H, L, L]
    table,  # int64 [S, 2]
    first_slot,
    heads,
    num_states,
    L: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,  # entries at a time
):
    """One row of P: adds the token's weight on every earlier entry of the states that it selects."""
    program = tl.program_id(0)
    position = program % L
    here = (program // L).to(tl.int64)
    unit = here + first_slot * heads
    slot, head = unit // heads, unit % heads
    if position < tl.load(table + slot * 2 + 1):
        token = tl.load(table + slot * 2) + position
        row = inner + (here * L + position) * L
        back = tl.arange(0, N)
        for choice in range(K):
            state = tl.load(indices + (token * heads + head) * K + choice).to(tl.int32)
            entry = tl.load(place + (unit * L + position) * K + choice)
            least = tl.load(begin + unit * num_states + state)
            entries = unit * L * K
            weight = tl.load(merge + entries + entry)
            while (entry >= least) & (weight != 0):
                at = entry - back  # latest first
                there = at >= least
                theta = tl.load(update + entries + at, mask=there, other=0)
                later = tl.load(update + entries + at + 1, mask=there & (back > 0), other=0)
                column = tl.load(origin + entries + at, mask=there, other=0) // K
                decay = _products(1 - later)
                held = tl.load(row + column, mask=there, other=0)
                tl.store(row + column, held + weight * decay * theta, mask=there)
                # Another state of this token may have written to the same columns: make that visible.
                tl.debug_barrier()
                weight *= _last(decay * (1 - theta), back, N)
                entry -= N


@triton.jit
def borders_kernel(
    begin,  # int32 [S, H, M]
    count,  # int32 [S, H, M]
    origin,  # int32 [S, H, L K]
    update,  # theta by entry, float32 [S, H, L K]
    merge,  # phi by entry, float32 [S, H, L K]
    read,  # out, zero-initialised: Q [S, H, L, M]
    write,  # out, zero-initialised: K [S, H, L, M]
    total,  # out: G, float32 [S, H, M]
    num_states,
    L: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,  # entries at a time
):
    """Q, K and G of one state, along its list."""
    unit, state = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = unit * L * K + tl.load(begin + unit * num_states + state)
    entries = tl.load(count + unit * num_states + state)
    step = tl.arange(0, N)
    decay = tl.full([], 1, tl.float32)
    for start in range(0, entries, N):
        at = start + step
        there = at < entries
        theta = tl.load(update + first + at, mask=there, other=0)
        phi = tl.load(merge + first + at, mask=there, other=0)
        position = tl.load(origin + first + at, mask=there, other=0) // K
        target = (unit * L + position) * num_states + state
        decays = decay * _products(1 - theta)
        tl.store(read + target, (phi * decays).to(read.dtype.element_ty), mask=there)
        decay = _last(decays, step, N)
    tl.store(total + unit * num_states + state, decay)
    decay = tl.full([], 1, tl.float32)
    for start in range(0, entries, N):
        at = entries - 1 - start - step  # latest first
        there = at >= 0
        theta = tl.load(update + first + at, mask=there, other=0)
        later = tl.load(update + first + at + 1, mask=there & (step > 0), other=0)
        position = tl.load(origin + first + at, mask=there, other=0) // K
        target = (unit * L + position) * num_states + state
        decays = decay * _products(1 - later)
        tl.store(write + target, (theta * decays).to(write.dtype.element_ty), mask=there)
        decay = _last(decays * (1 - theta), step, N)


@triton.jit
def _from_each(theta, before, step):
    """For a block of a list: decay(i, k) as `[i, k]`, and theta_i decay(i, k - 1) as `[i, k]`, 0 unless i < k.

    Takes theta of the entries (0 past the end), and `before`, theta of each one's predecessor (0 for the first)."""
    later = step[None, :] > step[:, None]
    decay = _products(tl.where(later, 1 - theta[None, :], 1.0))
    until = _products(tl.where(step[None, :] > step[:, None] + 1, 1 - before[None, :], 1.0))
    return decay, tl.where(later, theta[:, None] * until, 0.0)


@triton.jit
def gradients_kernel(
    begin,  # int32 [S, H, M]
    count,  # int32 [S, H, M]
    origin,  # int32 [S, H, L K]
    update,  # theta by entry, float32 [S, H, L K]
    merge,  # phi by entry, float32 [S, H, L K]
    d_inner,  # dP, float32 [slots of this call, H, L, L]
    d_read,  # dQ [S, H, L, M]
    d_write,  # dK [S, H, L, M]
    d_total,  # dG, float32 [S, H, M]
    kept,  # workspace, float32 [S, H, L K]: decay from an entry to the last one read so far
    d_update_kept,  # workspace, float32 [S, H, L K]
    d_update,  # out: of theta [tokens, H, K]
    d_merge,  # out: of phi [tokens, H, K]
    table,  # int64 [S, 2]
    first_slot,
    heads,
    num_states,
    L: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,  # entries at a time
    HAS_READ: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of theta and phi of one state, along its list and back."""
    here, state = (tl.program_id(0) // num_states).to(tl.int64), tl.program_id(0) % num_states
    unit = here + first_slot * heads
    slot, head = unit // heads, unit % heads
    lists = unit * L * K
    first = lists + tl.load(begin + unit * num_states + state)
    entries = tl.load(count + unit * num_states + state)
    inner = d_inner + here * L * L
    at_borders = unit * L * num_states + state
    token = tl.load(table + slot * 2)
    step = tl.arange(0, N)
    for start in range(0, entries, N):
        at = start + step
        there = at < entries
        theta = tl.load(update + first + at, mask=there, other=0)
        before = tl.load(update + first + at - 1, mask=there & (step > 0), other=0)
        phi = tl.load(merge + first + at, mask=there, other=0)
        source = tl.load(origin + first + at, mask=there, other=0)
        row = source // K
        passed = _products(1 - theta)
        block_decay = _last(passed, step, N)
        gathered = tl.zeros([N], tl.float32)  # R at the start of the block of columns
        if HAS_READ:
            gathered = tl.load(d_read + at_borders + row * num_states, mask=there, other=0).to(tl.float32)
        for early in range(0, start, N):
            column = tl.load(origin + first + early + step) // K
            theta_i = tl.load(update + first + early + step)
            before_i = tl.load(update + first + early + step - 1, mask=step > 0, other=0)
            decay_i = tl.load(kept + first + early + step)
            product = tl.load(inner + row[:, None] * L + column[None, :], mask=there[:, None], other=0)
            decay, write = _from_each(theta_i, before_i, step)
            from_begin = _products(1 - before_i)
            short = tl.dot(product, write, input_precision=PRECISION) + gathered[:, None] * from_begin[None, :]
            strength = tl.where(there, phi * passed, 0.0)
            d_theta = tl.sum(strength[:, None] * (product - short), 0) * decay_i
            d_theta += tl.load(d_update_kept + first + early + step)
            to_end = tl.sum(tl.where(step[None, :] == N - 1, decay, 0.0), 1)
            whole = _last(from_begin * (1 - theta_i), step, N)
            gathered = tl.sum(product * (theta_i * to_end)[None, :], 1) + gathered * whole
            tl.debug_barrier()
            tl.store(d_update_kept + first + early + step, d_theta)
            tl.store(kept + first + early + step, decay_i * block_decay)
        causal = (step[None, :] <= step[:, None]) & there[:, None]
        product = tl.load(inner + row[:, None] * L + row[None, :], mask=causal, other=0)
        decay, write = _from_each(theta, before, step)
        reach = tl.trans(decay)  # [k, i]
        short = tl.dot(product, write, input_precision=PRECISION) + gathered[:, None] * _products(1 - before)[None, :]
        d_theta = tl.sum(tl.where(causal, phi[:, None] * reach * (product - short), 0.0), 0)
        d_phi = gathered * passed + tl.sum(tl.where(causal, product * reach * theta[None, :], 0.0), 1)
        tl.store(d_merge + ((token + row) * heads + head) * K + source % K, d_phi, mask=there)
        tl.store(d_update_kept + first + at, d_theta, mask=there)
        # Entries past the end have theta 0, so the decay to the end of the block is that to the end of the list.
        tl.store(kept + first + at, tl.sum(tl.where(step[None, :] == N - 1, decay, 0.0), 1), mask=there)
        tl.debug_barrier()
    held = tl.full([], 0, tl.float32)
    if HAS_WRITE:
        held = tl.load(d_total + unit * num_states + state)
    for start in range(0, entries, N):
        at = start + step
        there = at < entries
        d_theta = tl.load(d_update_kept + first + at, mask=there, other=0)
        source = tl.load(origin + first + at, mask=there, other=0)
        if HAS_WRITE:
            theta = tl.load(update + first + at, mask=there, other=0)
            before = tl.load(update + first + at - 1, mask=there & (step > 0), other=0)
            product = tl.load(d_write + at_borders + source // K * num_states, mask=there, other=0).to(tl.float32)
            decay, write = _from_each(theta, before, step)
            from_begin = _products(1 - before)
            short = tl.sum(product[:, None] * write, 0) + held * from_begin
            d_theta += tl.load(kept + first + at, mask=there, other=0) * (product - short)
            to_end = tl.sum(tl.where(step[None, :] == N - 1, decay, 0.0), 1)
            held = tl.sum(product * theta * to_end, 0) + held * _last(from_begin * (1 - theta), step, N)
        tl.store(d_update + ((token + source // K) * heads + head) * K + source % K, d_theta, mask=there)


def inner_weights(lists: Lists, indices: Tensor, num_states: int, table: Tensor, first_slot: int, slots: int) -> Tensor:
    """P of some slots, float32 `[slots, H, L, L]`, zero above the diagonal."""
    heads, length, chosen = lists.place.shape[1:]
    inner = torch.zeros(slots, heads, length, length, dtype=torch.float32, device=indices.device)
    launch(
        rows_kernel,
        (slots * heads * length,),
        indices,
        lists.place,
        lists.begin,
        lists.origin,
        lists.update,
        lists.merge,
        inner,
        table,
        first_slot,
        heads,
        num_states,
        L=length,
        K=chosen,
        N=BLOCK,
        num_warps=1,
    )
    return inner


def border_weights(lists: Lists, num_states: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Q and K of all slots, `[S, H, L, M]` of `dtype`, and G, float32 `[S, H, M]`."""
    slots, heads, length, chosen = lists.place.shape
    read, write = (lists.update.new_zeros(slots, heads, length, num_states, dtype=dtype) for _ in range(2))
    total = lists.update.new_empty(slots, heads, num_states)
    launch(
        borders_kernel,
        (slots * heads, num_states),
        lists.begin,
        lists.count,
        lists.origin,
        lists.update,
        lists.merge,
        read,
        write,
        total,
        num_states,
        L=length,
        K=chosen,
        N=BLOCK,
        num_warps=1,
    )
    return read, write, total


def weight_gradients(
    lists: Lists,
    num_states: int,
    table: Tensor,
    first_slot: int,
    d_inner: Tensor,
    d_read: Tensor | None,
    d_write: Tensor | None,
    d_total: Tensor | None,
    d_update: Tensor,
    d_merge: Tensor,
    precision: str,
) -> None:
    """Gradients of theta and phi of some slots.

    Args:
        lists: lists of all slots.
        num_states: M.
        table: as in `lists_of`.
        first_slot: the first slot that `d_inner` belongs to.
        d_inner: of P, float32 `[slots, H, L, L]`; entries above the diagonal or past a slot's tokens are ignored.
        d_read: of Q, `[S, H, L, M]`, or None if no slot reads an initial state.
        d_write: of K, same shape, or None if no final state of a slot has a gradient.
        d_total: of G, float32 `[S, H, M]`, with `d_write`.
        d_update: output, contiguous `[B, T, H, K]`.
        d_merge: output, same.
        precision: `input_precision` of float32 matrix products.
    """
    slots, heads, length = d_inner.shape[:3]
    chosen = lists.place.shape[3]
    kept, d_kept = (torch.empty_like(lists.update) for _ in range(2))
    launch(
        gradients_kernel,
        (slots * heads * num_states,),
        lists.begin,
        lists.count,
        lists.origin,
        lists.update,
        lists.merge,
        d_inner,
        d_read,
        d_write,
        d_total,
        kept,
        d_kept,
        d_update,
        d_merge,
        table,
        first_slot,
        heads,
        num_states,
        L=length,
        K=chosen,
        N=GRADIENT_BLOCK,
        HAS_READ=d_read is not None,
        HAS_WRITE=d_write is not None,
        PRECISION=precision,
        num_warps=GRADIENT_WARPS,
    )
