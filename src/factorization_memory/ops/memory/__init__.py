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

from factorization_memory.ops import runtime
from factorization_memory.ops.arguments import check_borders, check_indices, check_state, check_weights, read_borders
from factorization_memory.ops.memory import chunked, kernels, reference
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
        return kernels.forward_sparse(update, merge, value, indices, num_states, initial_state, output_final_state, cu_seqlens)
    if indices is not None:
        merge = over_states(merge, indices if merge_indices is None else merge_indices, num_states)
        update = over_states(update, indices, num_states)
    if backend == "triton-dense":
        return kernels.forward(update, merge, value, initial_state, output_final_state, cu_seqlens)
    return chunked.forward(update, merge, value, initial_state, output_final_state, cu_seqlens)


def obstacle(backend: str, value: Tensor, argument: str = "value") -> str | None:
    """Why `backend` cannot compute with values like `value`, an argument of that name; None if it can."""
    return runtime.obstacle(value, argument) if backend.startswith("triton") else None


def _choose(
    backend: str, value: Tensor, touched: int, num_states: int, alone: bool, cu_seqlens: Tensor | None
) -> str:  # fmt: skip
    """The backend that computes, "triton" made one of its two forms; ValueError if it is none, or cannot. `touched`: upper
    bound on the states that a token updates or merges, 0 in the dense form; `alone` if no memory comes in or is asked for."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if value.is_cuda and runtime.obstacle(value) is None else "chunked"
    elif (reason := obstacle(backend, value)) is not None:
        raise ValueError(f"backend={backend!r}: {reason}; use 'auto', or 'chunked', which runs everywhere")
    elif backend == "triton-sparse" and not touched:
        raise ValueError(f"backend={backend!r}: it computes with indices, which are None; use 'triton'")
    if backend != "triton":
        return backend
    sparse = touched > 0 and cu_seqlens is None and kernels.sparse_pays(value, touched, num_states, alone)
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
