"""The dense recurrence on a GPU: the operators `factorization_memory::dense` and `factorization_memory::dense_backward`.

Forward: weights of each chunk (`gates`), then outputs and states. With few states a program holds all of them for a block of
columns and walks through time (`walk_kernel`); with many, states at chunk borders go through memory (`states_kernel`,
`outputs_kernel`), a slice of the segments at a time, so that the workspace stays small compared with values and outputs. If a
row is cut into several segments, because batch and width alone cannot fill the GPU or its states would fill memory, the
initial states of the segments are computed first.

The inputs, those states and, if small, the weights are saved for backward, which recomputes the rest slice by slice.

Shapes: B sequences, T tokens, H heads, M memory states, D value width per head, N packed sequences; C tokens per chunk, MP
padded number of states, S slots (see `layout`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.memory.kernels.launch import Call
from factorization_memory.ops.memory.kernels.layout import chunk_table
from factorization_memory.ops.memory.kernels.plan import Plan, operands, plan
from factorization_memory.ops.runtime import on_device_of


def _planned(update: Tensor, value: Tensor, cu_seqlens: Tensor | None, backward: bool) -> Plan:
    made = plan(update, value, cu_seqlens, backward)
    if cu_seqlens is None:
        return made
    table = chunk_table(cu_seqlens.to(value.device), update.shape[1], made.layout.chunk)
    return replace(made, layout=replace(made.layout, table=table))


def _operand_dtype(value: Tensor) -> torch.dtype:
    return operands(value.dtype, exact=True)[0]


def _state_shape(value: Tensor, states: int, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    sequences = value.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, value.shape[2], states, value.shape[3]


def _standing(initial: Tensor | None, value: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Allocates the final states; that of an empty sequence is its initial state."""
    if initial is None:
        return value.new_zeros(shape, dtype=torch.float32)
    return initial.to(torch.float32, copy=True).contiguous()


