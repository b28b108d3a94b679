"""The recurrence of Factorization Memory as functions of tensors: checks arguments and picks a backend.

For each token t, head and memory state j, with update weight theta, merge weight phi and value v:

    h_tj = (1 - theta_tj) h_{t-1,j} + theta_tj v_t        y_t = sum_j phi_tj h_tj

The states that a token updates (`indices`) and those that it merges (`merge_indices`) may differ.

Shapes: B sequences, T tokens, H heads, M memory states, K states that a token updates, R that it merges, D value width of a
head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorization_memory.ops.arguments import check_borders, check_indices, check_state, check_weights
from factorization_memory.ops.memory.backends import choose_backend


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
        update: theta, `[B, T, H, M]`, or `[B, T, H, K]` with `indices`; 0 <= theta <= 1.
        merge: phi, same shape as `update`, or `[B, T, H, R]` with `merge_indices`.
        value: v, `[B, T, H, D]`.
        indices: integers `[B, T, H, K]`, the distinct states that each token updates; None means the dense form. Their values
            are not checked under `torch.compile` or while a CUDA graph is captured.
        merge_indices: integers `[B, T, H, R]`, the distinct states that each token merges, after its update; None means those
            that it updates. Only with `indices`, and checked like them.
        num_states: M; required with `indices`.
        initial_state: h_0, `[B, H, M, D]`, or `[N, H, M, D]` with `cu_seqlens`; None is zero.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]` integers, the borders of N sequences packed along T (B = 1); the state is reset at each.
        backend: "reference" (a plain loop, the ground truth), "chunked" (parallel over time, in plain PyTorch), "triton"
            (kernels for GPUs; not for float64), "numba" (loops compiled for the CPU, only with `indices`), or "auto": triton or
            numba where they can run and pay, chunked elsewhere. With `indices`, "triton" uses kernels that compute only the
            selected states if measured to be faster, and otherwise those of the dense form; "triton-sparse" and "triton-dense"
            force either.

    Returns:
        y `[B, T, H, D]` in value's dtype; the final state, shaped as `initial_state`, in float32 (float64 for float64 values),
        or None.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, indices out of range or repeated, an unknown backend, or
            one that cannot run here; the message names the argument, the value and what is accepted.
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
    return recurrence(
        update, merge, value, indices, merge_indices, states, initial_state, output_final_state, cu_seqlens, backend
    )


def recurrence(
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
    """`factorization_memory` on checked arguments."""
    alone = initial_state is None and not output_final_state
    chosen = choose_backend(backend, value, indices, merge_indices, num_states, alone, cu_seqlens is not None)
    return chosen.forward(
        update, merge, value, indices, merge_indices, num_states, initial_state, output_final_state, cu_seqlens
    )


def _capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which forbids synchronizing."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
