"""Routing: which memory states each token updates and merges, and the lagged selection that a state carries.

Shapes: B sequences, T tokens, H heads, M memory states of each head, K selected states, L update lag, N packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from factorization_memory.ops import over_states
from factorization_memory.ops.convolution import last_inputs


@dataclass
class Routing:
    """Which memory states each token updates and merges, with their weights.

    Attributes:
        affinity: alpha, `[B, T, H, M]`, or `[B, T, H, K]` with `indices`; sums to 1 over the last dimension.
        update: theta, the same shape.
        merge: phi, the same shape.
        indices: states that each token selects by affinity and merges, int64 `[B, T, H, K]`; None in the dense form.
        update_indices: states that each token updates, selected by the token L before it; `indices` without a lag.
        num_states: M.
        padding_mask: bool `[B, T]`, False for padding; None without padding.
    """

    affinity: Tensor
    update: Tensor
    merge: Tensor
    indices: Tensor | None
    update_indices: Tensor | None
    num_states: int
    padding_mask: Tensor | None = None

    @property
    def merge_indices(self) -> Tensor | None:
        """`merge_indices` argument of the recurrence: None if each token merges the states that it updates."""
        return None if self.indices is self.update_indices else self.indices

    def of_all_states(self) -> tuple[Tensor, Tensor]:
        """Update and merge weights of all states, `[B, T, H, M]`; zero for those not selected."""
        states = self.num_states
        return over_states(self.update, self.update_indices, states), over_states(self.merge, self.indices, states)


def delayed(
    x: Tensor,
    last: Tensor,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Shifts x by L tokens along time; returns the shifted x, and its last L tokens.

    Args:
        x: `[B, T, ...]`.
        last: x of the L tokens before the first, oldest first, `[B, L, ...]` (`[N, L, ...]` with `cu_seqlens`).
        cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
        padding_mask: bool `[B, T]`, False for padding, which the shift skips.

    Returns:
        `[B, T, ...]`, x of the token L before each; and x of the last L tokens, shaped as `last`, a copy.
    """
    lag, length = last.shape[1], x.shape[1]
    if cu_seqlens is not None:
        borders = cu_seqlens.to(x.device, torch.long)
        token = torch.arange(length, device=x.device)
        sequence = torch.bucketize(token, borders[1:], right=True).clamp(max=len(borders) - 2)
        place = token - borders[sequence]
        # Index of the token L before each one in [all carried-in tokens, all tokens].
        source = torch.where(place < lag, sequence * lag + place, len(last) * lag + token - lag)
        joined = torch.cat((last.flatten(0, 1), x[0]))
        new = last_inputs(x.flatten(2), lag + 1, last.flatten(2), cu_seqlens).view(last.shape)
        return joined[source][None], new
    if padding_mask is None:
        joined = torch.cat((last, x), dim=1)
        return joined[:, :length], joined[:, length:].clone()
    order = (~padding_mask).to(torch.int8).argsort(dim=1, stable=True)
    joined = torch.cat((last, _rows(x, order)), dim=1)
    real_before = padding_mask.cumsum(1) - padding_mask.long()
    real = padding_mask.sum(1, keepdim=True)
    return _rows(joined, real_before), _rows(joined, real + torch.arange(lag, device=x.device))


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Gathers x `[B, T, ...]` at `places` `[B, S]` along time: `[B, S, ...]`."""
    return x.gather(1, places.view(*places.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
