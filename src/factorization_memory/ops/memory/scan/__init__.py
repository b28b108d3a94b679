"""The sparse recurrence on a CPU, token by token in compiled loops: the operators `factorization_memory::scan`,
`factorization_memory::scan_backward` and `factorization_memory::scan_step`.

A token touches K + R rows of the state, whatever M is: a few hundred vector instructions, where the chunked form pays for all
M states. Forward saves the state every `interval` tokens, and backward recomputes the tokens in between, so that memory grows
with T (K + R + D).

Numba is imported, and compiles, at the first call.

Shapes: B sequences, T tokens, H heads, M memory states, K states that a token updates, R that it merges, D value width of a
head, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorization_memory.ops.arguments import read_borders
from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.precision import state_dtype

BLOCK_WIDTH = 256
"""Most columns of a block: with 256 states of float32, 256 KiB. It depends on D alone, so that results do not depend on the
number of threads."""
MIN_INTERVAL, MAX_INTERVAL = 64, 512
"""Tokens from one snapshot to the next: M / 2 within these bounds, so that snapshots take twice the memory of the values."""
_NOTHING = (0, 0, 0, 0)
SMALL = 1 << 18
"""Rows times columns that a call touches below which threads cost more than they save."""


def interval(num_states: int) -> int:
    """Tokens from one snapshot to the next."""
    return min(max(num_states // 2, MIN_INTERVAL), MAX_INTERVAL)


def forward(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor | None,
    num_states: int,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The sparse recurrence over whole sequences; arguments and results are those of `factorization_memory`."""
    leaves = (update, merge, value, initial_state)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    output, final, _ = torch.ops.factorization_memory.scan.default(
        update,
        merge,
        value,
        indices,
        indices if merge_indices is None else merge_indices,
        initial_state,
        cu_seqlens,
        num_states,
        output_final_state,
        differentiable,
    )
    return output, final if output_final_state else None


