"""Routing: which memory states each token updates and merges, and the lagged selection that a state carries.

Shapes: B sequences, T tokens, H heads, M memory states of each head, K selected states, R rates of a head (M or 1), L
update lag, N packed sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from factorization_memory.ops import over_states
from factorization_memory.ops.convolution import last_inputs
from factorization_memory.ops.routing import route, route_step, weigh


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


def route_sequences(
    affinity_logits: Tensor,
    update_logits: Tensor,
    merge_logits: Tensor,
    last_affinity: Tensor | None,
    last_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
    top_k: int | None,
    temperature: float,
    backend: str,
) -> tuple[Routing, Tensor | None, Tensor | None]:
    """Routes each token of whole sequences.

    Args:
        affinity_logits: `[B, T, H, M]`.
        update_logits, merge_logits: `[B, T, H, R]`, R = M or 1.
        last_affinity: affinities of the L tokens before the first, as in `LayerState`; None without a lag.
        last_indices: their states; None without a lag, and in the dense form.
        cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
        padding_mask: bool `[B, T]`, False for padding.
        top_k, temperature, backend: as in `factorization_memory.ops.routing.route`.

    Returns:
        The routing, and the new `last_affinity` and `last_indices`.
    """
    own_update = update_logits if last_affinity is None else None
    affinity, update, merge, indices = route(affinity_logits, own_update, merge_logits, top_k, temperature, backend)
    update_indices = indices
    if last_affinity is not None:
        # There is no selection before the first token: use any distinct states, with zero weights.
        none = (last_affinity == 0).all(-1, keepdim=True)
        updated, last_affinity = delayed(affinity, last_affinity.to(affinity.dtype), cu_seqlens, padding_mask)
        if indices is not None and last_indices is not None:
            selected = torch.where(none, torch.arange(indices.shape[-1], device=indices.device), last_indices)
            update_indices, last_indices = delayed(indices, selected, cu_seqlens, padding_mask)
        update = weigh(update_logits, updated, update_indices)
    assert update is not None
    if padding_mask is not None:
        update, merge = (weight * padding_mask[..., None, None] for weight in (update, merge))
    routing = Routing(affinity, update, merge, indices, update_indices, affinity_logits.shape[-1], padding_mask)
    return routing, last_affinity, last_indices


def route_token(
    affinity_logits: Tensor,
    update_logits: Tensor,
    merge_logits: Tensor,
    last_affinity: Tensor | None,
    last_indices: Tensor | None,
    top_k: int | None,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Routes one token of each sequence: the arguments of `route_sequences` without T; `last_affinity` and `last_indices` are
    updated in place.

    Returns:
        theta and phi, `[B, H, K]`; the states that the token updates and those that it merges, int64 `[B, H, K]`, None in the
        dense form.
    """
    if last_affinity is not None:
        logits = affinity_logits, update_logits, merge_logits
        return route_step(*logits, last_affinity, last_indices, top_k, temperature, backend)
    _, update, merge, indices = route(affinity_logits, update_logits, merge_logits, top_k, temperature, backend)
    assert update is not None
    return update, merge, indices, indices


@torch.no_grad()
def initialise_rates(
    update_rate: nn.Linear, merge_rate: nn.Linear, num_heads: int, update_rate_init: tuple[float, float]
) -> None:
    """Initial weights of the projections to rate logits: update rates from the first of `update_rate_init` to the second,
    spread evenly in logit over a head's states (or over the heads, if each has one rate); merge rates around 1/2."""
    for rate in (update_rate, merge_rate):
        nn.init.normal_(rate.weight, std=0.1 * rate.in_features**-0.5)
        nn.init.zeros_(rate.bias)
    low, high = (math.log(rate / (1 - rate)) for rate in update_rate_init)
    rates_per_head = update_rate.out_features // num_heads
    count = rates_per_head if rates_per_head > 1 else num_heads
    spread = torch.linspace(low, high, count) if count > 1 else torch.tensor([(low + high) / 2])
    update_rate.bias.copy_(spread if rates_per_head == 1 else spread.repeat(num_heads))


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
