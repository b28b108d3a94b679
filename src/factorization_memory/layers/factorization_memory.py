"""The Factorization Memory layer (arXiv 2511.00315): routing, the recurrence, and what stands around it.

Shapes: B sequences, T tokens, d hidden size, H heads, M memory states of each head, K selected states, D value width of a
head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from factorization_memory import ops
from factorization_memory.config import Backend, ModelConfig
from factorization_memory.layers.convolution import CausalConvolution
from factorization_memory.layers.norm import rms_norm
from factorization_memory.layers.projection import project
from factorization_memory.layers.routing import Routing
from factorization_memory.layers.state import LayerState, Undo
from factorization_memory.ops import reference
from factorization_memory.ops.precision import no_autocast, state_dtype
from factorization_memory.ops.routing import route

STATE_NORM_PIECE = 64
"""Tokens whose states norm="state" holds at a time."""
LEAST_SKIPPED = 32
"""Memory states to one that is selected from which whole sequences are given the selected ones alone, where a token reads
others than it updates: from there on `auto` may take the sparse kernels (docs/kernels.md)."""


class FactorizationMemory(nn.Module):
    """A recurrent mixing layer with a memory of M states per head, all (dense) or K (sparse) of which each token updates and
    merges. The input is expected RMS-normalised, as in a pre-norm block. Gradients of gradients are not supported.

    Args:
        hidden_size: d, width of input and output.
        num_states: M, memory states of each head.
        top_k: K, states that each token selects by affinity; the kept affinities sum to 1. None selects all.
        merge_top_k: states that each token merges, selected by its query, where they are not the `top_k` that it updates.
        num_heads: H; each head has its own affinities and rates. The paper has 1.
        expand: total value width H * D over hidden_size.
        affinity_threshold: instead of top_k: select the states of at least this affinity (and always the largest).
        temperature: divides the affinity logits.
        affinity_init: standard deviation of the affinity logits at initialisation, for normalised input.
        affinity: "softmax", or "none": no affinities, each state is updated (and merged) at its own rate.
        query: what merge weights are made of: "shared", the update's affinities and a merge rate; "separate", affinities of
            their own over the selected states, and a merge rate; "linear", a linear map of x of either sign.
        rates: "state": an update and a merge rate for each memory state; "head": one of each for a head.
        update_rate_init: first and last update rate at initialisation, spread evenly in logit over the states (or heads).
        norm: RMS normalisation before the output projection: "merged" over all heads' width, "head" over each head's, "state"
            of each memory state as it is merged (by the reference loop: slow), "none".
        conv_size: taps of a causal convolution with SiLU; 0 for none.
        conv_input: what it takes: "value", the values; "layer", the layer's input, to which it is added; "both", the values,
            and the layer's input, to which it is added for routing alone.
        value_skip: whether a token's own values, each times a learned number, are added to the normalised merged vector.
        output_gate: whether a SiLU gate of the input multiplies the merged vector.
        norm_eps: epsilon of the normalisation.
        backend: backend of the recurrence, see `factorization_memory.ops.factorization_memory`.

    Raises:
        ConfigError: a value that cannot be, named with its remedy.
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
        merge_top_k: int | None = None,
        affinity_threshold: float | None = None,
        temperature: float = 1.0,
        affinity_init: float = ModelConfig.affinity_init,
        affinity: Literal["softmax", "none"] = "softmax",
        query: Literal["shared", "separate", "linear"] = "shared",
        rates: Literal["head", "state"] = "state",
        update_rate_init: tuple[float, float] = ModelConfig.update_rate_init,
        norm: Literal["merged", "head", "state", "none"] = "merged",
        conv_size: int = 0,
        conv_input: Literal["value", "layer", "both"] = "value",
        value_skip: bool = False,
        output_gate: bool = False,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        # One place checks these fields, for the layer alone as for a whole model.
        config = ModelConfig(
            hidden_size=hidden_size, num_states=num_states, top_k=top_k, num_heads=num_heads, expand=expand,
            merge_top_k=merge_top_k, affinity_threshold=affinity_threshold, temperature=temperature,
            affinity_init=affinity_init, affinity=affinity, query=query, rates=rates, update_rate_init=update_rate_init,
            norm=norm, conv_size=conv_size, conv_input=conv_input, value_skip=value_skip, output_gate=output_gate,
            norm_eps=norm_eps, backend=backend,
        )  # fmt: skip
        self.hidden_size, self.num_states, self.num_heads = hidden_size, num_states, num_heads
        self.top_k = None if top_k == num_states and merge_top_k is None else top_k
        self.merge_top_k = merge_top_k
        self.head_size = config.value_size // num_heads
        self.affinity_threshold, self.temperature = affinity_threshold, temperature
        self.rates_per_head = num_states if rates == "state" else 1
        self.affinity_init, self.update_rate_init = affinity_init, update_rate_init
        self.norm, self.norm_eps, self.backend = norm, norm_eps, backend

        every_state = num_heads * num_states
        self.affinity = nn.Linear(hidden_size, every_state, bias=False) if affinity == "softmax" else None
        self.update_rate = nn.Linear(hidden_size, num_heads * self.rates_per_head)
        self.merge_rate = nn.Linear(hidden_size, num_heads * self.rates_per_head) if query != "linear" else None
        self.query = nn.Linear(hidden_size, every_state, bias=False) if query != "shared" else None
        self.value = nn.Linear(hidden_size, config.value_size, bias=False)
        convolved = {"value": config.value_size, "layer": hidden_size, "both": config.value_size + hidden_size}[conv_input]
        self.convolution = CausalConvolution(convolved, conv_size) if conv_size else None
        self.conv_input = conv_input
        self.skip = nn.Parameter(torch.ones(config.value_size)) if value_skip else None
        self.gate = nn.Linear(hidden_size, config.value_size, bias=False) if output_gate else None
        self.norm_weight = None if norm == "none" else nn.Parameter(torch.ones(config.value_size))
        self.output = nn.Linear(config.value_size, hidden_size, bias=False)
        self.observer: Callable[[Routing], None] | None = None
        """Called with the routing of each forward pass, for diagnosis."""
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: ModelConfig) -> FactorizationMemory:
        """The layer of a model's configuration."""
        return cls(
            config.hidden_size, config.num_states, config.top_k, config.num_heads, config.expand,
            merge_top_k=config.merge_top_k, affinity_threshold=config.affinity_threshold, temperature=config.temperature,
            affinity_init=config.affinity_init, affinity=config.affinity, query=config.query, rates=config.rates,
            update_rate_init=config.update_rate_init, norm=config.norm, conv_size=config.conv_size,
            conv_input=config.conv_input, value_skip=config.value_skip, output_gate=config.output_gate,
            norm_eps=config.norm_eps, backend=config.backend,
        )  # fmt: skip

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights. Routing starts as sharp as `affinity_init` says, and update rates spread over the states, so that
        memory has many time scales from the first step (docs/method.md has the measurements)."""
        scale = self.hidden_size**-0.5
        if self.affinity is not None:
            nn.init.normal_(self.affinity.weight, std=self.affinity_init * scale)
        if self.query is not None:
            if self.affinity is not None and self.merge_rate is not None:
                self.query.weight.copy_(self.affinity.weight)
            else:
                nn.init.normal_(self.query.weight, std=scale)
        for projection in (self.value, self.gate):
            if projection is not None:
                nn.init.normal_(projection.weight, std=scale)
        nn.init.normal_(self.output.weight, std=self.output.in_features**-0.5)
        for rate in (self.update_rate, self.merge_rate):
            if rate is None:
                continue
            nn.init.normal_(rate.weight, std=0.1 * scale)
            nn.init.zeros_(rate.bias)
        low, high = (math.log(rate / (1 - rate)) for rate in self.update_rate_init)
        count = self.rates_per_head if self.rates_per_head > 1 else self.num_heads
        spread = torch.linspace(low, high, count) if count > 1 else torch.tensor([(low + high) / 2])
        self.update_rate.bias.copy_(spread if self.rates_per_head == 1 else spread.repeat(self.num_heads))
        if self.convolution is not None:
            self.convolution.reset_parameters()
        for weight in (self.norm_weight, self.skip):
            if weight is not None:
                nn.init.ones_(weight)

    def initial_state(self, batch_size: int) -> LayerState:
        """The empty memory of `batch_size` sequences."""
        weight = self.value.weight
        memory = weight.new_zeros(batch_size, self.num_heads, self.num_states, self.head_size, dtype=state_dtype(weight))
        return LayerState(memory, None if self.convolution is None else self.convolution.initial_tail(batch_size))

    def route(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """The memory states that x `[..., d]` selects, and its update and merge weights.

        Args:
            x: layer input.
            padding_mask: bool `[...]`; False makes a token's update and merge weights zero.
        """
        logits, update_logits, merge_logits, query = project(
            x, self.num_heads, self.affinity, self.update_rate, self.merge_rate, self.query
        )
        assert update_logits is not None
        return self.weigh(logits, update_logits, merge_logits, query, padding_mask)

    def weigh(
        self, logits: Tensor | None, update_logits: Tensor, merge_logits: Tensor | None, query: Tensor | None,
        padding_mask: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """The routing of a token's projections, those that the layer has: `[..., H, M]` each, rates of a head `[..., H, 1]`."""
        merge_indices = None
        if logits is None:
            affinity, indices = torch.ones_like(update_logits, dtype=state_dtype(update_logits)), None
            update = update_logits.to(affinity.dtype).sigmoid()
            merge = query if merge_logits is None else merge_logits.to(affinity.dtype).sigmoid()
        else:
            if self.affinity_threshold is not None:
                logits = self._above_threshold(logits)
            backend = self._backend_beside()
            rates = update_logits if merge_logits is None else merge_logits
            affinity, update, merge, indices = route(logits, update_logits, rates, self.top_k, self.temperature, backend)
            if query is not None and self.merge_top_k is not None:
                merge, merge_indices = self._own_selection(query, merge_logits, backend)
            elif query is not None:
                merge = self._own_merge(query, merge_logits, affinity, indices)
        assert merge is not None
        merge = merge.to(update.dtype)
        if padding_mask is not None:
            update, merge = (weight * padding_mask[..., None, None] for weight in (update, merge))
        return Routing(affinity, update, merge, indices, self.num_states, padding_mask, merge_indices)

    def _backend_beside(self) -> str:
        """The backend of what stands around the recurrence, routing and convolution."""
        return "plain" if self.backend in ("reference", "chunked") else "auto"

    def _own_selection(self, query: Tensor, merge_logits: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        """Merge weights `[..., H, R]` of a query `[..., H, M]` that selects states of its own, and their indices."""
        if merge_logits is not None:
            _, _, merge, indices = route(query, merge_logits, merge_logits, self.merge_top_k, self.temperature, backend)
            assert indices is not None
            return merge, indices
        size = query.detach().abs()
        *_, indices = route(size, size, size, self.merge_top_k, backend=backend)
        assert indices is not None
        return query.gather(-1, indices), indices

    def _own_merge(self, query: Tensor, merge_logits: Tensor | None, affinity: Tensor, indices: Tensor | None) -> Tensor:
        """Merge weights `[..., H, K]` of a query `[..., H, M]` that is not the update's affinity."""
        if indices is not None:
            query = query.gather(-1, indices)
            if merge_logits is not None and merge_logits.shape[-1] > 1:
                merge_logits = merge_logits.gather(-1, indices)
        query = query.to(affinity.dtype)
        unselected = affinity == 0 if self.affinity_threshold is not None else None
        if merge_logits is None:
            return query if unselected is None else query.masked_fill(unselected, 0)
        if unselected is not None:
            query = query.masked_fill(unselected, -torch.inf)
        return (query / self.temperature).softmax(-1) * merge_logits.to(query.dtype).sigmoid()

    def _above_threshold(self, logits: Tensor) -> Tensor:
        """Affinity logits `[..., H, M]`, minus infinity where the affinity is below the threshold and not the largest."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        affinity = (logits / self.temperature).softmax(-1)
        least = affinity.amax(-1, keepdim=True).clamp(max=self.affinity_threshold)
        return logits.masked_fill(affinity < least, -torch.inf)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """A stretch of whole sequences, from their beginning or from a carried state.

        Args:
            x: `[B, T, d]`, normalised.
            state: where the sequences stand (of N sequences with `cu_seqlens`); None begins anew. Not modified.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
            padding_mask: bool `[B, T]`, False for padding, anywhere in the sequence: such a token leaves the state as it is,
                and its output is to be ignored. Not with `cu_seqlens`.
            keep_state: whether to return the state; without, its memory is not taken either.

        Returns:
            y `[B, T, d]`, and the state after the last token or None.

        Raises:
            ValueError: an argument of the wrong shape or dtype, or two that do not go together.
        """
        self._check(x, state, cu_seqlens, padding_mask)
        if padding_mask is not None:
            # Whatever stands in padding, also what is not finite, stays out.
            x = x.masked_fill(~padding_mask[..., None], 0)
        tail = None if state is None else state.convolution

        def convolve(parts: list[Tensor], residual: bool) -> list[Tensor]:
            nonlocal tail
            assert self.convolution is not None
            outputs, tail = self.convolution(
                parts, tail, cu_seqlens, padding_mask, residual, keep_state, self._backend_beside()
            )
            return outputs

        mixed, value = self._convolved(x, convolve)
        routing = self.route(mixed, padding_mask)
        if self.observer is not None:
            self.observer(routing)
        value = value.unflatten(-1, (self.num_heads, self.head_size))
        y, memory = self._recurrence(routing, value, None if state is None else state.memory, cu_seqlens, keep_state)
        return self._output(y, x, value), None if memory is None else LayerState(memory, tail)

    def _convolved(self, x: Tensor, convolve: Callable[[list[Tensor], bool], list[Tensor]]) -> tuple[Tensor, Tensor]:
        """What is routed and the values `[..., H * D]`, of the layer's input x `[..., d]`; `convolve` is the convolution, of
        inputs side by side, the last of which it adds to what it makes of it if it is told so."""
        if self.convolution is None:
            return x, self.value(x)
        if self.conv_input == "layer":
            (mixed,) = convolve([x], True)
            return mixed, self.value(mixed)
        if self.conv_input == "value":
            (value,) = convolve([self.value(x)], False)
            return x, value
        value, mixed = convolve([self.value(x), x], True)
        return mixed, value

    def _check(self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, padding_mask: Tensor | None) -> None:
        """Checks the arguments of `forward`."""
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}, takes [B, T, {self.hidden_size}]")
        if padding_mask is not None:
            if cu_seqlens is not None:
                raise ValueError("padding_mask: not together with cu_seqlens; leave padding out of packed sequences")
            if padding_mask.dtype != torch.bool or padding_mask.shape != x.shape[:2]:
                raise ValueError(
                    f"padding_mask: got {padding_mask.dtype} {tuple(padding_mask.shape)}, takes torch.bool {tuple(x.shape[:2])}"
                )
        if cu_seqlens is not None:
            ops.check_borders(cu_seqlens, x.shape[0], x.shape[1])
        if state is not None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            shape = (sequences, self.num_heads, self.num_states, self.head_size)
            ops.check_state(state.memory, "state.memory", shape, self.value.weight)
            if (state.convolution is None) != (self.convolution is None):
                raise ValueError("state.convolution: the state is not of this layer; take one from initial_state or forward")
            if state.convolution is not None and self.convolution is not None:
                self.convolution.check_tail(state.convolution, "state.convolution", sequences)

    @torch.no_grad()
    def step(self, x: Tensor, state: LayerState) -> Tensor:
        """One token x `[B, d]` to y `[B, d]`; `state` is updated in place."""
        undo, tail = state.undo, state.convolution
        if undo is not None:
            undo.put_aside(None, tail)

        def convolve(parts: list[Tensor], residual: bool) -> list[Tensor]:
            assert self.convolution is not None
            assert tail is not None
            return self.convolution.step(parts, tail, residual)

        mixed, value = self._convolved(x, convolve)
        routing = self.route(mixed)
        if undo is not None:
            undo.put_aside(routing.indices, None)
        value = value.unflatten(-1, (self.num_heads, self.head_size))
        return self._output(self.step_memory(routing, value, state), x, value)

    def step_memory(self, routing: Routing, value: Tensor, state: LayerState) -> Tensor:
        """The recurrence's step: one token's values `[B, H, D]` to its merged vectors, `state.memory` updated in place."""
        if routing.merge_indices is None:
            return self._step(routing.update, routing.merge, value, routing.indices, state)
        self._step(routing.update, torch.zeros_like(routing.update), value, routing.indices, state)
        # What is read alone stays as it is, also where the value is not finite.
        nothing = torch.zeros_like(routing.merge), torch.zeros_like(value)
        return self._step(nothing[0], routing.merge, nothing[1], routing.merge_indices, state, keep_undo=False)

    def _step(
        self, update: Tensor, merge: Tensor, value: Tensor, indices: Tensor | None, state: LayerState, keep_undo: bool = True
    ) -> Tensor:
        """The step with one selection for update and merge."""
        rows, position = (None, None) if state.undo is None or not keep_undo else (state.undo.rows, state.undo.position)
        if self.norm != "state":
            backend = "reference" if self.backend in ("reference", "chunked") else "auto"
            return ops.step_unchecked(
                update, merge, value, state.memory, indices, undo=rows, position=position, backend=backend
            )  # fmt: skip
        if rows is not None and position is not None:
            reference.put_aside(state.memory, indices, rows, position)
        with no_autocast(value.device):
            return reference.step(update, merge, value, indices, state.memory, self.norm_eps).to(value.dtype)

    def keep_undo(self, state: LayerState, steps: int, position: Tensor) -> LayerState:
        """The same state, keeping what the next steps overwrite; `position` as in `Undo`."""
        memory, convolution = state.memory, state.convolution
        batch, heads, _, width = memory.shape
        chosen = self.top_k or self.num_states
        return LayerState(
            memory,
            convolution,
            Undo(
                memory.new_empty(steps, batch, heads, chosen, width),
                None
                if self.top_k is None
                else torch.zeros(steps, batch, heads, chosen, dtype=torch.int64, device=memory.device),
                None if convolution is None else convolution.new_empty(steps, *convolution.shape),
                position,
            ),
        )

    def _recurrence(
        self, routing: Routing, value: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        size = min((self.top_k or 0) + (self.merge_top_k or 0), self.num_states)
        skips = self.backend == "triton-sparse" or size * LEAST_SKIPPED <= self.num_states
        weights = routing.as_one_selection(size if skips else None)
        if self.norm == "state":
            y, memory = self._state_norm_recurrence(*weights, value, memory, cu_seqlens)
            return y, memory if keep_state else None
        update, merge, indices = weights
        return ops.recurrence_unchecked(
            update, merge, value, indices, self.num_states, memory, keep_state, cu_seqlens, self.backend
        )

    def _state_norm_recurrence(
        self, update: Tensor, merge: Tensor, indices: Tensor | None, value: Tensor, memory: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loop that sees every state of every token, a piece of time at once so that backward holds one piece's states."""
        borders = None if cu_seqlens is None else ops.read_borders(cu_seqlens)
        sequences = value.shape[0] if borders is None else len(borders) - 1
        memory = (self.initial_state(sequences).memory if memory is None else memory).clone()
        outputs, finals = [value.new_zeros(value.shape[0], 0, *value.shape[2:])], []
        for n, (start, stop) in enumerate(pairwise(borders or [0, value.shape[1]])):
            state = memory if borders is None else memory[n : n + 1]
            for first in range(start, stop, STATE_NORM_PIECE):
                part = slice(first, min(first + STATE_NORM_PIECE, stop))
                chosen = None if indices is None else indices[:, part]
                y, state = checkpoint(
                    reference.forward, update[:, part], merge[:, part], value[:, part], chosen, state,
                    self.norm_eps, use_reentrant=False,
                )  # fmt: skip
                outputs.append(y)
            finals.append(state)
        return torch.cat(outputs, dim=1).to(value.dtype), torch.cat(finals)

    def _output(self, y: Tensor, x: Tensor, value: Tensor) -> Tensor:
        """The merged vectors y `[..., H, D]` of the layer input x `[..., d]`, normalised, with the token's own values
        `[..., H, D]` added, gated, projected."""
        if self.norm == "head":
            y = functional.rms_norm(y, (self.head_size,), eps=self.norm_eps)
        y = y.flatten(-2)
        if self.norm == "merged" and self.norm_weight is not None:
            y = rms_norm(y, self.norm_weight.to(y.dtype), self.norm_eps)
        elif self.norm_weight is not None:
            y = y * self.norm_weight.to(y.dtype)
        if self.skip is not None:
            y = y + value.flatten(-2) * self.skip.to(y.dtype)
        if self.gate is not None:
            y = y * functional.silu(self.gate(x))
        return self.output(y)
