"""The recurrence alone: time per token of each backend and of peers, against each other and against the floor, and memory.

Nothing is timed until every backend has passed the correctness gate at these widths; else `run` raises
`IncorrectBackendError`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from factorization_memory.benchmarks import peers
from factorization_memory.benchmarks.correctness import Problem, check
from factorization_memory.benchmarks.floor import PASSES, Rates, floor, measure_rates
from factorization_memory.benchmarks.interruption import Interruption
from factorization_memory.benchmarks.op_figures import REFERENCE, Records, empty_record, length_spread, timing_figures
from factorization_memory.benchmarks.op_settings import OpBenchmark
from factorization_memory.benchmarks.peers import Contender
from factorization_memory.benchmarks.settings import Shape
from factorization_memory.benchmarks.timing import (
    graph_seconds,
    interleaved_seconds,
    machine,
    on_device,
    peak_bytes,
    reason,
    release,
    tensor_bytes,
)
from factorization_memory.config import ConfigError

GATE_TOKENS = 150
"""Tokens of each sequence in the correctness gate: a few chunks, and few enough for the loop in float64."""
GATE_BATCH = 2
"""Sequences in the gate."""
GATE_LONG = 1100
"""Tokens of the one sequence of the gate's second part, at the longest size: there time may be cut differently."""
ONE_SEQUENCE, CONSTANT_TOKENS = "one sequence", "constant tokens"

Show = Callable[[str, Records], None]


class IncorrectBackendError(RuntimeError):
    """A backend is wrong, so its speed is meaningless. `checks` are the gate's results."""

    def __init__(self, checks: Records) -> None:
        self.checks = checks
        red = [
            f"{result['backend']} at {result['shape']} "
            f"({result['reason'] or 'relative error ' + format(result['error'], '.1e') + ' of ' + result['worst']})"
            for result in checks
            if not result["passed"]
        ]
        super().__init__(f"the correctness gate is red, no speed is measured: {', '.join(red)}")


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
        raise ConfigError(f"backends={benchmark.backends}: the reference is not timed on a GPU; drop it, or use --device cpu")
    with on_device(device):
        return _run(benchmark, device, progress, show)


def _run(benchmark: OpBenchmark, device: torch.device, progress: Callable[[str], None], show: Show) -> dict[str, Any]:
    progress("correctness gate")
    checks = gate(benchmark, device)
    if not all(result["passed"] for result in checks):
        raise IncorrectBackendError(checks)
    show("checks", checks)
    progress("speed of copies and matrix products")
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
            progress("what the peers compute")
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


def measure(
    shape: Shape,
    backends: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    rates: Rates,
    peer_names: Sequence[str] = (),
    missing: dict[str, str] | None = None,
    memory: bool = True,
) -> Records:
    """Time of backends and peers at `shape`, forward without gradients and forward with backward, taking turns.

    Args:
        shape: the size.
        backends: names of backends; the first is the baseline.
        dtype: of values.
        device: where; on a GPU times are the device's own, with cold caches, and also those of a replayed CUDA graph.
        repeats: rounds.
        rates: of the device, for the floor.
        peer_names: of `peers.PEERS`.
        missing: takes the reasons of peers that are not here, which get no record.
        memory: whether to measure that too.

    Returns:
        One record per contender: `contender`, `peer`, `note`, `shape`, the shape's fields, `error` (None, or what it raised
        and in which pass), for each pass (`forward`, `forward_backward`) None or a dict: `seconds` (median, min, max),
        `ns_per_token` (of the median), `graph_ns_per_token` (None where not captured) and `graph_error`,
        `gigabytes_per_second` and `teraflops_per_second` (compulsory bytes and least FLOPs over the time) and
        `ratio_to_floor` (None where the maths are another), and `speedup` over the reference, if that is the baseline,
        otherwise `time_over_first` (over the first backend): medians of the rounds' ratios, None without the baseline;
        `extra_bytes` and `extra_ratio` (None if not measured): peak of forward and backward beyond inputs, output and
        gradients, and that over the bytes of v and y.
    """
    release(device)
    problem = Problem.random(shape, dtype, device, drawn_on=device)
    contenders = [backend_contender(backend, problem) for backend in backends]
    records = {backend: empty_record(backend, shape) for backend in backends}
    for name in peer_names:
        try:
            contender = peers.build(name, problem)
        except peers.MissingPeerError as error:
            if missing is not None:
                missing[name] = str(error)
        except Exception as error:  # a failing peer must not affect the others
            records[name] = empty_record(name, shape, peer=True) | {"error": reason(error)}
        else:
            contenders.append(contender)
            records[name] = empty_record(name, shape, peer=True, note=contender.note)
    floors = floor(shape, dtype, rates)
    for part in PASSES:
        calls = {contender.name: getattr(contender, part) for contender in contenders}
        failures: dict[str, str] = {}
        seconds = interleaved_seconds(calls, repeats, device, cold=True, failures=failures)
        for contender in contenders:
            record = records[contender.name]
            if contender.name in failures:
                record["error"] = record["error"] or f"{part}: {failures[contender.name]}"
                continue
            figures = timing_figures(
                seconds, contender.name, backends[0], shape, floors[part] if contender.same_maths else None
            )
            record[part] = figures | _graph_figures(calls[contender.name], repeats, shape, device)
    if memory:
        for contender in contenders:
            record = records[contender.name]
            if record["forward_backward"] is None or contender.name == REFERENCE:
                continue
            try:
                record["extra_bytes"] = extra = _extra_bytes(contender, device)
            except Exception as error:
                record["error"] = f"memory: {reason(error)}"
            else:
                record["extra_ratio"] = extra / (2 * tensor_bytes(problem.value))
    return list(records.values())


