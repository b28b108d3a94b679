"""The recurrence as one loop over time, in the letters of docs/method.md: the truth that every other backend is tested against.

Shapes: B sequences, T tokens, H heads, M memory states, K selected states, D value width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    update: Tensor, merge: Tensor, value: Tensor, indices: Tensor | None, state: Tensor, state_norm_eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """The whole sequence, one token after the other; differentiable by autograd.

    Args:
        update: theta, `[B, T, H, M]`, or `[B, T, H, K]` with `indices`.
        merge: phi, same shape.
        value: v, `[B, T, H, D]`.
        indices: states that each token selects, `[B, T, H, K]`, or None for all M in order.
        state: h_0, `[B, H, M, D]`; its dtype is the dtype of the arithmetic.
        state_norm_eps: if given, each memory state is RMS-normalised (with this epsilon) as it is merged; the memory itself
            stays as it is.

    Returns:
        y `[B, T, H, D]` and the state after the last token `[B, H, M, D]`, both in the dtype of `state`.
    """
    outputs = []
    for t in range(value.shape[1]):
        theta, phi = update[:, t, :, :, None].to(state.dtype), merge[:, t, :, :, None].to(state.dtype)
        v = value[:, t, :, None, :].to(state.dtype)
        if indices is None:
            state = selected = (1 - theta) * state + theta * v
        else:
            rows = indices[:, t, :, :, None].expand(-1, -1, -1, state.shape[-1])
            selected = (1 - theta) * state.gather(2, rows) + theta * v
            state = state.scatter(2, rows, selected)
        outputs.append((phi * _normalise(selected, state_norm_eps)).sum(dim=2))
    if not outputs:
        return state.new_zeros(value.shape), state.clone()
    return torch.stack(outputs, dim=1), state


def step(
    update: Tensor, merge: Tensor, value: Tensor, indices: Tensor | None, state: Tensor, state_norm_eps: float | None = None
) -> Tensor:
    """One token, `state` updated in place. Shapes as in `forward` without T; returns y `[B, H, D]` in the dtype of `state`."""
    theta, phi = update[..., None].to(state.dtype), merge[..., None, :].to(state.dtype)
    v = value[:, :, None, :].to(state.dtype)
    if indices is None:
        selected = state.mul_(1 - theta).addcmul_(theta, v)
    else:
        rows = indices[..., None].expand(-1, -1, -1, state.shape[-1])
        selected = (1 - theta) * state.gather(2, rows) + theta * v
        state.scatter_(2, rows, selected)
    return (phi @ _normalise(selected, state_norm_eps))[:, :, 0]


def _normalise(states: Tensor, eps: float | None) -> Tensor:
    return states if eps is None else torch.nn.functional.rms_norm(states, states.shape[-1:], eps=eps)
