"""The backends of the recurrence: over whole sequences, and steps that update the state in place and undo them.

Shapes: B sequences, T tokens, H heads, M memory states, K states that a token updates, R that it merges, D value width of a
head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from factorization_memory.ops import runtime
from factorization_memory.ops.arguments import read_borders
from factorization_memory.ops.memory import chunked, kernels, reference, scan
from factorization_memory.ops.precision import no_autocast, state_dtype
from factorization_memory.ops.runtime.backends import Backend, backend_names, choose


@dataclass(frozen=True, kw_only=True)
class MemoryBackend(Backend):
    """A backend of the recurrence. `forward` accepts all arguments of `factorization_memory` but the last.

    Attributes:
        step: like `reference.steps`, with a seed or None as last argument.
        undo: like `reference.undo`.
        needs_indices: whether it computes the sparse form alone.
    """

    step: Callable[..., Tensor]
    undo: Callable[..., None]
    needs_indices: bool = False


def choose_backend(
    name: str, value: Tensor, indices: Tensor | None, merge_indices: Tensor | None, num_states: int, alone: bool, packed: bool
) -> MemoryBackend:
    """The backend of that name; for "auto" and "triton" the fastest, see `choose`.

    Args:
        name: one of `BACKEND_NAMES`.
        value, indices, merge_indices, num_states: as in `factorization_memory`.
        alone: whether there is neither an initial state nor a requested final state.
        packed: whether sequences are packed.
    """
    return choose(BACKENDS, name, value, touched_states(indices, merge_indices, num_states), num_states, alone, packed)


def touched_states(indices: Tensor | None, merge_indices: Tensor | None, num_states: int) -> int:
    """Upper bound on the states that a token updates or merges; 0 in the dense form."""
    if indices is None:
        return 0
    return min(indices.shape[-1] + (0 if merge_indices is None else merge_indices.shape[-1]), num_states)


def over_states(weights: Tensor, indices: Tensor | None, num_states: int) -> Tensor:
    """Scatters weights of selected states `[..., K]` to all M, `[..., M]`, zero elsewhere; unchanged without indices."""
    if indices is None:
        return weights
    return weights.new_zeros(*weights.shape[:-1], num_states).scatter(-1, indices.long(), weights)


def _whole_reference(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor | None,
    merge_indices: Tensor | None,
    num_states: int,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    borders = None if cu_seqlens is None else read_borders(cu_seqlens)
    batch, _, heads, width = value.shape
    sequences = batch if borders is None else len(borders) - 1
    dtype = state_dtype(value)
    if initial_state is None:
        initial_state = value.new_zeros(sequences, heads, num_states, width, dtype=dtype)
    initial_state = initial_state.to(dtype)
    indices, merge_indices = (None if x is None else x.long() for x in (indices, merge_indices))
    with no_autocast(value.device):
        if borders is None:
            output, state = reference.forward(update, merge, value, indices, merge_indices, initial_state)
        else:
            parts = []
            for n in range(sequences):
                part = slice(borders[n], borders[n + 1])
                chosen, read = (None if x is None else x[:, part] for x in (indices, merge_indices))
                start = initial_state[n : n + 1]
                parts.append(reference.forward(update[:, part], merge[:, part], value[:, part], chosen, read, start))
            output, state = torch.cat([y for y, _ in parts], dim=1), torch.cat([h for _, h in parts])
    return output.to(value.dtype), (state if output_final_state else None)


def _dense(form: ModuleType) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`forward` of a dense implementation: scatters the weights over all states first."""

    def forward(
        update: Tensor,
        merge: Tensor,
        value: Tensor,
        indices: Tensor | None,
        merge_indices: Tensor | None,
        num_states: int,
        *more: Any,
    ) -> Any:
        merge = over_states(merge, indices if merge_indices is None else merge_indices, num_states)
        update = over_states(update, indices, num_states)
        return form.forward(update, merge, value, *more)

    return forward


