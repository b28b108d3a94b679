"""Comparable timings and peak memory: contenders are interleaved, so that all see the same machine conditions.

On a GPU a call can be timed in three ways, which answer different questions: by the host's clock (what a training loop
waits for), by the device's events with the cache emptied before each call (what the call costs between others), and as a
replayed CUDA graph (what its kernels cost, the host's work left out).
"""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from factorization_memory.runs.environment import cpu_model

SHORTEST_SECONDS = 0.02
"""A measurement repeats its call until it lasts this long, so that the clock and the interpreter's hiccups do not show."""
MOST_CALLS = 500
"""Calls of one measurement on a device's clock at most; each has two events."""
FLUSH_BYTES = 256 << 20
"""Written before each call that is timed on the device's clock: several times the largest L2 cache there is, so that a call
finds none of its inputs in it. It also keeps the device busy while the host prepares the call."""
PACKAGES = ("triton", "transformers", "fla-core", "flash-linear-attention", "mamba-ssm")
"""Packages that figures depend on, next to torch."""


class Spread(TypedDict):
    """Repeated measurements, in seconds."""

    median: float
    min: float
    max: float


class Machine(TypedDict):
    """What the figures of a benchmark were measured on."""

    device: str
    name: str
    """Of the processor or GPU."""
    threads: int
    torch: str
    python: str
    packages: dict[str, str]
    """Versions of those of `PACKAGES` that are installed."""
    cuda: NotRequired[str | None]
    """On a GPU, like those below."""
    memory_bytes: NotRequired[int]
    multiprocessors: NotRequired[int]


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    cold: bool = False,
    failures: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one call of each contender, `repeats` times, in rounds in which each takes its turn.

    Each is called twice before, untimed: memory is touched, caches are filled, kernels compiled.

    Args:
        contenders: what to call, by name.
        repeats: rounds.
        device: where the calls compute.
        cold: on a GPU, take the device's own time of each call, with the L2 cache emptied before it; without, and on a CPU,
            the host's time of calls one after the other.
        failures: if given, takes the message of a contender that raises, which then drops out; otherwise the error goes on.
    """
    clock = device_clock(device) if cold and device.type == "cuda" else _seconds
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def timed(name: str, calls: int) -> float | None:
        try:
            return clock(contenders[name], calls, device)
        except Exception as error:
            if failures is None:
                raise
            failures[name] = reason(error)
            del seconds[name]
        release(device)  # here, where the error no longer holds what the call had allocated
        return None

    gc.collect()
    gc.freeze()  # existing objects need not be scanned in every turn
    try:
        calls = {}
        for name in contenders:
            once = None if timed(name, 1) is None else timed(name, 1)
            if once is not None:
                calls[name] = min(MOST_CALLS, max(1, round(SHORTEST_SECONDS / max(once, 1e-9))))
        for _ in range(repeats):
            for name, number in calls.items():
                gc.collect()
                spent = timed(name, number) if name in seconds else None
                if spent is not None:
                    seconds[name].append(spent)
    finally:
        gc.unfreeze()
    return seconds


def _seconds(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def device_clock(device: torch.device) -> Callable[[Callable[[], Any], int, torch.device], float]:
    """A function of a call, a number of calls and the device: the mean seconds of a call by the device's events, its L2 cache
    emptied before each. It holds the buffer that empties the cache."""
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def seconds(call: Callable[[], Any], calls: int, device: torch.device) -> float:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        synchronise(device)
        for start, end in events:
            buffer.zero_()
            start.record()
            call()
            end.record()
        synchronise(device)
        return sum(start.elapsed_time(end) for start, end in events) / calls / 1000  # from milliseconds

    return seconds


def graph_seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Seconds of one replay of `call` captured as a CUDA graph, `repeats` times, each on the device's clock.

    Raises whatever the capture raises: a call that waits for the device cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()  # one-time setup must not be captured
        with _waiting_is_an_error():
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    seconds = interleaved_seconds({"replay": graph.replay}, repeats, device, cold=True)["replay"]
    graph.reset()
    return seconds


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """A block in which a call that waits for the GPU raises: a capture that fails half-way leaves the allocator in disorder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch remarks that it does not see all kinds of waiting
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A block in which a GPU is the current one, which events, streams and graphs are made for."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def release(device: torch.device) -> None:
    """Returns unreferenced memory to a GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    """Synchronizes with a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: list[float]) -> Spread:
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
    """Median over rounds of the ratio within a round, which is robust to slow and fast phases of the machine."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def machine(device: torch.device) -> Machine:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    result: Machine = {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": {package: version for package in PACKAGES if (version := _version(package)) is not None},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["cuda"] = torch.version.cuda
        result["memory_bytes"] = properties.total_memory
        result["multiprocessors"] = properties.multi_processor_count
    return result


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes of the numbers of `tensors`."""
    return sum(x.numel() * x.element_size() for x in tensors)
