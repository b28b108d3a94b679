"""The recurrence alone: time per token of each backend, its ratio to the reference loop, and the memory it takes.

Nothing is timed before every backend has been found right at the shapes in question: `run` raises `IncorrectBackendError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from factorization_memory.benchmarks.correctness import Problem, Shape, check
from factorization_memory.benchmarks.timing import interleaved_seconds, machine, paired_ratio, peak_bytes, summary

GATE_TOKENS = 150
"""Tokens of each sequence in the correctness gate: a few chunks, and few enough for the loop in float64."""
GATE_BATCH = 2
"""Sequences in the gate."""


class IncorrectBackendError(RuntimeError):
    """A backend that does not compute the recurrence; its speed means nothing. `checks` are the gate's results."""

    def __init__(self, checks: list[dict[str, Any]]) -> None:
        self.checks = checks
        red = [
            f"{result['backend']} ({result['reason'] or 'relative error ' + format(result['error'], '.1e')})"
            for result in checks
            if not result["passed"]
        ]
        super().__init__(f"the correctness gate is red, no speed is measured: {', '.join(red)}")


@dataclass(frozen=True)
class OpBenchmark:
    """What to measure."""

    shape: Shape = field(default_factory=Shape)
    """Size at which the backends are compared."""
    backends: tuple[str, ...] = ("chunked",)
    """Backends, next to the reference."""
    dtype: torch.dtype = torch.float32
    """Of values and output; weights and states are float32 (float64 with float64)."""
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Tokens of one sequence (B = 1) for the time per token over length; the reference takes no part."""
    memory_length: int = 16384
    """Tokens of the one sequence whose memory is measured; 0 for none."""
    repeats: int = 5
    """Rounds; medians are taken over them."""


def run(benchmark: OpBenchmark, device: torch.device, progress: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """All measurements.

    Args:
        benchmark: what to measure.
        device: where.
        progress: called with what comes next, for people.

    Returns:
        `machine`, `dtype`, `checks` (the gate's), `comparison` (one record per backend at `shape`), `lengths` (one per backend
        and length), `memory` (one per backend).

    Raises:
        IncorrectBackendError: a backend is wrong or cannot run.
    """
    progress("correctness gate")
    checks = gate(benchmark, device)
    if not all(result["passed"] for result in checks):
        raise IncorrectBackendError(checks)
    contenders = ("reference", *(backend for backend in benchmark.backends if backend != "reference"))
    progress(f"{', '.join(contenders)} at T={benchmark.shape.length}")
    result: dict[str, Any] = {
        "machine": machine(device),
        "dtype": str(benchmark.dtype).removeprefix("torch."),
        "checks": checks,
        "comparison": measure(benchmark.shape, contenders, benchmark.dtype, device, benchmark.repeats),
    }
    by_length = []
    for length in benchmark.lengths:
        progress(f"time per token at T={length}")
        shape = replace(benchmark.shape, batch=1, length=length)
        by_length += measure(shape, contenders[1:], benchmark.dtype, device, benchmark.repeats)
    memory = []
    if benchmark.memory_length:
        progress(f"memory at T={benchmark.memory_length}")
        shape = replace(benchmark.shape, batch=1, length=benchmark.memory_length)
        memory = [measure_memory(shape, backend, benchmark.dtype, device) for backend in contenders[1:]]
    return result | {"lengths": by_length, "memory": memory}


def gate(benchmark: OpBenchmark, device: torch.device) -> list[dict[str, Any]]:
    """`check` of each backend at the benchmark's widths."""
    shape = replace(
        benchmark.shape, batch=min(benchmark.shape.batch, GATE_BATCH), length=min(benchmark.shape.length, GATE_TOKENS)
    )
    problem = Problem.random(shape, benchmark.dtype, device, initial_state=True)
    return [{"backend": backend} | check(backend, problem) for backend in dict.fromkeys(("reference", *benchmark.backends))]


def measure(
    shape: Shape, backends: Sequence[str], dtype: torch.dtype, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Time of `backends` at `shape`, forward without gradients and forward with backward, taking turns.

    Returns one record per backend: the shape's fields; `forward` and `forward_backward`, each with `seconds` (median, min,
    max), `ns_per_token` (of the median) and, where the reference is among the backends, `speedup` over it (the median of the
    rounds' ratios).
    """
    problem = Problem.random(shape, dtype, device)
    calls = {"forward": _forward, "forward_backward": _forward_backward}
    timings = {
        name: interleaved_seconds({backend: partial(call, problem, backend) for backend in backends}, repeats, device)
        for name, call in calls.items()
    }
    records = []
    for backend in backends:
        record: dict[str, Any] = {"backend": backend} | asdict(shape)
        for name, seconds in timings.items():
            spread = summary(seconds[backend])
            record[name] = {"seconds": spread, "ns_per_token": spread["median"] / shape.tokens * 1e9} | (
                {"speedup": paired_ratio(seconds["reference"], seconds[backend])} if "reference" in seconds else {}
            )
        records.append(record)
    return records


def measure_memory(shape: Shape, backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Peak memory of forward and backward of `backend` at `shape`, inputs included.

    Returns the shape's fields; `peak_bytes`; `input_output_bytes` (update, merge, value, indices, output) and
    `gradient_bytes` (theirs); `ratio` of the peak to inputs and outputs alone, and `ratio_with_gradients` to both.
    """
    problem = Problem.random(shape, dtype, device)
    differentiable = _bytes(problem.update, problem.merge, problem.value) + _bytes(problem.value)
    standing = differentiable + (0 if problem.indices is None else _bytes(problem.indices))
    # The call allocates the output and the gradients of the inputs; the inputs and the output's gradient stand before.
    before = standing - _bytes(problem.value) + _bytes(problem.d_output)
    peak = before + peak_bytes(partial(_forward_backward, problem, backend), device)
    return {"backend": backend} | asdict(shape) | {
        "peak_bytes": peak,
        "input_output_bytes": standing,
        "gradient_bytes": differentiable,
        "ratio": peak / standing,
        "ratio_with_gradients": peak / (standing + differentiable),
    }  # fmt: skip


def _forward(problem: Problem, backend: str) -> Tensor:
    with torch.no_grad():
        return problem.forward(backend, problem.leaves())[0]


def _forward_backward(problem: Problem, backend: str) -> tuple[Tensor, ...]:
    leaves = problem.leaves()
    (output,) = problem.forward(backend, leaves)
    return torch.autograd.grad(output, leaves, problem.d_output)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
