"""Steps of one or a few tokens that update the state in place, and their undo: checks arguments and picks a backend.

Shapes: B sequences, S slots of a pooled state, T tokens, H heads, M memory states, K states that a token updates, R that it
merges, D value width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorization_memory.ops.arguments import (
    INDEX_DTYPES,
    check_indices,
    check_places,
    check_state,
    check_weights,
    check_writable,
)
from factorization_memory.ops.memory.backends import MemoryBackend, choose_backend
from factorization_memory.ops.precision import state_dtype


def factorization_memory_step(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    state: Tensor,
    indices: Tensor | None = None,
    merge_indices: Tensor | None = None,
    places: Tensor | None = None,
    undo: Tensor | None = None,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One or a few tokens of the recurrence, for generation; `state` is updated in place. Not differentiable.

    Never synchronizes with a GPU, so it can be captured in a CUDA graph; there the values of `indices`, `merge_indices` and
    `places` are not checked.

    Args:
        update: theta, `[B, H, M]`, or `[B, H, K]` with `indices`; `[B, T, H, M]` (or K) for T consecutive tokens.
        merge: phi, same shape as `update`, or `[B, H, R]` with `merge_indices`.
        value: v, `[B, H, D]`, or `[B, T, H, D]`.
        state: h, `[B, H, M, D]`, contiguous, float32 (float64 for float64 values; bfloat16 with `seed`); a sparse step reads
            and writes K rows of it per token, and reads R more with `merge_indices`.
        indices: integers shaped as `update`, the states that each token updates, distinct per token.
        merge_indices: integers shaped as `merge`, the states that each token merges after its update, distinct per token; None
            means those that it updates. Only with `indices`.
        places: integers `[B]`: distinct slots of the sequences in a pooled `state` `[S, H, M, D]`; -1 marks a padding row
            (output 0). None means slot b for sequence b, S = B.
        undo: receives the rows of `state` that the step overwrites, for `factorization_memory_undo`: `[B, H, K, D]` (M in the
            dense form) or `[B, T, H, K, D]`, in state's dtype, contiguous.
        seed: int64 `[1]` on state's device, for a bfloat16 `state`: seed of its stochastic rounding, to be changed at every
            step; Triton kernels only.
        backend: as in `factorization_memory`; all PyTorch backends share one step, and so do all kernels.

    Returns:
        y `[B, H, D]` (or `[B, T, H, D]`) in value's dtype, and `state`.

    Raises:
        ValueError: as in `factorization_memory`.
    """
    several = value.dim() == 4
    states = check_weights(
        update, merge, value, indices, merge_indices, state.shape[2] if state.dim() == 4 else None, time=several
    )
    sequences = value.shape[0]
    if places is not None:
        check_places(places, sequences, state)
        sequences = state.shape[0] if state.dim() == 4 else sequences
    if seed is None and state.dtype == torch.bfloat16:
        raise ValueError(f"state: got dtype {state.dtype}, takes {state_dtype(value)}, or a bfloat16 one together with seed")
    rounded = state_dtype(value) if seed is None else torch.bfloat16
    check_state(state, "state", (sequences, value.shape[-2], states, value.shape[-1]), value, rounded)
    check_writable(state)
    if not state.is_contiguous():
        raise ValueError(f"state: got strides {state.stride()}, takes a contiguous tensor, as it is updated in place")
    if undo is not None:
        wanted = (*update.shape, value.shape[-1])
        if undo.shape != wanted or undo.dtype != state.dtype or undo.device != state.device or not undo.is_contiguous():
            got = f"{undo.dtype} {tuple(undo.shape)} on {undo.device}, strides {undo.stride()}"
            raise ValueError(f"undo: got {got}, takes a contiguous {state.dtype} {wanted} on {state.device}")
    for name, chosen in (("indices", indices), ("merge_indices", merge_indices)):
        if chosen is not None and not value.is_cuda and not torch.compiler.is_compiling():
            check_indices(chosen, states, name)
    if seed is not None and (seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != state.device):
        got = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
        raise ValueError(f"seed: got {got}, takes int64 (1,) on {state.device}")
    if seed is not None and _choose(backend, value, indices, merge_indices, states).family != "triton":
        raise ValueError("seed: only Triton kernels round stochastically, and they do not run here; use a float32 state")
    y = recurrence_step(update, merge, value, state, indices, merge_indices, places, undo, seed=seed, backend=backend)
    return y, state


