"""The recurrence of Factorization Memory as functions of tensors: arguments are checked here, and a backend is chosen.

For each token t, head and memory state j, with update weight theta, merge weight phi and value v:

    h_tj = (1 - theta_tj) h_{t-1,j} + theta_tj v_t        y_t = sum_j phi_tj h_tj

The states that a token updates and those that it merges may be other ones: `indices` and `merge_indices`.

Shapes: B sequences, T tokens, H heads, M memory states, K states that a token updates, R that it merges, D value width of a
head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorization_memory.ops import chunked, reference, triton
from factorization_memory.ops.arguments import (
    INDEX_DTYPES,
    check_borders,
    check_indices,
    check_places,
    check_state,
    check_weights,
    check_writable,
    read_borders,
)
from factorization_memory.ops.precision import no_autocast, state_dtype

BACKENDS = ("auto", "reference", "chunked", "triton", "triton-dense", "triton-sparse")


def factorization_memory(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor | None = None,
    merge_indices: Tensor | None = None,
    num_states: int | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over whole sequences. Gradients flow to update, merge, value and initial_state on every backend.

    Args:
        update: theta, `[B, T, H, M]`, or `[B, T, H, K]` with `indices`; 0 <= theta <= 1, both ends included.
        merge: phi, same shape as `update`, or `[B, T, H, R]` with `merge_indices`.
        value: v, `[B, T, H, D]`.
        indices: integers `[B, T, H, K]`, the distinct states that each token updates; None is the dense form. Their values are
            not checked under `torch.compile` or while a CUDA graph is captured.
        merge_indices: integers `[B, T, H, R]`, the distinct states that each token merges, after its update; None takes those
            that it updates. Only with `indices`; checked as they are.
        num_states: M; required with `indices`.
        initial_state: h_0, `[B, H, M, D]`, or `[N, H, M, D]` with `cu_seqlens`; None is zero.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]` integers, the borders of N sequences packed along T (B = 1); the state starts anew at each.
        backend: "reference" (one loop, the truth), "chunked" (parallel over time, in plain PyTorch), "triton" (kernels for
            GPUs; not for float64), or "auto": triton where it can run, chunked elsewhere. With `indices`, "triton" takes
            kernels that compute with the selected states alone where that is faster by measurement, and otherwise those of
            the dense form; "triton-sparse" and "triton-dense" insist on either.

    Returns:
        y `[B, T, H, D]` in value's dtype; the final state, shaped as `initial_state`, in float32 (float64 for float64 values),
        or None.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, indices out of range or repeated, an unknown backend, or
            one that cannot run here; names the argument, what it got and what it takes.
    """
    states = check_weights(update, merge, value, indices, merge_indices, num_states, time=True)
    if cu_seqlens is not None:
        check_borders(cu_seqlens, value.shape[0], value.shape[1])
    if initial_state is not None:
        sequences = value.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_state(initial_state, "initial_state", (sequences, value.shape[2], states, value.shape[3]), value)
    for name, chosen in (("indices", indices), ("merge_indices", merge_indices)):
        if chosen is not None and not torch.compiler.is_compiling() and not _capturing(chosen):
            check_indices(chosen, states, name)
    return recurrence_unchecked(
        update, merge, value, indices, merge_indices, states, initial_state, output_final_state, cu_seqlens, backend
    )


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
    """One token of the recurrence, or a few, for generation: `state` is updated in place. Not differentiable.

    Never synchronizes with a GPU, so it can be captured in a CUDA graph; there the values of `indices`, `merge_indices` and
    `places` are not checked.

    Args:
        update: theta, `[B, H, M]`, or `[B, H, K]` with `indices`; `[B, T, H, M]` (or K) for T tokens one after the other.
        merge: phi, same shape as `update`, or `[B, H, R]` with `merge_indices`.
        value: v, `[B, H, D]`, or `[B, T, H, D]`.
        state: h, `[B, H, M, D]`, contiguous, float32 (float64 for float64 values; bfloat16 with `seed`); a sparse step reads
            and writes K rows of it for each token, and reads R more with `merge_indices`.
        indices: integers shaped as `update`, distinct for each token: the states it updates.
        merge_indices: integers shaped as `merge`, distinct for each token: the states it merges, after its update; None takes
            those that it updates. Only with `indices`.
        places: integers `[B]`: where in `state`, then `[S, H, M, D]`, each sequence's is; -1 for a sequence that is not there,
            whose output is 0. No two may share a place. None is one after the other, S = B.
        undo: takes the rows of `state` as they were before they were written, `[B, H, K, D]` (M in the dense form), or
            `[B, T, H, K, D]`, of state's dtype, contiguous: for `factorization_memory_undo`.
        seed: int64 `[1]` on state's device: `state` is bfloat16, and rounded to at random with this seed, to be changed from
            step to step; Triton kernels only.
        backend: "reference" (PyTorch), "triton" (one kernel), or "auto": triton on a GPU where it can run.

    Returns:
        y `[B, H, D]` (or `[B, T, H, D]`) in value's dtype, and `state`.

    Raises:
        ValueError: as `factorization_memory`.
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
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend={backend!r}: use one of auto, reference, triton")
    if backend == "triton" and (reason := obstacle("triton", value)) is not None:
        raise ValueError(f"backend={backend!r}: {reason}; use 'auto', or 'reference', which runs everywhere")
    if seed is not None and not _steps_in_triton(backend, value):
        raise ValueError("seed: only Triton kernels round at random, and they do not run here; use a float32 state")
    y = step_unchecked(update, merge, value, state, indices, merge_indices, places, undo, seed=seed, backend=backend)
    return y, state


def factorization_memory_undo(
    state: Tensor,
    undo: Tensor,
    indices: Tensor | None = None,
    places: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Take back a step, to the bit: `state` in place.

    Args:
        state: as `factorization_memory_step` left it.
        undo: what that step put aside.
        indices: its indices.
        places: its places.
        backend: as of `factorization_memory_step`.

    Returns:
        `state`.

    Raises:
        ValueError: arguments that are not those of one step.
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
    undo_unchecked(state, rows[None], chosen_states, places, state.new_zeros(1, dtype=torch.int64), 1, backend)
    return state


def _steps_in_triton(backend: str, value: Tensor) -> bool:
    return backend == "triton" or (backend == "auto" and value.is_cuda and triton.obstacle(value) is None)


@torch.no_grad()
def step_unchecked(
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
    """`factorization_memory_step` on arguments known to be right; returns y.

    With `position`, int64 `[1]`, `undo` is `[depth, ...]`, and that one of its depth is taken.
    """
    one = value.dim() == 3
    if undo is not None and position is None:
        undo, position = undo[None], torch.zeros(1, dtype=torch.int64, device=state.device)
    if one:
        update, merge, value = (x[:, None] for x in (update, merge, value))
        indices, merge_indices = (None if x is None else x[:, None] for x in (indices, merge_indices))
        undo = None if undo is None else undo[:, :, None]
    if _steps_in_triton(backend, value):
        y = triton.step_in_place(update, merge, value, state, indices, merge_indices, places, undo, position, seed)
    else:
        with no_autocast(value.device):
            y = reference.steps(update, merge, value, indices, merge_indices, state, places, undo, position).to(value.dtype)
    return y[:, 0] if one else y


@torch.no_grad()
def undo_unchecked(
    state: Tensor,
    undo: Tensor,
    indices: Tensor | None,
    places: Tensor | None,
    position: Tensor,
    count: int,
    backend: str = "auto",
) -> None:
    """Take back the last `count` steps that were put aside in `undo` `[depth, B, T, H, K, D]`, with their `indices`
    `[depth, B, T, H, K]`; the next would be put aside at `position`, `[1]`."""
    if _steps_in_triton(backend, state.new_empty(0, dtype=torch.float32)):
        triton.undo_in_place(state, undo, indices, places, position, count)
    else:
        reference.undo(state, undo, indices, places, position, count)


def recurrence_unchecked(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor | None,
    merge_indices: Tensor | None,
    num_states: int,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """`factorization_memory` on arguments known to be right."""
    alone = initial_state is None and not output_final_state
    touched = 0 if indices is None else indices.shape[3] + (0 if merge_indices is None else merge_indices.shape[3])
    touched = min(touched, num_states)
    backend = _choose(backend, value, touched, num_states, alone, cu_seqlens)
    if backend == "reference":
        borders = None if cu_seqlens is None else read_borders(cu_seqlens)
        return _reference(
            update, merge, value, indices, merge_indices, num_states, initial_state, output_final_state, borders
        )  # fmt: skip
    if backend == "triton-sparse" and indices is not None:
        if merge_indices is not None:
            update, merge, indices = _one_selection(update, merge, indices, merge_indices, num_states, touched)
        return triton.forward_sparse(update, merge, value, indices, num_states, initial_state, output_final_state, cu_seqlens)
    if indices is not None:
        merge = over_states(merge, indices if merge_indices is None else merge_indices, num_states)
        update = over_states(update, indices, num_states)
    if backend == "triton-dense":
        return triton.forward(update, merge, value, initial_state, output_final_state, cu_seqlens)
    return chunked.forward(update, merge, value, initial_state, output_final_state, cu_seqlens)


def obstacle(backend: str, value: Tensor, argument: str = "value") -> str | None:
    """Why `backend` cannot compute with values like `value`, an argument of that name; None if it can."""
    return triton.obstacle(value, argument) if backend.startswith("triton") else None


def _choose(
    backend: str, value: Tensor, touched: int, num_states: int, alone: bool, cu_seqlens: Tensor | None
) -> str:  # fmt: skip
    """The backend that computes, "triton" made one of its two forms; ValueError if it is none, or cannot. `touched`: upper
    bound on the states that a token updates or merges, 0 in the dense form; `alone` if no memory comes in or is asked for."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if value.is_cuda and triton.obstacle(value) is None else "chunked"
    elif (reason := obstacle(backend, value)) is not None:
        raise ValueError(f"backend={backend!r}: {reason}; use 'auto', or 'chunked', which runs everywhere")
    elif backend == "triton-sparse" and not touched:
        raise ValueError(f"backend={backend!r}: it computes with indices, which are None; use 'triton'")
    if backend != "triton":
        return backend
    sparse = touched > 0 and cu_seqlens is None and triton.sparse_pays(value, touched, num_states, alone)
    return "triton-sparse" if sparse else "triton-dense"


