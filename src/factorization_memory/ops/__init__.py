"""The recurrence of Factorization Memory as functions of tensors: arguments are checked here, and a backend is chosen.

For each token t, head and memory state j, with update weight theta, merge weight phi and value v:

    h_tj = (1 - theta_tj) h_{t-1,j} + theta_tj v_t        y_t = sum_j phi_tj h_tj

Shapes: B sequences, T tokens, H heads, M memory states, K selected states, D value width of a head.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from factorization_memory.ops import chunked, reference, triton
from factorization_memory.ops.precision import no_autocast, state_dtype

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "reference", "chunked", "triton")


def factorization_memory(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor | None = None,
    num_states: int | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over whole sequences. Gradients flow to update, merge, value and initial_state on every backend.

    Args:
        update: theta, `[B, T, H, M]`, or `[B, T, H, K]` with `indices`; 0 <= theta <= 1, both ends included.
        merge: phi, same shape as `update`.
        value: v, `[B, T, H, D]`.
        indices: integers `[B, T, H, K]`, the distinct states that each token updates and merges; None is the dense form.
        num_states: M; required with `indices`.
        initial_state: h_0, `[B, H, M, D]`, or `[N, H, M, D]` with `cu_seqlens`; None is zero.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]` integers, the borders of N sequences packed along T (B = 1); the state starts anew at each.
        backend: "reference" (one loop, the truth), "chunked" (parallel over time, in plain PyTorch), "triton" (kernels for
            GPUs; not for float64), or "auto": triton where it can run, chunked elsewhere.

    Returns:
        y `[B, T, H, D]` in value's dtype; the final state, shaped as `initial_state`, in float32 (float64 for float64 values),
        or None.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, indices out of range or repeated, an unknown backend, or
            one that cannot run here; names the argument, what it got and what it takes.
    """
    states = _check(update, merge, value, indices, num_states, time=True)
    if cu_seqlens is not None:
        check_borders(cu_seqlens, value.shape[0], value.shape[1])
    if initial_state is not None:
        sequences = value.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_state(initial_state, "initial_state", (sequences, value.shape[2], states, value.shape[3]), value)
    if indices is not None and not torch.compiler.is_compiling():
        _check_indices(indices, states)
    return recurrence_unchecked(update, merge, value, indices, states, initial_state, output_final_state, cu_seqlens, backend)


