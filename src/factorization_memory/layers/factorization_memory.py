"""The Factorization Memory layer (arXiv 2511.00315): projections, routing, recurrence and output.

Shapes: B sequences, T tokens, d hidden size, H heads, M memory states of each head, K selected states, D value width per head,
L update lag, N packed sequences.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from factorization_memory import ops
from factorization_memory.config import Backend, MemoryConfig
from factorization_memory.layers.calling import behind_adapters, device_of
from factorization_memory.layers.convolution import CausalConvolution
from factorization_memory.layers.mixer import (
    MERGE_FLOPS,
    UPDATE_FLOPS,
    MixerKind,
    MixerWidth,
    begin_forward,
    begin_step,
    end_forward,
    register_mixer,
)
from factorization_memory.layers.norm import rms_norm
from factorization_memory.layers.projection import project
from factorization_memory.layers.routing import Routing, initialise_rates, route_sequences, route_token
from factorization_memory.layers.state import LayerState
from factorization_memory.layers.state_sizes import StateSizes


class FactorizationMemory(nn.Module):
    """A recurrent mixing layer with a memory of M states per head, of which each token updates and merges all (dense) or K
    (sparse). The input is expected RMS-normalised, as in a pre-norm block. Double backward raises an error.

    Args:
        hidden_size: d, width of input and output.
        num_states: M, memory states of each head.
        top_k: K, states that each token selects by affinity; the kept affinities sum to 1. None selects all.
        num_heads: H; each head has its own affinities and rates. The paper has 1.
        expand: total value width H * D over hidden_size.
        update_lag: L: a token updates with the affinities of the token L before it. 0 is the paper: a token updates the states
            that it merges. 1 is the associative form: a token updates the states that the previous token merges, so that a
            token later retrieves what followed it. The first L tokens of a sequence update nothing.
        temperature: divides the affinity logits.
        affinity_init: standard deviation of the affinity logits at initialisation, for normalised input.
        rates: "state": an update and a merge rate per memory state; "head": one of each per head.
        update_rate_init: first and last update rate at initialisation, spread evenly in logit over the states (or heads).
        conv_size: taps of a causal convolution of the values, with SiLU; 0 for none.
        value_skip: whether a token's own values, scaled by a learned weight per channel, are added to the normalised merged
            vector.
        output_gate: whether a SiLU gate of the input multiplies the merged vector.
        norm_eps: epsilon of the normalisation of the merged vector, over the width of all heads.
        backend: backend of the recurrence, see `factorization_memory.ops.factorization_memory`.

    Raises:
        ConfigError: an invalid value; the message names the field and the remedy.
    """

    state_type = LayerState

    def __init__(
        self,
        hidden_size: int,
        num_states: int = 64,
        top_k: int | None = None,
        num_heads: int = 1,
        expand: float = 2.0,
        *,
        update_lag: int = 0,
        temperature: float = 1.0,
        affinity_init: float = MemoryConfig.affinity_init,
        rates: Literal["head", "state"] = "state",
        update_rate_init: tuple[float, float] = MemoryConfig.update_rate_init,
        conv_size: int = 0,
        value_skip: bool = False,
        output_gate: bool = False,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.config = config = MemoryConfig(
            hidden_size=hidden_size,
            num_states=num_states,
            top_k=top_k,
            num_heads=num_heads,
            expand=expand,
            update_lag=update_lag,
            temperature=temperature,
            affinity_init=affinity_init,
            rates=rates,
            update_rate_init=update_rate_init,
            conv_size=conv_size,
            value_skip=value_skip,
            output_gate=output_gate,
            norm_eps=norm_eps,
            backend=backend,
        )
        self.hidden_size, self.num_states, self.num_heads = hidden_size, num_states, num_heads
        self.top_k = None if top_k == num_states else top_k
        self.head_size = config.value_size // num_heads
        self.rates_per_head = num_states if rates == "state" else 1
        self.update_lag, self.backend = update_lag, backend
        self.temperature, self.norm_eps = temperature, norm_eps
        self.state_sizes = StateSizes(num_heads, num_states, self.head_size, self.top_k, update_lag)

        self.affinity = nn.Linear(hidden_size, num_heads * num_states, bias=False)
        self.update_rate = nn.Linear(hidden_size, num_heads * self.rates_per_head)
        self.merge_rate = nn.Linear(hidden_size, num_heads * self.rates_per_head)
        self.value = nn.Linear(hidden_size, config.value_size, bias=False)
        self.convolution = CausalConvolution(config.value_size, conv_size) if conv_size else None
        self.skip = nn.Parameter(torch.ones(config.value_size)) if value_skip else None
        self.gate = nn.Linear(hidden_size, config.value_size, bias=False) if output_gate else None
        self.norm_weight = nn.Parameter(torch.ones(config.value_size))
        self.output = nn.Linear(config.value_size, hidden_size, bias=False)
        self.observer: Callable[[Routing], None] | None = None
        """Called with the routing of each forward pass, for diagnostics."""
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Sizes."""
        names = ("hidden_size", "num_states", "top_k", "num_heads", "head_size", "update_lag", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @classmethod
    def from_config(cls, config: MemoryConfig) -> FactorizationMemory:
        """Builds the layer from a configuration, of a layer or of a model."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(MemoryConfig)})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights. `affinity_init` sets how sharp routing starts; update rates are spread over the states, so that the
        memory has many time scales from the first step (measurements in docs/method.md)."""
        scale = self.hidden_size**-0.5
        nn.init.normal_(self.affinity.weight, std=self.config.affinity_init * scale)
        for projection in (self.value, self.gate):
            if projection is not None:
                nn.init.normal_(projection.weight, std=scale)
        nn.init.normal_(self.output.weight, std=self.output.in_features**-0.5)
        initialise_rates(self.update_rate, self.merge_rate, self.num_heads, self.config.update_rate_init)
        if self.convolution is not None:
            self.convolution.reset_parameters()
        for weight in (self.norm_weight, self.skip):
            if weight is not None:
                nn.init.ones_(weight)

    def initial_state(self, batch_size: int, capacity: int = 0) -> LayerState:
        """The initial state of `batch_size` sequences; `capacity` is ignored, since the state does not grow."""
        tail = None if self.convolution is None else behind_adapters(self.convolution).initial_tail(batch_size)
        return self.state_sizes.empty(batch_size, tail, self.value.weight, device_of(self))

    def route(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Routing, Tensor | None, Tensor | None]:
        """Routes each token: which memory states it updates and merges, and with which weights.

        Args:
            x, state, cu_seqlens, padding_mask: as in `forward`.

        Returns:
            The routing, and `affinity` and `indices` of the state after the last token.
        """
        affinity, update, merge = project(x, self.num_heads, self.affinity, self.update_rate, self.merge_rate)
        if state is None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            last_affinity, last_indices = self.state_sizes.no_selection(sequences, self.value.weight, device_of(self))
        else:
            last_affinity, last_indices = state.affinity, state.indices
        options = self.top_k, self.temperature, self._backend_beside()
        return route_sequences(affinity, update, merge, last_affinity, last_indices, cu_seqlens, padding_mask, *options)

    def _backend_beside(self) -> str:
        """The backend of routing and convolution."""
        return "plain" if self.backend in ("reference", "chunked") else "auto"

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """Runs the layer over whole sequences, from the initial state or from `state`.

        Args:
            x: `[B, T, d]`, normalised.
            state: state to continue from (of N sequences with `cu_seqlens`); None starts from the initial state. Not modified.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
            padding_mask: bool `[B, T]`, False for padding, anywhere in the sequence: padding leaves the state unchanged;
                ignore its output. Not with `cu_seqlens`.
            keep_state: whether to return the state; if not, none is allocated.

        Returns:
            y `[B, T, d]`, and the state after the last token or None.

        Raises:
            ValueError: an argument of the wrong shape or dtype, or two arguments that exclude each other.
        """
        x, state, broken = begin_forward(self, x, state, cu_seqlens, padding_mask)
        value, tail = self.value(x), None
        if self.convolution is not None:
            before = None if state is None else state.convolution
            value, tail = self.convolution(
                value, before, cu_seqlens, padding_mask, keep_tail=keep_state, backend=self._backend_beside()
            )
        routing, affinity, indices = self.route(x, state, cu_seqlens, padding_mask)
        if self.observer is not None:
            self.observer(routing)
        value = value.unflatten(-1, (self.num_heads, self.head_size))
        y, memory = ops.recurrence(
            routing.update,
            routing.merge,
            value,
            routing.update_indices,
            routing.merge_indices,
            self.num_states,
            None if state is None else state.memory,
            keep_state,
            cu_seqlens,
            self.backend,
        )
        final = None if memory is None else LayerState(memory, tail, affinity, indices)
        return end_forward(self._output(y, x, value), final, broken)

    @torch.no_grad()
    def step(self, x: Tensor, state: LayerState) -> Tensor:
        """One token x `[B, d]` to y `[B, d]`; `state` is updated in place. Raises ValueError unless x and `state` fit this
        layer and each other."""
        begin_step(self, x, state)
        if state.undo is not None:
            state.undo.put_aside(state)
        value = self.value(x)
        if self.convolution is not None:
            assert state.convolution is not None
            value = self.convolution.step(value, state.convolution)
        affinity, update, merge = project(x, self.num_heads, self.affinity, self.update_rate, self.merge_rate)
        value = value.unflatten(-1, (self.num_heads, self.head_size))
        return self._output(self.step_memory(affinity, update, merge, value, state), x, value)

    def step_memory(
        self, affinity_logits: Tensor, update_logits: Tensor, merge_logits: Tensor, value: Tensor, state: LayerState
    ) -> Tensor:
        """Routing and recurrence of one token: logits `[B, H, M]` (rate logits `[B, H, R]`) and values `[B, H, D]` to merged
        vectors `[B, H, D]`; `state` is updated in place."""
        options = self.top_k, self.temperature, self._backend_beside()
        update, merge, update_indices, indices = route_token(
            affinity_logits, update_logits, merge_logits, state.affinity, state.indices, *options
        )
        return state.advance(update, merge, value, update_indices, indices, self.backend)

    def keep_undo(self, state: LayerState, steps: int, position: Tensor) -> LayerState:
        """The same state, recording what the next `steps` steps overwrite; `position` as in `Undo`."""
        return self.state_sizes.keep_undo(state, steps, position)

    def check_state(self, state: LayerState, sequences: int) -> None:
        """Raises ValueError unless `state` fits this layer and holds `sequences` sequences; reads no values."""
        self.state_sizes.check(state, sequences, self.value.weight)
        if (state.convolution is None) != (self.convolution is None):
            raise ValueError("state.convolution: the state is not from this layer; take one from initial_state or forward")
        if state.convolution is not None and self.convolution is not None:
            behind_adapters(self.convolution).check_tail(state.convolution, "state.convolution", sequences)

    def _output(self, y: Tensor, x: Tensor, value: Tensor) -> Tensor:
        """Output of merged vectors y `[..., H, D]` and layer input x `[..., d]`: normalise, add the token's own values
        `[..., H, D]`, gate, project."""
        y = rms_norm(y.flatten(-2), self.norm_weight.to(y.dtype), self.norm_eps)
        if self.skip is not None:
            y = y + value.flatten(-2) * self.skip.to(y.dtype)
        if self.gate is not None:
            y = y * functional.silu(self.gate(x))
        return self.output(y)


register_mixer(
    "memory",
    MixerKind(
        FactorizationMemory.from_config,
        recurrence_flops=lambda config: (UPDATE_FLOPS + MERGE_FLOPS) * (config.top_k or config.num_states) * config.value_size,
        width=MixerWidth("model.expand", lambda config: config.hidden_size, lambda config: math.lcm(16, config.num_heads)),
    ),
)