def backend_contender(backend: str, problem: Problem) -> Contender:
    """A backend of the recurrence on `problem`."""
    return Contender(backend, lambda *leaves: problem.forward(backend, leaves)[0], problem.leaves(), problem.d_output)


def _graph_figures(call: Callable[[], Any], repeats: int, shape: Shape, device: torch.device) -> dict[str, Any]:
    figures: dict[str, Any] = {"graph_ns_per_token": None, "graph_error": None}
    if device.type != "cuda":
        return figures
    try:
        figures["graph_ns_per_token"] = statistics.median(graph_seconds(call, repeats, device)) / shape.tokens * 1e9
    except Exception as error:  # not every call can be captured; just report it
        figures["graph_error"] = reason(error)
    return figures


def _extra_bytes(contender: Contender, device: torch.device) -> int:
    """Peak of forward and backward beyond what stands before (inputs, the output's gradient), the output and the gradients."""
    returned = tensor_bytes(contender.d_output, *contender.leaves)
    return max(0, peak_bytes(contender.forward_backward, device) - returned)


def measure_memory(shape: Shape, backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Peak memory of forward and backward of `backend` at `shape`, inputs included.

    Returns the shape's fields; `peak_bytes`; `input_output_bytes` (update, merge, value, indices, output) and
    `gradient_bytes` (theirs); `ratio` of the peak to inputs and outputs alone, and `ratio_with_gradients` to both;
    `extra_bytes` and `extra_ratio` as in `measure`. If the backend raises, `error` says what, and these are None.
    """
    release(device)
    problem = Problem.random(shape, dtype, device, drawn_on=device)
    contender = backend_contender(backend, problem)
    differentiable = tensor_bytes(*contender.leaves, problem.value)
    standing = differentiable + (0 if problem.indices is None else tensor_bytes(problem.indices))
    record: dict[str, Any] = {"backend": backend, "error": None} | asdict(shape)
    record |= {"input_output_bytes": standing, "gradient_bytes": differentiable}
    record |= dict.fromkeys(("peak_bytes", "ratio", "ratio_with_gradients", "extra_bytes", "extra_ratio"))
    try:
        contender.forward_backward()  # one-time allocations of the first call do not count
        beyond = peak_bytes(contender.forward_backward, device)
    except Exception as error:
        record["error"] = reason(error)
    else:
        # The call allocates the output and the gradients of the inputs; the inputs and the output's gradient stand before.
        peak = beyond + standing - tensor_bytes(problem.value) + tensor_bytes(problem.d_output)
        extra = max(0, beyond - tensor_bytes(problem.d_output, *contender.leaves))
        record |= {
            "peak_bytes": peak,
            "ratio": peak / standing,
            "ratio_with_gradients": peak / (standing + differentiable),
            "extra_bytes": extra,
            "extra_ratio": extra / (2 * tensor_bytes(problem.value)),
        }
    return record
