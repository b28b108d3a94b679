"""The kernels of one call, launched.

Shapes: B sequences, T tokens, H heads, M memory states, D value width of a head, N packed sequences; C tokens of a chunk, MP
the padded number of states, S slots (see `layout`).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from factorization_memory.ops.triton.gates import gates_backward, gates_forward
from factorization_memory.ops.triton.gradients import gradients_kernel
from factorization_memory.ops.triton.outputs import outputs_kernel, walk_kernel
from factorization_memory.ops.triton.plan import Plan
from factorization_memory.ops.triton.states import carry_kernel, states_kernel
from factorization_memory.ops.triton.tuning import Tile

WORKSPACE_SHARE = 0.5
"""Bytes of the states in memory at a time, over those of values and outputs."""
WORKSPACE_LEAST = 256 * 2**20
"""Bytes of states in memory at a time that are never worth saving."""


class Call:
    """Launches the kernels of one call: first, here, that of the weights of chunks."""

    def __init__(self, plan: Plan, update: Tensor, merge: Tensor) -> None:
        self.plan = plan
        layout = plan.layout
        self.read, self.write, self.total = gates_forward(update, merge, layout, plan.padded, plan.dtype, plan.precision)
        self.table = self.total if layout.table is None else layout.table
        self.size = (layout.length, layout.chunks, layout.segments, layout.segment_chunks)
        self.segments = layout.rows * layout.segments

    def _tiles(self, count: int, tile: Tile, blocks: int) -> tuple[int, int]:
        return count * blocks * triton.cdiv(self.plan.width, tile.width), self.plan.heads

    def carry(self, rows: Tensor, enter: Tensor | None, reverse: bool) -> Tensor:
        """States at the beginning of segments (gradients at their end, in reverse), `[segments, H, MP, D]`."""
        plan = self.plan
        shape = (self.segments, plan.heads, plan.padded)
        local = rows.new_empty(*shape, plan.width, dtype=torch.float32)
        decay = rows.new_empty(shape, dtype=torch.float32)
        self._walk_states(rows, reverse, 0, self.segments, enter=enter, summary=(local, decay))
        at = plan.tile("carry")
        packed = plan.layout.packed
        carry_kernel[self._tiles(plan.layout.rows, at, plan.padded // at.states)](
            local, decay, None if packed else enter, plan.heads, plan.states, plan.width, plan.layout.segments,
            MP=plan.padded, BM=at.states, BD=at.width, REVERSE=reverse, HAS_ENTER=enter is not None and not packed,
            num_warps=at.warps,
        )  # fmt: skip
        return local

    def states(
        self, rows: Tensor, reverse: bool, first: int, count: int, out: Tensor, carry: Tensor | None, enter: Tensor | None,
        leave: Tensor | None,
    ) -> None:  # fmt: skip
        """States before each chunk of `count` segments (gradients after it, in reverse) to `out`."""
        self._walk_states(rows, reverse, first, count, out=out, carry=carry, enter=enter, leave=leave)

    def _walk_states(
        self, rows: Tensor, reverse: bool, first: int, count: int, out: Tensor | None = None, carry: Tensor | None = None,
        enter: Tensor | None = None, leave: Tensor | None = None, summary: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        plan = self.plan
        at = plan.tile("states")
        local, decay = (None, None) if summary is None else summary
        states_kernel[self._tiles(count, at, plan.padded // at.states)](
            rows, self.read if reverse else self.write, self.total, enter, leave, carry, out, local, decay, self.table, first,
            plan.heads, plan.states, plan.width, *self.size,
            C=plan.layout.chunk, MP=plan.padded, BM=at.states, BD=at.width, REVERSE=reverse, PACKED=plan.layout.packed,
            SUMMARY=summary is not None, HAS_ENTER=enter is not None, HAS_LEAVE=leave is not None, HAS_CARRY=carry is not None,
            PRECISION=plan.precision, STAGES=at.stages, num_warps=at.warps,
        )  # fmt: skip

    def walk(self, value: Tensor, output: Tensor, initial: Tensor | None, carry: Tensor | None, final: Tensor | None) -> None:
        """Outputs `[B, T, H, D]` and final states, of few states."""
        plan = self.plan
        at = plan.tile("walk")
        walk_kernel[self._tiles(self.segments, at, 1)](
            value, self.read, self.write, self.total, initial, carry, output, final, self.table,
            plan.heads, plan.states, plan.width, *self.size,
            C=plan.layout.chunk, MP=plan.padded, BD=at.width, PACKED=plan.layout.packed, HAS_INITIAL=initial is not None,
            HAS_CARRY=carry is not None, KEEP_FINAL=final is not None, PRECISION=plan.precision, STAGES=at.stages,
            num_warps=at.warps,
        )  # fmt: skip

    def outputs(self, rows: Tensor, states: Tensor, output: Tensor, first_slot: int, slots: int, transposed: bool) -> None:
        """`P v + Q h` of `slots` chunks to `output`, or, `transposed`, `P^T dy + K dh'`."""
        plan = self.plan
        at = plan.tile("outputs")
        outputs_kernel[self._tiles(slots, at, 1)](
            rows, self.write if transposed else self.read, states, output, self.table, first_slot,
            plan.heads, plan.width, *self.size,
            C=plan.layout.chunk, MP=plan.padded, BK=min(at.states, plan.layout.chunk), BD=at.width, PACKED=plan.layout.packed,
            PRECISION=plan.precision, STAGES=at.stages, num_warps=at.warps,
        )  # fmt: skip

    def gradients(
        self, value: Tensor, d_output: Tensor, states: Tensor, d_states: Tensor, d_weights: tuple[Tensor, ...],
        d_value: Tensor, first_slot: int, slots: int,
    ) -> None:  # fmt: skip
        """Gradients of P, Q, K, G and of values, of `slots` chunks."""
        plan = self.plan

        def launch(at: Tile, inner: bool, of_states: bool, of_value: bool) -> None:
            blocks = plan.padded // at.states if of_states else 1
            gradients_kernel[(slots * blocks, plan.heads)](
                value, d_output, states, d_states, self.write, *d_weights, d_value, self.table, first_slot,
                plan.heads, plan.width, *self.size,
                C=plan.layout.chunk, MP=plan.padded, BM=at.states, BD=at.width, INNER=inner, STATES=of_states, VALUE=of_value,
                PACKED=plan.layout.packed, PRECISION=plan.precision, STAGES=at.stages, num_warps=at.warps,
            )  # fmt: skip

        at = plan.tile("gradients")
        if at.states == plan.padded:
            launch(at, True, True, True)
            return
        launch(plan.tile("inner_gradient"), True, False, False)
        launch(at, False, True, False)
        self.outputs(d_output, d_states, d_value, first_slot, slots, transposed=True)

    def slices(self, values: Tensor, buffers: int) -> list[tuple[int, int]]:
        """First segment and number of segments of each slice, so that `buffers` workspaces of states stay small."""
        plan = self.plan
        of_one = plan.layout.segment_chunks * plan.heads * plan.padded * plan.width * self.read.element_size() * buffers
        room = max(WORKSPACE_LEAST, int(WORKSPACE_SHARE * 2 * values.numel() * values.element_size()))
        count = max(1, min(self.segments, room // of_one))
        count = -(-self.segments // -(-self.segments // count))
        return [(first, min(count, self.segments - first)) for first in range(0, self.segments, count)]

    def state_workspace(self, count: int) -> Tensor:
        """States before each chunk of `count` segments, `[slots, H, MP, D]`."""
        plan = self.plan
        return self.read.new_empty(count * plan.layout.segment_chunks, plan.heads, plan.padded, plan.width)

    def weight_gradients(
        self, update: Tensor, merge: Tensor, d_weights: tuple[Tensor, ...], d_update: Tensor, d_merge: Tensor, first_slot: int,
        slots: int,
    ) -> None:  # fmt: skip
        """Gradients of update and merge weights from those of P, Q, K, G of `slots` chunks."""
        inner, read, write, total = (x[:slots] for x in d_weights)
        layout, precision = self.plan.layout, self.plan.precision
        gates_backward(update, merge, layout, (first_slot, slots), inner, read, write, total, d_update, d_merge, precision)

    def weight_workspace(self, count: int) -> tuple[Tensor, ...]:
        """Room for the gradients of P, Q, K and G of `count` segments."""
        chunk, padded = self.plan.layout.chunk, self.plan.padded
        sizes = ((chunk, chunk), (chunk, padded), (chunk, padded), (padded,))
        lead = (count * self.plan.layout.segment_chunks, self.plan.heads)
        return tuple(self.total.new_empty(*lead, *size) for size in sizes)
