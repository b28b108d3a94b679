"""The operators `factorization_memory::scan`, `factorization_memory::scan_backward` and `factorization_memory::scan_step`.

Shapes: as in `layout`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorization_memory.ops.autograd import once_differentiable, written
from factorization_memory.ops.memory.scan.layout import (
    NOTHING,
    as_array,
    blocks_of,
    interval,
    selection,
    sequences_of,
    share_out,
    slots_of,
    snapshot_shape,
    snapshots_needed,
)
from factorization_memory.ops.precision import state_dtype


def _scan(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    num_states: int,
    keep_final: bool,
    keep_snapshots: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y `[B, T, H, D]`; the final states `[N, H, M, D]`, and the snapshots `[.., H, M, D]`, each empty unless asked for."""
    from factorization_memory.ops.memory.scan import kernels

    dtype = state_dtype(value)
    theta, phi, v = (as_array(x, dtype) for x in (update, merge, value))
    updated, merged = (selection(x, num_states) for x in (indices, merge_indices))
    sequences = sequences_of(value, cu_seqlens, num_states)
    output = value.new_empty(value.shape, dtype=dtype)
    shape = (len(sequences), value.shape[2], num_states, value.shape[3])
    final = value.new_empty(shape if keep_final else NOTHING, dtype=dtype)
    snapshots = value.new_empty(snapshot_shape(value, num_states) if keep_snapshots else NOTHING, dtype=dtype)
    start, y, end, kept = (as_array(x, dtype) for x in (initial, output, final, snapshots))
    every = interval(num_states) if keep_snapshots else 0

    def run(lanes: tuple[int, int], block: int, columns: tuple[int, int]) -> None:
        kernels.forward(
            theta,
            phi,
            v,
            updated,
            merged,
            sequences,
            start,
            initial is not None,
            y,
            end,
            keep_final,
            kept,
            every,
            num_states,
            lanes,
            columns,
        )

    share_out(run, sequences, value, updated.shape[3] + merged.shape[3])
    return output.to(value.dtype), final, snapshots


