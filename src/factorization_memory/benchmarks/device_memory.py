"""Peaks of a GPU's memory, counted for one of several things that stand in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from factorization_memory.benchmarks.timing import synchronise


class DeviceMemory:
    """The memory of a GPU that is allocated beyond what belongs to others. On a CPU all figures are None.

    Attributes:
        device: the device.
        others: bytes that belong to others; at first all that are allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.others = self.allocated()

    def allocated(self) -> int:
        """Bytes that are allocated, by whomever; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """A block after which everything that it has allocated belongs to others."""
        before = self.allocated()
        yield
        self.others += self.allocated() - before

    def start(self) -> None:
        """Begins a peak."""
        if self.device.type == "cuda":
            synchronise(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """The most bytes since `start` that did not belong to others."""
        if self.device.type != "cuda":
            return None
        synchronise(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.others