def _sparse(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor | None,
    num_states: int,
    *more: Any,
) -> tuple[Tensor, Tensor | None]:
    if merge_indices is not None:
        update, merge, indices = _one_selection(update, merge, indices, merge_indices, num_states)
    return kernels.forward_sparse(update, merge, value, indices, num_states, *more)


def _one_selection(
    update: Tensor, merge: Tensor, indices: Tensor, merge_indices: Tensor, num_states: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Update and merge weights over the union of both selections, filled up to `touched_states` states with the lowest other
    indices."""
    update, merge = over_states(update, indices, num_states), over_states(merge, merge_indices, num_states)
    touched = torch.zeros_like(update, dtype=torch.bool)
    touched = touched.scatter(-1, indices.long(), True).scatter(-1, merge_indices.long(), True)
    keys = touched * num_states - torch.arange(num_states, device=update.device)
    union = keys.topk(touched_states(indices, merge_indices, num_states), dim=-1).indices
    return update.gather(-1, union), merge.gather(-1, union), union


def _step_reference(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor | None,
    merge_indices: Tensor | None,
    state: Tensor,
    places: Tensor | None,
    undo: Tensor | None,
    position: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    assert seed is None, "see factorization_memory_step"
    with no_autocast(value.device):
        y = reference.steps(update, merge, value, indices, merge_indices, state, places, undo, position)
        return y.to(value.dtype)


def _step_scan(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor | None,
    state: Tensor,
    places: Tensor | None,
    undo: Tensor | None,
    position: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    assert seed is None, "see factorization_memory_step"
    return scan.step(update, merge, value, indices, merge_indices, state, places, undo, position)


def _why_no_scan(value: Tensor, touched: int, *_: object) -> str | None:
    if not touched:
        return NEEDS_INDICES
    return runtime.why_no_numba(value)


def _scan_pays(value: Tensor, touched: int, num_states: int, *_: object) -> bool:
    return value.device.type == "cpu" and 0 < touched <= num_states * SCAN_SHARE and runtime.why_no_numba(value) is None


def _no_kernels(value: Tensor, *_: object) -> str | None:
    return runtime.why_unsupported(value)


def _no_sparse_kernels(value: Tensor, touched: int, *_: object) -> str | None:
    if not touched:
        return NEEDS_INDICES
    return runtime.why_unsupported(value)


def _sparse_pays(value: Tensor, touched: int, num_states: int, alone: bool, packed: bool) -> bool:
    return alone and not packed and touched > 0 and kernels.sparse_pays(value, touched, num_states)


NEEDS_INDICES = "it computes selected states alone, and there are no indices (top_k, in a model)"
SCAN_SHARE = 0.5
"""Largest share of the states that a token touches at which `scan` was measured to beat the chunked form."""
BACKENDS = (
    MemoryBackend(
        "numba",
        scan.forward,
        why_unsupported=_why_no_scan,
        pays=_scan_pays,
        step=_step_scan,
        undo=reference.undo,
        needs_indices=True,
    ),
    MemoryBackend(
        "triton-sparse",
        _sparse,
        "triton",
        needs_gpu=True,
        why_unsupported=_no_sparse_kernels,
        pays=_sparse_pays,
        step=kernels.step_in_place,
        undo=kernels.undo_in_place,
        needs_indices=True,
    ),
    MemoryBackend(
        "triton-dense",
        _dense(kernels),
        "triton",
        needs_gpu=True,
        why_unsupported=_no_kernels,
        step=kernels.step_in_place,
        undo=kernels.undo_in_place,
    ),
    MemoryBackend("chunked", _dense(chunked), step=_step_reference, undo=reference.undo),
    MemoryBackend("reference", _whole_reference, step=_step_reference, undo=reference.undo),
)
"""Fastest first."""
BACKEND_NAMES = backend_names(BACKENDS)
