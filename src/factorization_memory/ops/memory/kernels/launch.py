"""Launches the kernels of one call.

Shapes: B sequences, T tokens, H heads, M memory states, D value width per head, N packed sequences; C tokens per chunk, MP
padded number of states, S slots (see `layout`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from factorization_memory.ops.memory.kernels.gate_gradients import gates_backward
from factorization_memory.ops.memory.kernels.gates import gates_forward
from factorization_memory.ops.memory.kernels.gradients import gradients_kernel
from factorization_memory.ops.memory.kernels.outputs import outputs_kernel, walk_kernel
from factorization_memory.ops.memory.kernels.plan import Plan
from factorization_memory.ops.memory.kernels.states import carry_kernel, states_kernel
from factorization_memory.ops.memory.kernels.tuning import Tile
from factorization_memory.ops.runtime.launcher import launch


class Call:
    """Launches the kernels of one call; the constructor computes the weights of chunks."""

    def __init__(self, plan: Plan, update: Tensor, merge: Tensor, weights: tuple[Tensor, ...] | None = None) -> None:
        self.plan = plan
        layout = plan.layout
        if weights is None:
            weights = gates_forward(update, merge, layout, plan.padded, plan.dtype, plan.precision)
        self.weights = weights
        self.read, self.write, self.total = weights
        self.table = self.total if layout.table is None else layout.table
        self.size = (layout.length, layout.chunks, layout.segments, layout.segment_chunks)
        self.segments = layout.rows * layout.segments

    def _tiles(self, count: int, tile: Tile, blocks: int) -> tuple[int, int]:
        return count * blocks * -(-self.plan.width // tile.width), self.plan.heads

    def carry(self, rows: Tensor, enter: Tensor | None, reverse: bool) -> Tensor:
        """Initial states of segments (gradients of their final states, in reverse), `[segments, H, MP, D]`."""
        plan = self.plan
        shape = (self.segments, plan.heads, plan.padded)
        local = rows.new_empty(*shape, plan.width, dtype=torch.float32)
        decay = rows.new_empty(shape, dtype=torch.float32)
        self.states(rows, reverse, 0, self.segments, enter=enter, summary=(local, decay))
        at = plan.tile("carry")
        packed = plan.layout.packed
        launch(
            carry_kernel,
            self._tiles(plan.layout.rows, at, plan.padded // at.states),
            local,
            decay,
            None if packed else enter,
            plan.heads,
            plan.states,
            plan.width,
            plan.layout.segments,
            MP=plan.padded,
            BM=at.states,
            BD=at.width,
            REVERSE=reverse,
            HAS_ENTER=enter is not None and not packed,
            num_warps=at.warps,
        )
        return local

    def states(
        self,
        rows: Tensor,
        reverse: bool,
        first: int,
        count: int,
        out: Tensor | None = None,
        carry: Tensor | None = None,
        enter: Tensor | None = None,
        leave: Tensor | None = None,
        summary: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Writes the states before each chunk of `count` segments (gradients after it, in reverse) to `out`; or each segment's
        `summary`: its final state from a zero initial state, and its decay."""
        plan = self.plan
        at = plan.tile("states")
        if math.prod(self._tiles(count, at, plan.padded // at.states)) < plan.processors:
            at = plan.tile("narrow_states")
        local, decay = (None, None) if summary is None else summary
        launch(
            states_kernel,
            self._tiles(count, at, plan.padded // at.states),
            rows,
            self.read if reverse else self.write,
            self.total,
            enter,
            leave,
            carry,
            out,
            local,
            decay,
            self.table,
            first,
            plan.heads,
            plan.states,
            plan.width,
            *self.size,
            C=plan.layout.chunk,
            MP=plan.padded,
            BM=at.states,
            BD=at.width,
            REVERSE=reverse,
            PACKED=plan.layout.packed,
            SUMMARY=summary is not None,
            HAS_ENTER=enter is not None,
            HAS_LEAVE=leave is not None,
            HAS_CARRY=carry is not None,
            PRECISION=plan.precision,
            STAGES=at.stages,
            num_warps=at.warps,
        )

    def walk(self, value: Tensor, output: Tensor, initial: Tensor | None, carry: Tensor | None, final: Tensor | None) -> None:
        """Writes outputs `[B, T, H, D]` and final states, for few states."""
        plan = self.plan
        at = plan.tile("walk")
        launch(
            walk_kernel,
            self._tiles(self.segments, at, 1),
            value,
            self.read,
            self.write,
            self.total,
            initial,
            carry,
            output,
            final,
            self.table,
            plan.heads,
            plan.states,
            plan.width,
            *self.size,
            C=plan.layout.chunk,
            MP=plan.padded,
            BD=at.width,
            PACKED=plan.layout.packed,
            HAS_INITIAL=initial is not None,
            HAS_CARRY=carry is not None,
            KEEP_FINAL=final is not None,
            PRECISION=plan.precision,
            STAGES=at.stages,
            num_warps=at.warps,
        )

    def outputs(self, rows: Tensor, states: Tensor, output: Tensor, first_slot: int, slots: int, transposed: bool) -> None:
        """Writes `P v + Q h` of `slots` chunks to `output` or, if `transposed`, `P^T dy + K dh'`."""
        plan = self.plan
        at = plan.tile("outputs")
        launch(
            outputs_kernel,
            self._tiles(slots, at, 1),
            rows,
            self.write if transposed else self.read,
            states,
            output,
            self.table,
            first_slot,
            plan.heads,
            plan.width,
            *self.size,
            C=plan.layout.chunk,
            MP=plan.padded,
            BK=min(at.states, plan.layout.chunk),
            BD=at.width,
            PACKED=plan.layout.packed,
            PRECISION=plan.precision,
            STAGES=at.stages,
            num_warps=at.warps,
        )

    def inner_gradient(self, value: Tensor, d_output: Tensor) -> Tensor | None:
        """Gradient of P, `[slots, H, C, C]`; None if `gradients` computes it."""
        plan = self.plan
        if plan.tile("gradients").states == plan.padded:
            return None
        d_inner = self.total.new_empty(plan.layout.slots, plan.heads, plan.layout.chunk, plan.layout.chunk)
        at = plan.tile("inner_gradient")
        self._gradients(at, value, d_output, None, (d_inner, None, None, None), 0, plan.layout.slots, None, None)
        return d_inner

    def gradients(
        self,
        value: Tensor,
        d_output: Tensor,
        states: Tensor,
        d_states: Tensor,
        d_weights: Sequence[Tensor | None],
        d_value: Tensor,
        first_slot: int,
        slots: int,
    ) -> None:
        """Gradients of Q, K, G and values of `slots` chunks; of P too if `d_weights` has a tensor for it."""
        at = self.plan.tile("gradients")
        whole = at.states == self.plan.padded
        self._gradients(at, value, d_output, d_value if whole else None, d_weights, first_slot, slots, states, d_states)
        if not whole:
            self.outputs(d_output, d_states, d_value, first_slot, slots, transposed=True)

    def _gradients(
        self,
        at: Tile,
        value: Tensor,
        d_output: Tensor,
        d_value: Tensor | None,
        d_weights: Sequence[Tensor | None],
        first_slot: int,
        slots: int,
        states: Tensor | None,
        d_states: Tensor | None,
    ) -> None:
        plan = self.plan
        blocks = 1 if states is None else plan.padded // at.states
        launch(
            gradients_kernel,
            (slots * blocks, plan.heads),
            value,
            d_output,
            states,
            d_states,
            self.write,
            *d_weights,
            d_value,
            self.table,
            first_slot,
            plan.heads,
            plan.width,
            *self.size,
            C=plan.layout.chunk,
            MP=plan.padded,
            BM=at.states,
            BD=at.width,
            INNER=d_weights[0] is not None,
            STATES=states is not None,
            VALUE=d_value is not None,
            PACKED=plan.layout.packed,
            PRECISION=plan.precision,
            STAGES=at.stages,
            num_warps=at.warps,
        )

    def slices(self, values: Tensor, buffers: int) -> list[tuple[int, int]]:
        """First segment and number of segments of each slice, sized so that `buffers` workspaces of states stay small."""
        plan = self.plan
        of_one = plan.layout.segment_chunks * plan.heads * plan.padded * plan.width * self.read.element_size() * buffers
        count = max(1, min(self.segments, plan.workspace_room // of_one))
        count = -(-self.segments // -(-self.segments // count))
        return [(first, min(count, self.segments - first)) for first in range(0, self.segments, count)]

    def state_workspace(self, count: int) -> Tensor:
        """Allocates the states before each chunk of `count` segments, `[slots, H, MP, D]`."""
        plan = self.plan
        return self.read.new_empty(count * plan.layout.segment_chunks, plan.heads, plan.padded, plan.width)

    def weight_workspace(self, count: int) -> list[Tensor | None]:
        """Allocates the gradients of P, Q, K and G of `count` segments; of P only if `inner_gradient` returns None."""
        plan = self.plan
        chunk, padded = plan.layout.chunk, plan.padded
        lead = (count * plan.layout.segment_chunks, plan.heads)
        read, write, total = (self.total.new_empty(*lead, *size) for size in ((chunk, padded), (chunk, padded), (padded,)))
        whole = plan.tile("gradients").states == padded
        return [self.total.new_empty(*lead, chunk, chunk) if whole else None, read, write, total]

    def weight_gradients(
        self,
        update: Tensor,
        merge: Tensor,
        d_inner: Tensor | None,
        d_weights: Sequence[Tensor | None],
        d_update: Tensor,
        d_merge: Tensor,
        first_slot: int,
        slots: int,
    ) -> None:
        """Gradients of update and merge weights from those of P, Q, K, G of `slots` chunks; `d_inner` is that of P for all
        chunks, if not among `d_weights`."""
        read, write, total = (x[:slots] for x in d_weights[1:] if x is not None)
        inner = d_weights[0] if d_inner is None else d_inner[first_slot : first_slot + slots]
        assert inner is not None
        layout, precision = self.plan.layout, self.plan.precision
        gates_backward(
            update, merge, layout, (first_slot, slots), inner[:slots], read, write, total, d_update, d_merge, precision
        )