def factorization_memory_undo(
    state: Tensor,
    undo: Tensor,
    indices: Tensor | None = None,
    places: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Undoes a step, bit for bit; `state` is updated in place.

    Args:
        state: as `factorization_memory_step` left it.
        undo: `undo` of that step.
        indices: its indices.
        places: its places.
        backend: as in `factorization_memory_step`.

    Returns:
        `state`.

    Raises:
        ValueError: arguments that do not belong to one step.
    """
    if state.dim() != 4 or not state.is_contiguous():
        raise ValueError(f"state: got shape {tuple(state.shape)}, strides {state.stride()}, takes a contiguous [S, H, M, D]")
    (_, heads, states, width), batch = state.shape, undo.shape[0] if undo.dim() else 0
    chosen = states if indices is None else indices.shape[-1]
    shape = (batch, *undo.shape[1:-3], heads, chosen, width)
    if undo.dim() not in (4, 5) or undo.shape != shape or undo.dtype != state.dtype or not undo.is_contiguous():
        takes = "[B, H, K, D] or [B, T, H, K, D] that a step of this state put aside"
        got = f"{undo.dtype} {tuple(undo.shape)}, strides {undo.stride()}"
        more = "" if indices is not None else " (K = M without indices)"
        raise ValueError(f"undo: got {got}, takes the contiguous {takes}, {state.dtype} with H, K, D = {shape[-3:]}{more}")
    if undo.device != state.device:
        raise ValueError(f"undo: is on {undo.device}, state on {state.device}; move them to one device")
    if indices is not None and (
        indices.shape != undo.shape[:-1] or indices.dtype not in INDEX_DTYPES or indices.device != state.device
    ):
        got = f"{indices.dtype} {tuple(indices.shape)} on {indices.device}"
        raise ValueError(f"indices: got {got}, takes the step's, integers {tuple(undo.shape[:-1])} on {state.device}")
    if places is not None:
        check_places(places, batch, state)
    elif batch != state.shape[0]:
        raise ValueError(f"undo: got {batch} sequences, takes those of state, {state.shape[0]}, or the step's places")
    rows = undo if undo.dim() == 5 else undo[:, None]
    chosen_states = None if indices is None else indices.reshape(rows.shape[:-1])[None]
    recurrence_undo(state, rows[None], chosen_states, places, state.new_zeros(1, dtype=torch.int64), 1, backend)
    return state


def _choose(
    backend: str, value: Tensor, indices: Tensor | None, merge_indices: Tensor | None, num_states: int
) -> MemoryBackend:
    return choose_backend(backend, value, indices, merge_indices, num_states, alone=False, packed=False)


@torch.no_grad()
def recurrence_step(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    state: Tensor,
    indices: Tensor | None,
    merge_indices: Tensor | None = None,
    places: Tensor | None = None,
    undo: Tensor | None = None,
    position: Tensor | None = None,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`factorization_memory_step` on checked arguments; returns y.

    With `position`, int64 `[1]`, `undo` is a ring `[depth, ...]`, and entry `position` is written.
    """
    one = value.dim() == 3
    if undo is not None and position is None:
        undo, position = undo[None], torch.zeros(1, dtype=torch.int64, device=state.device)
    if one:
        update, merge, value = (x[:, None] for x in (update, merge, value))
        indices, merge_indices = (None if x is None else x[:, None] for x in (indices, merge_indices))
        undo = None if undo is None else undo[:, :, None]
    chosen = _choose(backend, value, indices, merge_indices, state.shape[2])
    y = chosen.step(update, merge, value, indices, merge_indices, state, places, undo, position, seed)
    return y[:, 0] if one else y


@torch.no_grad()
def recurrence_undo(
    state: Tensor,
    undo: Tensor,
    indices: Tensor | None,
    places: Tensor | None,
    position: Tensor,
    count: int,
    backend: str = "auto",
) -> None:
    """Undoes the last `count` steps recorded in the ring `undo` `[depth, B, T, H, K, D]`, with their `indices`
    `[depth, B, T, H, K]`; `position` `[1]` is the ring entry of the next step."""
    values = state.new_empty(0, dtype=torch.float32)  # rows are copied unchanged, so kernels accept any dtype
    _choose(backend, values, indices, None, state.shape[2]).undo(state, undo, indices, places, position, count)