def _scan_backward(
    d_output: Tensor,
    d_final: Tensor | None,
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    num_states: int,
    snapshots: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of update, merge, value and the initial states (empty without), given those of y and of the final states (None
    means zero)."""
    from factorization_memory.ops.memory.scan import kernels

    sequences = sequences_of(value, cu_seqlens, num_states)
    if len(snapshots) < snapshots_needed(sequences, num_states):
        *_, snapshots = _scan(
            update, merge, value, indices, merge_indices, initial, cu_seqlens, num_states, keep_final=False, keep_snapshots=True
        )
    dtype = state_dtype(value)
    d_y, theta, phi, v = (as_array(x, dtype) for x in (d_output, update, merge, value))
    updated, merged = (selection(x, num_states) for x in (indices, merge_indices))
    blocks = len(blocks_of(value.shape[3]))
    d_theta, d_phi = (value.new_empty(blocks, *x.shape, dtype=dtype) for x in (update, merge))
    d_v = value.new_empty(value.shape, dtype=dtype)
    d_initial = value.new_empty(NOTHING if initial is None else initial.shape, dtype=dtype)
    start, d_end, kept, d_weights, d_merges, d_values, d_start = (
        as_array(x, dtype) for x in (initial, d_final, snapshots, d_theta, d_phi, d_v, d_initial)
    )

    def run(lanes: tuple[int, int], block: int, columns: tuple[int, int]) -> None:
        kernels.backward(
            d_y,
            d_end,
            d_final is not None,
            theta,
            phi,
            v,
            updated,
            merged,
            sequences,
            start,
            initial is not None,
            kept,
            interval(num_states),
            num_states,
            d_weights[block],
            d_merges[block],
            d_values,
            d_start,
            lanes,
            columns,
        )

    share_out(run, sequences, value, 4 * (updated.shape[3] + merged.shape[3]))
    d_update, d_merge = (x[0] if blocks == 1 else x.sum(0) for x in (d_theta, d_phi))
    d_initial = d_initial if initial is None else d_initial.to(initial.dtype)
    return d_update.to(update.dtype), d_merge.to(merge.dtype), d_v.to(value.dtype), d_initial


def step(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor,
    state: Tensor,
    places: Tensor | None,
    undo: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    """A few tokens of each sequence, `state` updated in place: see `reference.steps`; y has value's dtype."""
    from factorization_memory.ops.memory.scan import kernels

    theta, phi, v = (as_array(x, state.dtype) for x in (update, merge, value))
    updated, merged = (selection(x, state.shape[2]) for x in (indices, merge_indices))
    if state.shape[1:2] + state.shape[3:] != value.shape[2:]:
        raise ValueError(f"state: got {tuple(state.shape)}, which does not fit values {tuple(value.shape)}")
    output, slots = np.empty(v.shape, v.dtype), slots_of(places, len(v), len(state))
    if undo is None or position is None:
        ring, entry = np.empty((0, 0, 0, 0, 0, 0), v.dtype), -1
    else:
        ring, entry = undo.detach().numpy(), int(position)
        if not 0 <= entry < len(undo) or undo.shape[1:] != (*update.shape, value.shape[3]):
            raise ValueError(
                f"undo: got {tuple(undo.shape)} and position {entry}, takes [depth, B, T, H, K, D] and an entry of it"
            )
    kernels.step(theta, phi, v, updated, merged, state.detach().numpy(), slots, ring, entry, output)
    written(*(x for x in (state, undo) if x is not None))
    return torch.from_numpy(output).to(value.dtype)


def _fake_scan(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    num_states: int,
    keep_final: bool,
    keep_snapshots: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(value)
    sequences = value.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, value.shape[2], num_states, value.shape[3])
    final = value.new_empty(shape if keep_final else NOTHING, dtype=dtype)
    snapshots = value.new_empty(snapshot_shape(value, num_states) if keep_snapshots else NOTHING, dtype=dtype)
    return value.new_empty(value.shape), final, snapshots


def _fake_scan_backward(
    d_output: Tensor,
    d_final: Tensor | None,
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    num_states: int,
    snapshots: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_update, d_merge, d_value = (x.new_empty(x.shape) for x in (update, merge, value))
    return (
        d_update,
        d_merge,
        d_value,
        value.new_empty(NOTHING, dtype=state_dtype(value)) if initial is None else initial.new_empty(initial.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.num_states, ctx.keep_final, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    update, merge, value, indices, merge_indices, initial, cu_seqlens, snapshots = ctx.saved_tensors
    d_output = torch.zeros_like(value) if d_output is None else d_output
    *found, d_initial = torch.ops.factorization_memory.scan_backward.default(
        d_output,
        d_final if ctx.keep_final else None,
        update,
        merge,
        value,
        indices,
        merge_indices,
        initial,
        cu_seqlens,
        ctx.num_states,
        snapshots,
    )
    return *found, None, None, None if initial is None else d_initial, None, None, None, None


_SHARED = (
    "Tensor update, Tensor merge, Tensor value, Tensor indices, Tensor merge_indices, Tensor? initial, Tensor? cu_seqlens,"
    " int num_states"
)
torch.library.define(
    "factorization_memory::scan", f"({_SHARED}, bool keep_final, bool keep_snapshots) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "factorization_memory::scan_backward",
    f"(Tensor d_output, Tensor? d_final, {_SHARED}, Tensor snapshots) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "factorization_memory::scan_step",
    "(Tensor update, Tensor merge, Tensor value, Tensor indices, Tensor merge_indices, Tensor(a!) state, Tensor? places,"
    " Tensor(b!)? undo, Tensor? position) -> Tensor",
)
torch.library.impl("factorization_memory::scan", "cpu", _scan)
torch.library.impl("factorization_memory::scan_backward", "cpu", _scan_backward)
torch.library.impl("factorization_memory::scan_step", "cpu", step)
torch.library.register_fake("factorization_memory::scan", _fake_scan)
torch.library.register_fake("factorization_memory::scan_backward", _fake_scan_backward)
torch.library.register_fake("factorization_memory::scan_step", lambda update, merge, value, *more: value.new_empty(value.shape))
torch.library.register_autograd("factorization_memory::scan", _gradients, setup_context=_setup_context)
