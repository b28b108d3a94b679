"""The recurrence as Triton kernels: for NVIDIA GPUs and, in Triton's interpreter (TRITON_INTERPRET=1), for tests on a CPU.

Triton is imported at the first call.
"""

from __future__ import annotations

from torch import Tensor

SPARSE_STATES, SPARSE_RATIO = 1024, 32
"""Smallest M, and M / K, at which the sparse form was faster in every measurement, forward and with backward."""
SPARSE_LENGTH, SPARSE_WIDTH = 2048, 2048
"""Longest sequence, in tokens, and smallest width of its single head at which it was."""


def forward(
    update: Tensor, merge: Tensor, value: Tensor, state: Tensor | None, keep_final: bool, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The dense recurrence over whole sequences.

    Args:
        update: theta, `[B, T, H, M]`.
        merge: phi, same shape.
        value: v, `[B, T, H, D]`, bfloat16, float16 or float32.
        state: h_0, `[B, H, M, D]` (`[N, H, M, D]` with `cu_seqlens`), None means zeros.
        keep_final: whether to return the final state.
        cu_seqlens: `[N + 1]` integers, the borders of packed sequences (B = 1).

    Returns:
        y `[B, T, H, D]` in value's dtype and the final state, shaped as `state`, in float32.
    """
    from factorization_memory.ops.memory.kernels.dense import dense

    output, final, *_ = dense(update, merge, value, state, cu_seqlens, keep_final)
    return output, final if keep_final else None


def sparse_pays(value: Tensor, chosen: int, num_states: int) -> bool:
    """Whether `forward_sparse` was measured to be faster than the dense form (docs/kernels.md); False for sizes outside the
    measured range.

    Args:
        value: v, `[B, T, H, D]`, of unpacked sequences without initial or final state.
        chosen: K.
        num_states: M.
    """
    _, length, heads, width = value.shape
    return (
        heads == 1
        and length <= SPARSE_LENGTH
        and width >= SPARSE_WIDTH
        and num_states >= max(SPARSE_STATES, SPARSE_RATIO * chosen)
    )


def forward_sparse(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    num_states: int,
    state: Tensor | None,
    keep_final: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The sparse recurrence over whole sequences.

    Args:
        update: theta, `[B, T, H, K]`.
        merge: phi, same shape.
        value: v, `[B, T, H, D]`, bfloat16, float16 or float32.
        indices: the distinct states of each token, int `[B, T, H, K]`.
        num_states: M.
        state: h_0, `[B, H, M, D]` (`[N, H, M, D]` with `cu_seqlens`), None means zeros.
        keep_final: whether to return the final state.
        cu_seqlens: `[N + 1]` integers, the borders of packed sequences (B = 1).

    Returns:
        y `[B, T, H, D]` in value's dtype and the final state, shaped as `state`, in float32.
    """
    from factorization_memory.ops.memory.kernels.sparse import sparse

    output, final, *_ = sparse(update, merge, value, indices, state, cu_seqlens, num_states, keep_final)
    return output, final if keep_final else None


def step_in_place(
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
    """A few tokens of each sequence; updates `state` in place: see `step._step`."""
    from factorization_memory.ops.memory.kernels import step as kernels

    return kernels.step(update, merge, value, state, indices, merge_indices, places, undo, position, seed)


def undo_in_place(
    state: Tensor, undo: Tensor, indices: Tensor | None, places: Tensor | None, position: Tensor, count: int
) -> None:
    """Undoes steps; updates `state` in place: see `step._undo`."""
    from factorization_memory.ops.memory.kernels import step as kernels

    kernels.undo(state, undo, indices, places, position, count)
