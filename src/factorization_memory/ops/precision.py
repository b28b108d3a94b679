"""In which precision the recurrence is computed, whatever surrounds it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def state_dtype(value: Tensor) -> torch.dtype:
    """The dtype of memory, rates and their arithmetic: float32, or float64 for float64 values."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which autocast is off on `device`."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
