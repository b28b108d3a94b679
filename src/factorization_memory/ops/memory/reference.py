"""The recurrence as a plain loop over time, in the notation of docs/method.md: the ground truth for tests of all other
backends.

Shapes: B sequences, T tokens, H heads, M memory states, K states that a token updates, R that it
merges, D value width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    update: Tensor, merge: Tensor, value: Tensor, indices: Tensor | None, merge_indices: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Whole sequences, token by token; differentiable by autograd.

    Args:
        update: theta, `[B, T, H, M]`, or `[B, T, H, K]` with `indices`.
        merge: phi, same shape, or `[B, T, H, R]` with `merge_indices`.
        value: v, `[B, T, H, D]`.
        indices: states that each token updates, `[B, T, H, K]`; None means all M in order.
        merge_indices: states that each token merges, `[B, T, H, R]`; None means those that it updates.
        state: h_0, `[B, H, M, D]`; its dtype is the dtype of the arithmetic.

    Returns:
        y `[B, T, H, D]` and the state after the last token `[B, H, M, D]`, both in the dtype of `state`.
    """
    outputs = []
    for t in range(value.shape[1]):
        theta, phi = update[:, t, :, :, None].to(state.dtype), merge[:, t, :, :, None].to(state.dtype)
        v = value[:, t, :, None, :].to(state.dtype)
        if indices is None:
            state = merged = (1 - theta) * state + theta * v
        else:
            rows = indices[:, t, :, :, None].expand(-1, -1, -1, state.shape[-1])
            merged = (1 - theta) * state.gather(2, rows) + theta * v
            state = state.scatter(2, rows, merged)
        if merge_indices is not None:
            merged = state.gather(2, merge_indices[:, t, :, :, None].expand(-1, -1, -1, state.shape[-1]))
        outputs.append((phi * merged).sum(dim=2))
    if not outputs:
        # Empty, but part of the graph.
        return value.to(state.dtype) * update[..., :1].to(state.dtype) * merge[..., :1].to(state.dtype), state.clone()
    return torch.stack(outputs, dim=1), state


def step(
    update: Tensor, merge: Tensor, value: Tensor, indices: Tensor | None, merge_indices: Tensor | None, state: Tensor
) -> Tensor:
    """One token, `state` (contiguous) updated in place. Shapes as in `forward` without T; returns y `[B, H, D]` in the dtype
    of `state`."""
    theta, phi = update[..., None].to(state.dtype), merge[..., None, :].to(state.dtype)
    v = value[:, :, None, :].to(state.dtype)
    if indices is None:
        merged = state.mul_(1 - theta).addcmul_(theta, v)
    else:
        rows = _rows(state, indices)
        table = state.view(-1, state.shape[3])
        merged = table.index_select(0, rows).view(*indices.shape, state.shape[3]).mul_(1 - theta).addcmul_(theta, v)
        table.index_copy_(0, rows, merged.flatten(0, 2))
        if merge_indices is not None:
            merged = table.index_select(0, _rows(state, merge_indices)).view(*merge_indices.shape, state.shape[3])
    return (phi @ merged)[:, :, 0]


def steps(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor | None,
    merge_indices: Tensor | None,
    state: Tensor,
    places: Tensor | None,
    undo: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    """T tokens of each sequence, one by one; `state` is updated in place.

    Args:
        update, merge, value, indices, merge_indices: as in `forward`.
        state: `[S, H, M, D]`.
        places: int `[B]`, slot of each sequence in `state`; -1 marks a padding row (output 0). None means slot b for sequence
            b.
        undo: ring `[depth, B, T, H, K, D]` that receives the previous rows.
        position: `[1]`, ring entry to write.

    Returns:
        y `[B, T, H, D]` in the dtype of `state`.
    """
    own = state if places is None else state[places.clamp(min=0)]
    outputs = []
    for t in range(value.shape[1]):
        chosen, read = (None if x is None else x[:, t].long() for x in (indices, merge_indices))
        if undo is not None and position is not None:
            put_aside(own, chosen, undo[:, :, t], position)
        outputs.append(step(update[:, t], merge[:, t], value[:, t], chosen, read, own))
    y = torch.stack(outputs, 1) if outputs else own.new_zeros(value.shape)
    if places is not None:
        there = places >= 0
        state.index_copy_(0, places[there].long(), own[there])
        y = y.masked_fill(~there[:, None, None, None], 0)
    return y


def put_aside(state: Tensor, indices: Tensor | None, undo: Tensor, position: Tensor) -> None:
    """Copies the states of `state` `[B, H, M, D]` that a token selects (`indices` `[B, H, K]`, None means all) to entry
    `position` `[1]` of the ring `undo` `[depth, B, H, K, D]`."""
    rows = state
    if indices is not None:
        rows = state.view(-1, state.shape[3]).index_select(0, _rows(state, indices)).view(*indices.shape, state.shape[3])
    undo.index_copy_(0, position, rows[None])


def undo(state: Tensor, undo: Tensor, indices: Tensor | None, places: Tensor | None, position: Tensor, count: int) -> None:
    """Undoes the last `count` steps recorded in the ring `undo` `[depth, B, T, H, K, D]`, with `indices`
    `[depth, B, T, H, K]`; `position` is the ring entry of the next step. Updates `state` `[S, H, M, D]` in place."""
    own = state if places is None else state[places.clamp(min=0)]
    for back in range(count):
        layer = (position - 1 - back) % len(undo)
        rows = undo.index_select(0, layer)[0]
        chosen = None if indices is None else indices.index_select(0, layer)[0].long()
        for t in reversed(range(rows.shape[1])):
            if chosen is None:
                own.copy_(rows[:, t])
            else:
                own.view(-1, own.shape[3]).index_copy_(0, _rows(own, chosen[:, t]), rows[:, t].flatten(0, 2))
    if places is not None:
        there = places >= 0
        state.index_copy_(0, places[there].long(), own[there])


def _rows(state: Tensor, indices: Tensor) -> Tensor:
    """Flat row indices `[B H K]` of the states `indices` `[B, H, K]` among the B H M rows of a memory `[B, H, M, D]`: copying
    whole rows is much faster than gathering element by element."""
    batch, heads, states = state.shape[:3]
    first = torch.arange(batch * heads, device=state.device).view(batch, heads, 1) * states
    return (first + indices).flatten()
