"""The states of the gated delta rule from chunk to chunk, one after the other.

From chunk i to the next, with what `chunked` computes of all chunks at once,

    u_i = U_i - W_i S_i        S_{i+1} = a_i S_i + K_i u_i

Shapes: n chunks of L tokens, P pairs of a sequence and a head, K width of a key, V width of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.precision import outside_autocast


def carry(
    free: Tensor, along: Tensor, kept: Tensor, whole: Tensor, begin: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state that each chunk begins with, and what its tokens write. Double backward raises an error.

    Args:
        free: U, what the tokens of each chunk would write if it began with zero, `[n, P, L, V]`.
        along: W, `[n, P, L, K]`.
        kept: K, the keys with their decay until the end of the chunk, `[n, P, K, L]`.
        whole: a, decay over the whole chunk, `[n, P, 1, 1]`.
        begin: S_0, `[P, K, V]`; with `starts`, of the sequence of each chunk, `[n, P, K, V]`.
        starts: whether a chunk is the first of its sequence, bool `[n]`; None if they are all of one.

    Returns:
        S `[n, P, K, V]` and u `[n, P, L, V]`.
    """
    return _Carry.apply(free, along, kept, whole, begin, starts)


class _Carry(torch.autograd.Function):
    """`carry`, writing every chunk's part into its place: nothing is stacked, forward or backward."""

    @staticmethod
    def forward(
        ctx: Any, free: Tensor, along: Tensor, kept: Tensor, whole: Tensor, begin: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        before, writes = free.new_empty(*along.shape[:2], along.shape[3], free.shape[3]), free.new_empty(free.shape)
        state = begin if starts is None else torch.zeros_like(begin[0])
        for i in range(len(free)):
            if starts is not None:
                state = torch.where(starts[i], begin[i], state)
            before[i] = state
            torch.baddbmm(free[i], along[i], state, alpha=-1, out=writes[i])
            state = (state * whole[i]).baddbmm_(kept[i], writes[i])
        ctx.save_for_backward(along, kept, whole, starts, before, writes)
        return before, writes

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, d_before: Tensor, d_writes: Tensor) -> tuple[Tensor | None, ...]:
        along, kept, whole, starts, before, writes = ctx.saved_tensors
        d_free, d_along, d_kept, d_whole = (x.new_empty(x.shape) for x in (writes, along, kept, whole))
        d_begins = None if starts is None else torch.empty_like(before)
        d_state = torch.zeros_like(before[0])
        for i in reversed(range(len(along))):
            torch.baddbmm(d_writes[i], kept[i].mT, d_state, out=d_free[i])
            torch.bmm(d_free[i], before[i].mT, out=d_along[i]).neg_()
            torch.bmm(d_state, writes[i].mT, out=d_kept[i])
            torch.sum(d_state * before[i], (1, 2), keepdim=True, out=d_whole[i])
            d_state = torch.addcmul(d_before[i], d_state, whole[i]).baddbmm_(along[i].mT, d_free[i], alpha=-1)
            if d_begins is not None:
                d_begins[i] = torch.where(starts[i], d_state, 0)
                d_state = torch.where(starts[i], 0, d_state)
        return d_free, d_along, d_kept, d_whole, d_state if d_begins is None else d_begins, None
