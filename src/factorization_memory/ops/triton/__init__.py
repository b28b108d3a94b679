"""The recurrence as Triton kernels: for NVIDIA GPUs and, in Triton's interpreter (TRITON_INTERPRET=1), for tests on a CPU.

Nothing here imports Triton before the first call.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

VERSION = (3, 6)
"""The oldest Triton that compiles the kernels."""
CAPABILITIES = (9, 10)
"""Major compute capabilities whose GPUs (H100, H200, B200) give a block of threads the 227 KiB of shared memory that the tiles
that ship may take; others give 163 KiB or 99."""

MOST_TAPS = 4
"""Taps that the kernels of the convolution are written for, or fewer."""

SPARSE_STATES, SPARSE_RATIO = 1024, 32
"""M, and M / K, from which on the form that computes with the selected states alone was faster in every measurement, forward
and with backward."""
SPARSE_LENGTH, SPARSE_WIDTH = 2048, 2048
"""Tokens of a sequence up to which it was, and least width of its one head."""


BACKENDS = ("auto", "plain", "triton")
"""Backends of what stands beside the recurrence."""


def by_kernels(backend: str, x: Tensor, obstacle: Callable[[], str | None]) -> bool:
    """Whether `backend` computes by kernels, of an argument x, what has a plain form in PyTorch too: "triton" does, "plain"
    does not, "auto" does on a GPU if nothing stands against it.

    Raises:
        ValueError: an unknown backend, or "triton" where `obstacle` says why it cannot.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "plain" or (backend == "auto" and not x.is_cuda):
        return False
    reason = obstacle()
    if reason is not None and backend == "triton":
        raise ValueError(f"backend={backend!r}: {reason}; use 'auto', or 'plain', which runs everywhere")
    return reason is None


def interpreted() -> bool:
    """Whether Triton interprets kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def obstacle(value: Tensor, argument: str = "value") -> str | None:
    """Why the kernels cannot run for `value`, an argument of that name; None if they can."""
    if value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{argument} has dtype {value.dtype}, the kernels take bfloat16, float16 or float32"
    return _device_obstacle(argument, str(value.device))


@torch.compiler.assume_constant_result
def _device_obstacle(argument: str, name: str) -> str | None:
    return _obstacle(argument, name, interpreted())


@lru_cache(maxsize=64)
def _obstacle(argument: str, name: str, in_python: bool) -> str | None:
    device = torch.device(name)
    version = _version()
    if version is None:
        return "Triton is not installed (pip install triton)"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < VERSION:
        return f"Triton is {version}, the kernels need {'.'.join(map(str, VERSION))} or newer"
    if device.type == "cpu":
        if in_python:
            return None
        return f"{argument} is on the CPU, the kernels need a GPU (for tests, TRITON_INTERPRET=1 interprets them)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{argument} is on {device}, the kernels need an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in CAPABILITIES:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need 9.x or 10.x (H100, H200, B200)"
    return None


def _version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        pass
    if find_spec("triton") is None:
        return None
    import triton  # a build of another name

    return getattr(triton, "__version__", None)


def forward(
    update: Tensor, merge: Tensor, value: Tensor, state: Tensor | None, keep_final: bool, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The dense recurrence over whole sequences.

    Args:
        update: theta, `[B, T, H, M]`.
        merge: phi, same shape.
        value: v, `[B, T, H, D]`, bfloat16, float16 or float32.
        state: h_0, `[B, H, M, D]` (`[N, H, M, D]` with `cu_seqlens`), or None for zeros.
        keep_final: whether to return the final state.
        cu_seqlens: `[N + 1]` integers, the borders of packed sequences (B = 1).

    Returns:
        y `[B, T, H, D]` in value's dtype and the final state, shaped as `state`, in float32.
    """
    from factorization_memory.ops.triton.dense import dense

    output, final, *_ = dense(update, merge, value, state, cu_seqlens, keep_final)
    return output, final if keep_final else None


def sparse_pays(value: Tensor, chosen: int, num_states: int, alone: bool) -> bool:
    """Whether `forward_sparse` is known to be faster than the dense form, by measurement (docs/kernels.md): at sizes beside
    those that were measured it is not taken.

    Args:
        value: v, `[B, T, H, D]`, not packed.
        chosen: K.
        num_states: M.
        alone: whether no memory comes into the sequences or leaves them.
    """
    _, length, heads, width = value.shape
    return (
        alone
        and heads == 1
        and length <= SPARSE_LENGTH
        and width >= SPARSE_WIDTH
        and num_states >= max(SPARSE_STATES, SPARSE_RATIO * chosen)
    )


def forward_sparse(
    update: Tensor, merge: Tensor, value: Tensor, indices: Tensor, num_states: int, state: Tensor | None, keep_final: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The sparse recurrence over whole sequences.

    Args:
        update: theta, `[B, T, H, K]`.
        merge: phi, same shape.
        value: v, `[B, T, H, D]`, bfloat16, float16 or float32.
        indices: the distinct states of each token, int `[B, T, H, K]`.
        num_states: M.
        state: h_0, `[B, H, M, D]` (`[N, H, M, D]` with `cu_seqlens`), or None for zeros.
        keep_final: whether to return the final state.
        cu_seqlens: `[N + 1]` integers, the borders of packed sequences (B = 1).

    Returns:
        y `[B, T, H, D]` in value's dtype and the final state, shaped as `state`, in float32.
    """
    from factorization_memory.ops.triton.sparse import sparse

    output, final, *_ = sparse(update, merge, value, indices, state, cu_seqlens, num_states, keep_final)
    return output, final if keep_final else None


def step_in_place(
    update: Tensor, merge: Tensor, value: Tensor, state: Tensor, indices: Tensor | None, merge_indices: Tensor | None,
    places: Tensor | None, undo: Tensor | None, position: Tensor | None, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """A few tokens of each sequence, `state` in place: see `step._step`."""
    from factorization_memory.ops.triton import step as kernels

    return kernels.step(update, merge, value, state, indices, merge_indices, places, undo, position, seed)


def undo_in_place(
    state: Tensor, undo: Tensor, indices: Tensor | None, places: Tensor | None, position: Tensor, count: int
) -> None:
    """Take back steps, `state` in place: see `step._undo`."""
    from factorization_memory.ops.triton import step as kernels

    kernels.undo(state, undo, indices, places, position, count)