def step(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor | None,
    state: Tensor,
    places: Tensor | None,
    undo: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    """A few tokens of each sequence, `state` updated in place: see `reference.steps`; y has value's dtype."""
    merged = indices if merge_indices is None else merge_indices
    # An operator costs more than the step of one sequence.
    run = torch.ops.factorization_memory.scan_step.default if torch.compiler.is_compiling() else _step
    return run(update, merge, value, indices, merged, state, places, undo, position)


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
    theta, phi, v = (_array(x, dtype) for x in (update, merge, value))
    updated, merged = (_selection(x, num_states) for x in (indices, merge_indices))
    sequences = _sequences(value, cu_seqlens, num_states)
    output = value.new_empty(value.shape, dtype=dtype)
    shape = (len(sequences), value.shape[2], num_states, value.shape[3])
    final = value.new_empty(shape if keep_final else _NOTHING, dtype=dtype)
    snapshots = value.new_empty(_snapshots(value, cu_seqlens, num_states) if keep_snapshots else _NOTHING, dtype=dtype)
    start, y, end, kept = (_array(x, dtype) for x in (initial, output, final, snapshots))
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

    _share_out(run, sequences, value, updated.shape[3] + merged.shape[3])
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

    if not snapshots.numel():
        *_, snapshots = _scan(
            update, merge, value, indices, merge_indices, initial, cu_seqlens, num_states, keep_final=False, keep_snapshots=True
        )
    dtype = state_dtype(value)
    d_y, theta, phi, v = (_array(x, dtype) for x in (d_output, update, merge, value))
    updated, merged = (_selection(x, num_states) for x in (indices, merge_indices))
    sequences = _sequences(value, cu_seqlens, num_states)
    blocks = len(_blocks(value.shape[3]))
    d_theta, d_phi = (value.new_empty(blocks, *x.shape, dtype=dtype) for x in (update, merge))
    d_v = value.new_empty(value.shape, dtype=dtype)
    d_initial = value.new_empty(_NOTHING if initial is None else initial.shape, dtype=dtype)
    d_end, kept, d_weights, d_merges, d_values, d_start = (
        _array(x, dtype) for x in (d_final, snapshots, d_theta, d_phi, d_v, d_initial)
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
            kept,
            interval(num_states),
            d_weights[block],
            d_merges[block],
            d_values,
            d_start,
            initial is not None,
            lanes,
            columns,
        )

    _share_out(run, sequences, value, 4 * (updated.shape[3] + merged.shape[3]))
    d_update, d_merge = (x[0] if blocks == 1 else x.sum(0) for x in (d_theta, d_phi))
    d_initial = d_initial if initial is None else d_initial.to(initial.dtype)
    return d_update.to(update.dtype), d_merge.to(merge.dtype), d_v.to(value.dtype), d_initial


def _step(
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
    from factorization_memory.ops.memory.scan import kernels

    theta, phi, v = (_array(x, state.dtype) for x in (update, merge, value))
    updated, merged = (_selection(x, state.shape[2]) for x in (indices, merge_indices))
    output = np.empty(v.shape, v.dtype)
    slots = np.arange(len(v)) if places is None else places.numpy()
    if undo is None or position is None:
        ring, entry = np.empty((0, 0, 0, 0, 0, 0), v.dtype), -1
    else:
        ring, entry = undo.numpy(), int(position)
    kernels.step(theta, phi, v, updated, merged, state.numpy(), slots, ring, entry, output)
    return torch.from_numpy(output).to(value.dtype)


def _array(x: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """The tensor as a contiguous array, sharing its memory if it has this dtype; an empty one for None."""
    x = torch.empty(_NOTHING, dtype=dtype) if x is None else x
    return x.detach().to(dtype).contiguous().numpy()


def _selection(indices: Tensor, num_states: int) -> np.ndarray:
    """Indices as an array. Raises ValueError where one is out of range: the compiled loops do not check."""
    selected = indices.to(torch.int32).contiguous().numpy()
    if selected.size and not (selected.min() >= 0 and selected.max() < num_states):
        raise ValueError(f"indices: got {selected.min()} to {selected.max()}, takes 0 to num_states - 1 = {num_states - 1}")
    return selected


def _sequences(value: Tensor, cu_seqlens: Tensor | None, num_states: int) -> np.ndarray:
    """Row, first token and end of each sequence, and its first snapshot, int64 `[N, 4]`."""
    batch, length = value.shape[:2]
    if cu_seqlens is None:
        parts = [(row, 0, length) for row in range(batch)]
    else:
        parts = [(0, start, end) for start, end in pairwise(read_borders(cu_seqlens))]
    counts = (-(-(end - start) // interval(num_states)) for _, start, end in parts)
    return np.array(
        [(*part, first) for part, first in zip(parts, accumulate(counts, initial=0), strict=False)], dtype=np.int64
    ).reshape(-1, 4)


def _snapshots(value: Tensor, cu_seqlens: Tensor | None, num_states: int) -> tuple[Any, ...]:
    """Shape of the snapshots; of packed sequences, whose lengths a compiler does not know, room for as many as there can be."""
    batch, length, heads, width = value.shape
    every = interval(num_states)
    count = batch * ((length + every - 1) // every) if cu_seqlens is None else length // every + cu_seqlens.shape[0] - 1
    return count, heads, num_states, width


def _blocks(width: int) -> list[tuple[int, int]]:
    """First column and end of each block, of nearly equal widths."""
    count = -(-width // BLOCK_WIDTH)
    return list(pairwise(width * block // count for block in range(count + 1))) if count else []


def _share_out(run: Callable[..., None], sequences: np.ndarray, value: Tensor, rows: int) -> None:
    """Calls `run(lanes, block, columns)` for every lane and block, in as many threads as PyTorch uses.

    Args:
        sequences: see `_sequences`.
        value: v, `[B, T, H, D]`.
        rows: rows of the state that a token touches.
    """
    lanes, blocks = len(sequences) * value.shape[2], list(enumerate(_blocks(value.shape[3])))
    threads = torch.get_num_threads() if value.numel() * rows >= SMALL else 1
    if threads == 1:
        for block, columns in blocks:
            run((0, lanes), block, columns)
        return
    cuts = sorted({lanes * part // (4 * threads) for part in range(4 * threads + 1)})
    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(run, part, block, columns) for part in pairwise(cuts) for block, columns in blocks]
    for task in tasks:
        task.result()


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
    final = value.new_empty(shape if keep_final else _NOTHING, dtype=dtype)
    snapshots = value.new_empty(_snapshots(value, cu_seqlens, num_states) if keep_snapshots else _NOTHING, dtype=dtype)
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
    return d_update, d_merge, d_value, value.new_empty(_NOTHING) if initial is None else initial.new_empty(initial.shape)


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
torch.library.impl("factorization_memory::scan_step", "cpu", _step)
torch.library.register_fake("factorization_memory::scan", _fake_scan)
torch.library.register_fake("factorization_memory::scan_backward", _fake_scan_backward)
torch.library.register_fake("factorization_memory::scan_step", lambda update, merge, value, *more: value.new_empty(value.shape))
torch.library.register_autograd("factorization_memory::scan", _gradients, setup_context=_setup_context)
