"""Triton and Numba on this machine: whether they are installed, support a tensor, and on which device kernels are launched. The
only place that checks this.

Imports neither before a kernel is launched.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

H200_PROCESSORS = 132
OLDEST_TRITON = (3, 6)
"""The oldest Triton that compiles the kernels."""
OLDEST_NUMBA = (0, 61)
"""The oldest Numba that the loops are for."""
CAPABILITIES = (9, 10)
"""Major compute capabilities of GPUs (H100, H200, B200) with the 227 KiB of shared memory per thread block that the shipped
tiles may need; others have 163 KiB or 99."""


def interpreted() -> bool:
    """Whether Triton interprets kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_unsupported(value: Tensor, argument: str = "value") -> str | None:
    """Why the kernels cannot run for `value`, named `argument` in the message; None if they can."""
    if value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{argument} has dtype {value.dtype}, the kernels take bfloat16, float16 or float32"
    return _why_not_on(argument, str(value.device))


@torch.compiler.assume_constant_result
def _why_not_on(argument: str, name: str) -> str | None:
    return _why_not(argument, name, interpreted())


@lru_cache(maxsize=64)
def _why_not(argument: str, name: str, in_python: bool) -> str | None:
    device = torch.device(name)
    version = triton_version()
    if version is None:
        return "Triton is not installed (pip install triton)"
    if version_numbers(version) < OLDEST_TRITON:
        return f"Triton is {version}, the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer"
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


def why_no_numba(value: Tensor, argument: str = "value") -> str | None:
    """Why Numba's loops cannot run for `value`, named `argument` in the message; None if they can."""
    if value.device.type != "cpu":
        return f"{argument} is on {value.device}, Numba compiles for the CPU"
    return _why_no_numba()


@torch.compiler.assume_constant_result
def _why_no_numba() -> str | None:
    return _numba_problem()


@lru_cache(maxsize=1)
def _numba_problem() -> str | None:
    if find_spec("numba") is None:
        return "Numba is not installed (pip install numba)"
    try:
        import numba  # it refuses some versions of NumPy, and a folder of its name is no package
    except Exception as error:
        return f"Numba cannot be imported ({error})"
    version = getattr(numba, "__version__", "0")
    if version_numbers(version) < OLDEST_NUMBA:
        return f"Numba is {version}, the loops need {'.'.join(map(str, OLDEST_NUMBA))} or newer"
    return None


def triton_version() -> str | None:
    """The installed version of Triton; None without Triton."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        pass
    if find_spec("triton") is None:
        return None
    import triton  # a build distributed under another name

    return getattr(triton, "__version__", None)


def version_numbers(version: str) -> tuple[int, ...]:
    """A version as a comparable tuple: `(3, 7, 1)` for "3.7.1+git"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


@lru_cache(maxsize=64)
def processor_count(device: torch.device) -> int:
    """Number of streaming multiprocessors of a GPU; that of an H200 when kernels are interpreted on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else H200_PROCESSORS


def on_device_of(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an operator on the device of its first argument, a tensor, since Triton launches on the current device; and outside
    autocast, which would cast the operands of PyTorch's matmuls."""

    @wraps(operator)
    def launched(*arguments: Any) -> Any:
        device = arguments[0].device
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                return launched(*arguments)
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return operator(*arguments)
        with torch.cuda.device(device):
            return operator(*arguments)

    return launched