def _capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be looked at."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def over_states(weights: Tensor, indices: Tensor | None, num_states: int) -> Tensor:
    """Weights of selected states `[..., K]` among all M, `[..., M]`, zero elsewhere; as they are without indices."""
    if indices is None:
        return weights
    return weights.new_zeros(*weights.shape[:-1], num_states).scatter(-1, indices.long(), weights)


def _one_selection(
    update: Tensor, merge: Tensor, indices: Tensor, merge_indices: Tensor, num_states: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Update and merge weights, `[B, T, H, size]` each, over one selection: the states that are updated or merged, and as many
    others, the lower first, as make up `size`."""
    update, merge = over_states(update, indices, num_states), over_states(merge, merge_indices, num_states)
    touched = torch.zeros_like(update, dtype=torch.bool)
    touched = touched.scatter(-1, indices.long(), True).scatter(-1, merge_indices.long(), True)
    keys = touched * num_states - torch.arange(num_states, device=update.device)
    union = keys.topk(size, dim=-1).indices
    return update.gather(-1, union), merge.gather(-1, union), union


def _reference(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor | None,
    merge_indices: Tensor | None,
    num_states: int,
    initial_state: Tensor | None,
    output_final_state: bool,
    borders: list[int] | None,
) -> tuple[Tensor, Tensor | None]:
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


__all__ = ["factorization_memory", "factorization_memory_step", "factorization_memory_undo"]
