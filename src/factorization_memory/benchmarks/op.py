"""The recurrence alone: time per token of each backend and of peers, against each other and against the floor, and memory.

Nothing is timed until every backend has passed the correctness gate at these widths; else `run` raises
`IncorrectBackendError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from factorization_memory.benchmarks import peers
from factorization_memory.benchmarks.correctness import IncorrectBackendError, Problem, check
from factorization_memory.benchmarks.floor import floor, measure_rates
from factorization_memory.benchmarks.interruption import Interruption
from factorization_memory.benchmarks.op_figures import REFERENCE, Records, length_spread
from factorization_memory.benchmarks.op_measuring import measure, measure_memory
from factorization_memory.benchmarks.op_settings import OpBenchmark
from factorization_memory.benchmarks.settings import Shape
from factorization_memory.benchmarks.timing import machine, on_device, release
from factorization_memory.config import ConfigError

GATE_TOKENS = 150
"""Tokens of each sequence in the correctness gate: a few chunks, and few enough for the loop in float64."""
GATE_BATCH = 2
"""Sequences in the gate."""
GATE_LONG = 1100
"""Tokens of the one sequence of the gate's second part, at the longest size: there time may be cut differently."""
ONE_SEQUENCE, CONSTANT_TOKENS = "one sequence", "constant tokens"

Show = Callable[[str, Records], None]


def run(
    benchmark: OpBenchmark,
    device: torch.device,
    progress: Callable[[str], None] = lambda what: None,
    show: Show = lambda section, records: None,
) -> dict[str, Any]:
    """All measurements.

    Args:
        benchmark: what to measure.
        device: where.
        progress: called with what comes next, for people.
        show: called with "checks", "comparison" (once for each shape), "lengths" or "memory" and the records of that part as
            soon as they are there.

    Returns:
        `machine`; `dtype`; `checks` (the gate's); `rates` of the device; `baseline`, the contender that all are compared with;
        `floors`, by shape; `comparison`, one record per shape and contender; `missing`, why a peer is not there, by name;
        `same_maths`, how far peers that compute the recurrence are from it; `lengths`, one record per sweep, length and
        backend; `length_spread`, the slowest over the fastest time per token of each whole sweep and backend; `memory`, one
        record per backend; `interrupted`, the name of the signal that ended the measuring early, or None.

    Raises:
        IncorrectBackendError: a backend is wrong or cannot run.
        ConfigError: the reference is to be timed on a GPU.
    """
    if device.type == "cuda" and REFERENCE in benchmark.backends:
        raise ConfigError(f"backends={benchmark.backends}: the reference is not timed on GPUs; drop it, or use --device cpu")
    with on_device(device):
        return _run(benchmark, device, progress, show)


def _run(benchmark: OpBenchmark, device: torch.device, progress: Callable[[str], None], show: Show) -> dict[str, Any]:
    progress("correctness gate")
    checks = gate(benchmark, device)
    if not all(result["passed"] for result in checks):
        raise IncorrectBackendError(checks)
    show("checks", checks)
    progress("measuring the speed of copies and matrix products")
    rates = measure_rates(device)
    dtype = getattr(torch, benchmark.dtype)
    backends = tuple(backend for backend in benchmark.backends_on(device.type) if backend != REFERENCE)
    contenders = backends if device.type == "cuda" else (REFERENCE, *backends)
    result: dict[str, Any] = {
        "machine": machine(device),
        "dtype": benchmark.dtype,
        "checks": checks,
        "rates": rates.asdict(),
        "baseline": contenders[0],
        "floors": {str(shape): floor(shape, dtype, rates) for shape in benchmark.sizes},
    }
    comparison: Records = []
    missing: dict[str, str] = {}
    same_maths: Records = []
    lengths: Records = []
    memory: Records = []
    with Interruption() as interruption:
        for shape in dict.fromkeys(benchmark.sizes):
            interruption.check()
            progress(f"{', '.join((*contenders, *benchmark.peers))} at {shape}")
            found = measure(shape, contenders, dtype, device, benchmark.repeats, rates, benchmark.peers, missing)
            comparison += found
            show("comparison", found)
        # After the peers were timed, not before: see `peers.same_maths`.
        measured = [name for name in benchmark.peers if name not in missing]
        if peers.GLA in measured:
            progress("checking what the peers compute")
            for shape in _gate_shapes(benchmark.sizes):
                interruption.check()
                problem = Problem.random(shape, dtype, device)
                same_maths.append({"shape": str(shape)} | peers.same_maths(peers.GLA, problem))
        swept: dict[Shape, Records] = {}
        for sweep, shape in _sweep(benchmark):
            interruption.check()
            if shape not in swept:
                progress(f"time per token at B={shape.batch}, T={shape.length}")
                swept[shape] = measure(shape, backends, dtype, device, benchmark.repeats, rates, memory=False)
            lengths += [{"sweep": sweep} | record for record in swept[shape]]
        for backend in backends if benchmark.memory_length else ():
            interruption.check()
            progress(f"memory at T={benchmark.memory_length}")
            shape = replace(benchmark.sizes[0], batch=1, length=benchmark.memory_length)
            memory.append(measure_memory(shape, backend, dtype, device))
    for section, records in (("lengths", lengths), ("memory", memory)):
        if records:
            show(section, records)
    return result | {
        "comparison": comparison,
        "missing": missing,
        "same_maths": same_maths,
        "lengths": lengths,
        "length_spread": [] if interruption.signal else length_spread(lengths),
        "memory": memory,
        "interrupted": interruption.signal,
    }


def gate(benchmark: OpBenchmark, device: torch.device) -> Records:
    """`check` of each backend at the widths of each shape, and over a longer sequence at the longest; each result with its
    `backend` and `shape`."""
    backends = benchmark.backends_on(device.type)
    if device.type != "cuda":
        backends = tuple(dict.fromkeys((REFERENCE, *backends)))
    sizes = [(shape, backends) for shape in _gate_shapes(benchmark.sizes)]
    every = [*benchmark.sizes, *(shape for _, shape in _sweep(benchmark))]
    longest = max(every, key=lambda shape: shape.length)
    if longest.length > GATE_TOKENS:
        long = replace(longest, batch=1, length=min(longest.length, GATE_LONG))
        sizes.append((long, tuple(backend for backend in backends if backend != REFERENCE)))
    results = []
    for shape, tested in sizes:
        release(device)
        problem = Problem.random(shape, getattr(torch, benchmark.dtype), device, initial_state=True)
        results += [{"backend": backend, "shape": str(shape)} | check(backend, problem) for backend in tested]
    return results


def _gate_shapes(shapes: Iterable[Shape]) -> list[Shape]:
    small = (replace(x, batch=min(x.batch, GATE_BATCH), length=min(x.length, GATE_TOKENS)) for x in shapes)
    return list({(x.heads, x.num_states, x.value_size, x.top_k): x for x in small}.values())


def _sweep(benchmark: OpBenchmark) -> list[tuple[str, Shape]]:
    """Sizes of the sweeps over length, by name of the sweep."""
    first = benchmark.sizes[0]
    sizes = [(ONE_SEQUENCE, replace(first, batch=1, length=length)) for length in benchmark.lengths]
    if benchmark.length_tokens:
        batches = [(max(1, benchmark.length_tokens // length), length) for length in benchmark.lengths]
        sizes += [(CONSTANT_TOKENS, replace(first, batch=batch, length=length)) for batch, length in batches]
    return sizes