@on_device_of
def _dense(
    update: Tensor, merge: Tensor, value: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, keep_final: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The recurrence.

    Args:
        update: theta, `[B, T, H, M]`.
        merge: phi, same shape.
        value: v, `[B, T, H, D]`, bfloat16, float16 or float32.
        initial: h_0, `[N, H, M, D]` float32; None means zeros.
        cu_seqlens: `[N + 1]` integers, borders of packed sequences (B = 1), or None.
        keep_final: whether to return final states.

    Returns:
        y `[B, T, H, D]`; final states `[N, H, M, D]` float32, empty unless requested; and for backward, each empty if
        recomputed there: the initial states of segments, and the weights of chunks (P and Q, P^T and K, G).
    """
    update, merge = update.contiguous(), merge.contiguous()
    rows = value.contiguous().to(_operand_dtype(value))
    initial = None if initial is None else initial.contiguous()
    output = torch.empty_like(rows)
    shape = _state_shape(value, update.shape[3], cu_seqlens)
    final = _standing(initial, value, shape) if keep_final else None
    carry: Tensor | None = None
    weights: tuple[Tensor | None, ...] = (None, None, None)
    if value.numel() > 0:
        made = _planned(update, value, cu_seqlens, backward=False)
        call = Call(made, update, merge)
        weights = call.weights if made.keeps_weights else weights
        begins = call.carry(rows, initial, reverse=False) if made.carried else None
        if made.resident:
            call.walk(rows, output, initial, begins, final)
        else:
            slots = made.layout.segment_chunks
            slices = call.slices(rows, 1)
            states = call.state_workspace(slices[0][1])
            for first, count in slices:
                call.states(rows, False, first, count, states, begins, initial, final)
                call.outputs(rows, states, output, first * slots, count * slots, transposed=False)
        carry = None if made.layout.packed else begins
    wide, narrow = torch.float32, _operand_dtype(value)
    results = zip((final, carry, *weights), (wide, wide, narrow, narrow, wide), strict=True)
    final, *kept = (value.new_empty(0, dtype=dtype) if x is None else x for x, dtype in results)
    # Flattened, as their shapes depend on the plan: `_dense_backward` makes the same plan.
    return output.to(value.dtype), final, *(x.flatten() for x in kept)  # type: ignore[return-value]


def _fake_dense(
    update: Tensor, merge: Tensor, value: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, keep_final: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float32
    final = value.new_empty(_state_shape(value, update.shape[3], cu_seqlens) if keep_final else 0, dtype=wide)
    output = torch.empty_like(value, memory_format=torch.contiguous_format)
    sizes = (*update.shape, *value.shape, 0 if cu_seqlens is None else cu_seqlens.shape[0])
    if any(isinstance(size, torch.SymInt) for size in sizes):
        # One graph for any length: the sizes of saved tensors are known only at run time.
        kept = operands(value.dtype, exact=True)[0]
        some = (value.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=d) for d in (wide, kept, kept, wide))
        return output, final, *some  # type: ignore[return-value]
    carry, read, write, total = (value.new_empty(0, dtype=wide) for _ in range(4))
    if value.numel() > 0:
        made = plan(update, value, cu_seqlens, backward=False)
        if made.carried and cu_seqlens is None:
            carry = value.new_empty(len(value) * made.layout.segments * made.heads * made.padded * made.width, dtype=wide)
        if made.keeps_weights:
            chunk, units = made.layout.chunk, made.layout.slots * made.heads
            read, write = (value.new_empty(units * chunk * (chunk + made.padded), dtype=made.dtype) for _ in range(2))
            total = value.new_empty(units * made.padded, dtype=wide)
    return output, final, carry, read, write, total


@on_device_of
def _dense_backward(
    d_output: Tensor,
    d_final: Tensor | None,
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    carry: Tensor,
    read: Tensor,
    write: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of update, merge, value and initial states (empty without), given those of the outputs `[B, T, H, D]` and
    final states `[N, H, M, D]` (None means zero), and the arguments and last four results of `dense`."""
    update, merge = update.contiguous(), merge.contiguous()
    rows, d_rows = (x.contiguous().to(_operand_dtype(value)) for x in (value, d_output))
    initial = None if initial is None else initial.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    fill = torch.empty_like if value.numel() > 0 else torch.zeros_like
    d_update, d_merge, d_value = fill(update), fill(merge), fill(rows)
    shape = _state_shape(value, update.shape[3], cu_seqlens)
    d_initial = None if initial is None else _standing(d_final, value, shape)
    if value.numel() > 0:
        made = _planned(update, value, cu_seqlens, backward=True)
        layout = made.layout
        weights = None
        if made.keeps_weights:
            lead, chunk = (layout.slots, made.heads), layout.chunk
            read, write = (x.view(*lead, chunk, chunk + made.padded) for x in (read, write))
            weights = read, write, total.view(*lead, made.padded)
        call = Call(made, update, merge, weights)
        begins = None
        if made.carried:
            # Chunks of packed sequences, and so their segments, differ from the forward pass.
            size = call.segments * made.heads * made.padded * made.width
            known = not layout.packed and len(carry) == size
            begins = None if not known else carry.view(call.segments, made.heads, made.padded, made.width)
            begins = call.carry(rows, initial, reverse=False) if begins is None else begins
        ends = call.carry(d_rows, d_final, reverse=True) if made.carried else None
        slices = call.slices(rows, 2)
        states, d_states = call.state_workspace(slices[0][1]), call.state_workspace(slices[0][1])
        d_weights = call.weight_workspace(slices[0][1])
        d_inner = call.inner_gradient(rows, d_rows)
        for first, count in slices:
            call.states(rows, False, first, count, states, begins, initial, None)
            call.states(d_rows, True, first, count, d_states, ends, d_final, d_initial)
            first_slot, slots = first * layout.segment_chunks, count * layout.segment_chunks
            call.gradients(rows, d_rows, states, d_states, d_weights, d_value, first_slot, slots)
            call.weight_gradients(update, merge, d_inner, d_weights, d_update, d_merge, first_slot, slots)
    if d_initial is None:
        d_initial = value.new_empty(0, dtype=torch.float32)
    return d_update, d_merge, d_value.to(value.dtype), d_initial


def _fake_dense_backward(
    d_output: Tensor,
    d_final: Tensor | None,
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    carry: Tensor,
    read: Tensor,
    write: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (update, merge, value)]
    empty = value.new_empty(0 if initial is None else initial.shape, dtype=torch.float32)
    return like[0], like[1], like[2], empty


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    update, merge, value, initial, cu_seqlens, keep_final = inputs
    ctx.save_for_backward(update, merge, value, initial, cu_seqlens, *output[2:])
    ctx.keep_final = keep_final
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    update, merge, value, initial, cu_seqlens, *kept = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(value)
    d_final = d_final if ctx.keep_final else None
    d_update, d_merge, d_value, d_initial = torch.ops.factorization_memory.dense_backward.default(
        d_output, d_final, update, merge, value, initial, cu_seqlens, *kept
    )
    return d_update, d_merge, d_value, None if initial is None else d_initial.to(initial.dtype), None, None


# By hand: `torch.library.custom_op` adds a wrapper around every call.
torch.library.define(
    "factorization_memory::dense",
    "(Tensor update, Tensor merge, Tensor value, Tensor? initial, Tensor? cu_seqlens, bool keep_final)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "factorization_memory::dense_backward",
    "(Tensor d_output, Tensor? d_final, Tensor update, Tensor merge, Tensor value, Tensor? initial, Tensor? cu_seqlens,"
    " Tensor carry, Tensor read, Tensor write, Tensor total) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("factorization_memory::dense", ("cpu", "cuda"), _dense)
torch.library.impl("factorization_memory::dense_backward", ("cpu", "cuda"), _dense_backward)
torch.library.register_fake("factorization_memory::dense", _fake_dense)
torch.library.register_fake("factorization_memory::dense_backward", _fake_dense_backward)
torch.library.register_autograd("factorization_memory::dense", _backward, setup_context=_setup_context)

dense = torch.ops.factorization_memory.dense.default
"""The operator; see `_dense` for its arguments and results."""