def factorization_memory_step(
    update: Tensor, merge: Tensor, value: Tensor, state: Tensor, indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for generation: `state` is updated in place. Not differentiable.

    Args:
        update: theta, `[B, H, M]`, or `[B, H, K]` with `indices`.
        merge: phi, same shape as `update`.
        value: v, `[B, H, D]`.
        state: h, `[B, H, M, D]`, float32 (float64 for float64 values); a sparse step reads and writes K rows of it.
        indices: integers `[B, H, K]`, distinct.

    Returns:
        y `[B, H, D]` in value's dtype, and `state`.

    Raises:
        ValueError: as `factorization_memory`.
    """
    states = _check(update, merge, value, indices, state.shape[2] if state.dim() == 4 else None, time=False)
    check_state(state, "state", (value.shape[0], value.shape[1], states, value.shape[2]), value)
    if indices is not None:
        _check_indices(indices, states)
    return step_unchecked(update, merge, value, state, indices)


@torch.no_grad()
def step_unchecked(
    update: Tensor, merge: Tensor, value: Tensor, state: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`factorization_memory_step` on arguments known to be right."""
    with no_autocast(value.device):
        return reference.step(update, merge, value, indices, state).to(value.dtype), state


def recurrence_unchecked(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor | None,
    num_states: int,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """`factorization_memory` on arguments known to be right."""
    backend = _choose(backend, value)
    if backend == "reference":
        borders = None if cu_seqlens is None else read_borders(cu_seqlens)
        return _reference(update, merge, value, indices, num_states, initial_state, output_final_state, borders)
    if indices is not None:
        update, merge = (_scatter(x, indices, num_states) for x in (update, merge))
    if backend == "triton":
        return triton.forward(update, merge, value, initial_state, output_final_state, cu_seqlens)
    borders = None if cu_seqlens is None else read_borders(cu_seqlens)
    return chunked.forward(update, merge, value, initial_state, output_final_state, borders)


def obstacle(backend: str, value: Tensor) -> str | None:
    """Why `backend` cannot compute with values like `value`; None if it can."""
    return triton.obstacle(value) if backend == "triton" else None


def _choose(backend: str, value: Tensor) -> str:
    """The backend that computes; ValueError if it is none, or cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if value.is_cuda and triton.obstacle(value) is None else "chunked"
    if (reason := obstacle(backend, value)) is not None:
        raise ValueError(f"backend={backend!r}: {reason}; use 'auto', or 'chunked', which runs everywhere")
    return backend


def _scatter(weights: Tensor, indices: Tensor, num_states: int) -> Tensor:
    """Weights of the K selected states `[B, T, H, K]` among all M, `[B, T, H, M]`, zero elsewhere."""
    return weights.new_zeros(*weights.shape[:3], num_states).scatter(3, indices.long(), weights)


def _reference(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor | None,
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
    indices = None if indices is None else indices.long()
    with no_autocast(value.device):
        if borders is None:
            output, state = reference.forward(update, merge, value, indices, initial_state)
        else:
            parts = []
            for n in range(sequences):
                part = slice(borders[n], borders[n + 1])
                chosen = None if indices is None else indices[:, part]
                parts.append(
                    reference.forward(update[:, part], merge[:, part], value[:, part], chosen, initial_state[n : n + 1])
                )
            output, state = torch.cat([y for y, _ in parts], dim=1), torch.cat([h for _, h in parts])
    return output.to(value.dtype), (state if output_final_state else None)


def _check(update: Tensor, merge: Tensor, value: Tensor, indices: Tensor | None, num_states: int | None, *, time: bool) -> int:
    """Checks what both functions share; returns M."""
    letters = "B, T, H" if time else "B, H"
    dims = 4 if time else 3
    if value.dim() != dims:
        raise ValueError(f"value: got shape {tuple(value.shape)}, takes [{letters}, D]")
    for name, tensor in (("update", update), ("merge", merge)):
        if tensor.dim() != dims or tensor.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, takes [{letters}, M] (or K) with [{letters}] = "
                f"{list(value.shape[:-1])} as in value"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, takes float64, float32, bfloat16 or float16")
        if tensor.device != value.device:
            raise ValueError(f"{name}: is on {tensor.device}, value on {value.device}; move them to one device")
    if value.dtype not in FLOATS:
        raise ValueError(f"value: got dtype {value.dtype}, takes float64, float32, bfloat16 or float16")
    if merge.shape != update.shape:
        raise ValueError(f"merge: got shape {tuple(merge.shape)}, takes that of update, {tuple(update.shape)}")
    if indices is None:
        if num_states is not None and num_states != update.shape[-1]:
            raise ValueError(f"num_states: got {num_states}, takes update's last dimension {update.shape[-1]} without indices")
        return update.shape[-1]
    if num_states is None:
        raise ValueError("num_states: got None, takes the number of states M together with indices")
    if indices.shape != update.shape:
        raise ValueError(f"indices: got shape {tuple(indices.shape)}, takes that of update, {tuple(update.shape)}")
    if indices.dtype not in (torch.int64, torch.int32, torch.int16):
        raise ValueError(f"indices: got dtype {indices.dtype}, takes int64, int32 or int16")
    if indices.device != value.device:
        raise ValueError(f"indices: is on {indices.device}, value on {value.device}; move them to one device")
    return num_states


def _check_indices(indices: Tensor, num_states: int) -> None:
    if indices.numel() == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= num_states:
        raise ValueError(f"indices: got values from {low} to {high}, takes 0 to num_states - 1 = {num_states - 1}")
    ordered = indices.sort(dim=-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ValueError("indices: got the same state twice for one token, takes distinct states")


_READ = WeakTensorKeyDictionary()
"""Borders read from a GPU: tensor -> its version and the borders, so that the GPU is waited for once and not by every layer."""


def check_borders(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """ValueError if the borders of packed sequences, `[N + 1]`, do not fit B = `batch`, T = `length`.

    Under `torch.compile` their values are not looked at.
    """
    if batch != 1:
        raise ValueError(f"cu_seqlens: B = {batch}, packed sequences take B = 1")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, takes N + 1 >= 2 int32 or int64 numbers"
        )
    if torch.compiler.is_compiling():
        return
    borders = read_borders(cu_seqlens)
    if borders[0] != 0 or borders[-1] != length or any(a > b for a, b in pairwise(borders)):
        raise ValueError(f"cu_seqlens: got {borders}, takes a non-decreasing sequence from 0 to T = {length}")


def read_borders(cu_seqlens: Tensor) -> list[int]:
    """The borders of packed sequences as a list."""
    # Only what a GPU holds is worth remembering, and only what counts its versions can be.
    if torch.compiler.is_compiling() or not cu_seqlens.is_cuda or cu_seqlens.is_inference():
        return cu_seqlens.tolist()
    known = _READ.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = _READ[cu_seqlens] = cu_seqlens._version, cu_seqlens.tolist()
    return known[1]


def check_state(state: Tensor, name: str, shape: tuple[int, ...], value: Tensor) -> None:
    """ValueError if a memory is not of this shape, or not of the dtype and device that go with `value`."""
    if tuple(state.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(state.shape)}, takes {shape}")
    dtype = state_dtype(value)
    if state.dtype != dtype:
        raise ValueError(f"{name}: got dtype {state.dtype}, takes {dtype} with values of {value.dtype}")
    if state.device != value.device:
        raise ValueError(f"{name}: is on {state.device}, value on {value.device}; move them to one device")


__all__ = ["factorization_memory", "factorization_memory_step"]
