"""Durations and allocation peaks that can be compared: contenders take turns, so that all see the same machine."""

from __future__ import annotations

import gc
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

SHORTEST_SECONDS = 0.02
"""A measurement repeats its call until it lasts this long, so that the clock and the interpreter's hiccups do not show."""


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of one call of each contender, `repeats` times, in rounds in which each takes its turn.

    Each is called once or more before, untimed: memory is touched, caches are filled, kernels compiled.
    """
    calls = {}
    for name, call in contenders.items():
        _seconds(call, 1, device)
        once = _seconds(call, 1, device)
        calls[name] = max(1, round(SHORTEST_SECONDS / max(once, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            gc.collect()
            seconds[name].append(_seconds(call, calls[name], device))
    return seconds


def _seconds(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def synchronise(device: torch.device) -> None:
    """Wait for what runs on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, fastest and slowest of repeated measurements, in seconds."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that `call` had allocated at one time beyond what stood before, its result included."""
    if device.type == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as live:
        call()
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages made under it, from the operation that returns them until nothing refers to them.

    Memory that an operation takes and gives back within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}
        self._finalizers: list[weakref.finalize] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), given)
        self.peak = max(self.peak, sum(self._live.values()))
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key not in self._live and key not in given:
            self._live[key] = storage.nbytes()
            self._finalizers.append(weakref.finalize(storage, self._live.pop, key, None))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for finalizer in self._finalizers:
            finalizer.detach()
        super().__exit__(kind, error, traceback)


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round, which the machine's slower and faster minutes leave alone."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
