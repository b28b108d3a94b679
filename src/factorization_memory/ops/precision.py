"""The precision of the recurrence, whatever the surrounding autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Backward = TypeVar("Backward", bound=Callable[..., Any])


def state_dtype(value: Tensor) -> torch.dtype:
    """Dtype of memory, rates and their arithmetic: float32, or float64 for float64 values."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context in which autocast is off on `device`."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device) else nullcontext()


def has_autocast(device: torch.device) -> bool:
    """Whether `device` supports autocast."""
    # `torch.amp.is_autocast_available` cannot be compiled before torch 2.12; of the devices used here, one has none.
    return device.type != "meta"


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of matrices or batches of matrices, accumulated and returned in float32, whatever their dtype."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    if a.dim() == 2:
        return torch.bmm(a[None], b[None], out_dtype=torch.float32)[0]
    return torch.bmm(a, b, out_dtype=torch.float32)


def outside_autocast(backward: Backward) -> Backward:
    """Makes an autograd function's `backward(ctx, gradient, ...)` compute in its tensors' own dtypes, even inside an autocast
    block."""

    @wraps(backward)
    def wrapped(ctx: Any, gradient: Tensor, *more: Tensor) -> Any:
        with no_autocast(gradient.device):
            return backward(ctx, gradient, *more)

    return cast(Backward, wrapped)
