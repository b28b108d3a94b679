"""One decoding step of the recurrence alone, and steps taken back: their time beside what the device takes to copy as much.

A step reads and writes K rows of each head's memory, all M in the dense form. In a model the other layers' weights and memories
pass through the caches between two steps of a layer. So here every step has its own token, and steps go round over as many rows
as do not fit a cache (`touched_bytes`), in as many memories as that takes.

Nothing is timed before every size has been found right: `run` raises `IncorrectBackendError`.

Shapes: N steps in rotation, S memories of all sequences, B sequences, H heads, M memory states, K selected states (M in the
dense form), D value width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from factorization_memory.benchmarks.correctness import IncorrectBackendError
from factorization_memory.benchmarks.floor import Rates, measure_rates
from factorization_memory.benchmarks.interruption import Interruption
from factorization_memory.benchmarks.settings import StepBenchmark
from factorization_memory.benchmarks.step_contenders import Contender, Tokens, backend_of, rounds_at_random
from factorization_memory.benchmarks.step_correctness import check
from factorization_memory.benchmarks.timing import (
    interleaved_seconds,
    machine,
    on_device,
    paired_ratio,
    reason,
    release,
    summary,
)
from factorization_memory.ops import recurrence_undo

COPY = "copy"

Records = list[dict[str, Any]]
Show = Callable[[str, Records], None]


def run(
    benchmark: StepBenchmark,
    device: torch.device,
    progress: Callable[[str], None] = lambda what: None,
    show: Show = lambda section, records: None,
) -> dict[str, Any]:
    """All measurements.

    Args:
        benchmark: what to measure.
        device: where. On a GPU the time is that of a replayed CUDA graph of all steps in rotation, elsewhere the host's.
        progress: called with what comes next, for people.
        show: called with "checks" and the gate's results, then, for each number of sequences and memory states, with "steps"
            and "rollbacks" and their records.

    Returns:
        `machine`; `dtype` of values; `checks`, the gate's results; `rates` of the device; `steps`, one record per size and
        dtype of the memory, and `rollbacks`, one per sparse size and number of steps taken back; `interrupted`, the name of
        the signal that ended the measuring early, or None.

        Each has `shape` and its fields, and `error` (None, or what it raised). A record of `steps` has `state`, the
        memory's dtype; `steps`, `memories` and `touched_bytes` of the rotation; `seconds` of a step (median, min, max);
        `step_bytes`, the rows read and written; `bytes_per_second`; `copy_share`, that over the rate of copies; and
        `speedup`, the time of the dense step of a float32 memory over this one's (median of the rounds' ratios; None
        without it). A record of `rollbacks` has `count`; `seconds` of taking back so many steps at once; `copy_seconds` of
        copying the whole memory; and `copy_over_rollback`, the median of the rounds' ratios.

    Raises:
        IncorrectBackendError: a step is wrong or cannot run.
    """
    with on_device(device), torch.no_grad():
        return _run(benchmark, device, progress, show)


def _run(benchmark: StepBenchmark, device: torch.device, progress: Callable[[str], None], show: Show) -> dict[str, Any]:
    sizes = [(batch, states) for batch in sorted({*benchmark.batches}) for states in sorted({*benchmark.num_states})]
    groups = [made for batch, states in sizes if (made := _contenders(benchmark, batch, states, device))]
    checks = []
    for contender in (contender for group in groups for contender in group):
        progress(f"correctness gate: {contender}")
        checks.append(check(contender, getattr(torch, benchmark.dtype_on(device.type)), device))
        release(device)
    if not all(result["passed"] for result in checks):
        raise IncorrectBackendError(checks)
    show("checks", checks)
    progress("measuring the speed of copies and matrix products")
    rates = measure_rates(device)
    release(device)
    steps: Records = []
    rollbacks: Records = []
    with Interruption() as interruption:
        for group in groups:
            interruption.check()
            progress(f"B={group[0].shape.batch}, M={group[0].shape.num_states}")
            measured, taken_back = _measure(group, benchmark, device, rates)
            steps += measured
            rollbacks += taken_back
            release(device)
            show("steps", measured)
            if taken_back:
                show("rollbacks", taken_back)
    return {
        "machine": machine(device),
        "dtype": benchmark.dtype_on(device.type),
        "checks": checks,
        "rates": rates.asdict(),
        "steps": steps,
        "rollbacks": rollbacks,
        "interrupted": interruption.signal,
    }


def _contenders(benchmark: StepBenchmark, batch: int, num_states: int, device: torch.device) -> list[Contender]:
    result = []
    dtype = getattr(torch, benchmark.dtype_on(device.type))
    for shape in benchmark.shapes(batch, num_states):
        least = max((1, *benchmark.rollbacks)) if shape.top_k else 1
        result.append(Contender(shape, torch.float32, least))
        if rounds_at_random(dtype, device):
            result.append(Contender(shape, torch.bfloat16, 1))
    return result


def _measure(group: list[Contender], benchmark: StepBenchmark, device: torch.device, rates: Rates) -> tuple[Records, Records]:
    """Records of steps and of steps taken back at one number of sequences and of memory states."""
    counts = sorted({*benchmark.rollbacks})
    steps = {contender: _step_record(contender) for contender in group}
    sparse = [contender for contender in group if contender.shape.top_k and contender.state == torch.float32]
    rollbacks = {(contender, count): _rollback_record(contender, count) for contender in sparse for count in counts}
    failures: dict[str, str] = {}
    try:
        calls = _calls(group, sparse, counts, getattr(torch, benchmark.dtype_on(device.type)), device)
        repeated = {name: number for name, (_, number) in calls.items()}
        prepared = {name: _captured(call, device) for name, (call, _) in calls.items()}
        whole = interleaved_seconds(prepared, benchmark.repeats, device, failures=failures)
        seconds = {name: [spent / repeated[name] for spent in every] for name, every in whole.items()}
    except Exception as error:  # a size that does not fit is a result, and others may fit
        why = reason(error)
        for record in (*steps.values(), *rollbacks.values()):
            record["error"] = why
        return list(steps.values()), list(rollbacks.values())
    dense = next((str(c) for c in group if c.shape.top_k is None and c.state == torch.float32), None)
    for contender, record in steps.items():
        if (name := str(contender)) in failures:
            record["error"] = failures[name]
            continue
        record["seconds"] = summary(seconds[name])
        record["bytes_per_second"] = record["step_bytes"] / record["seconds"]["median"]
        record["copy_share"] = record["bytes_per_second"] / rates.copy_bytes_per_second
        if dense in seconds:
            record["speedup"] = paired_ratio(seconds[dense], seconds[name])
    for (contender, count), record in rollbacks.items():
        name = _rollback(contender, count)
        if name in failures or COPY in failures:
            record["error"] = failures.get(name, failures.get(COPY))
            continue
        record |= {"seconds": summary(seconds[name]), "copy_seconds": summary(seconds[COPY])}
        record["copy_over_rollback"] = paired_ratio(seconds[COPY], seconds[name])
    return list(steps.values()), list(rollbacks.values())


def _step_record(contender: Contender) -> dict[str, Any]:
    record = {"shape": str(contender.shape)} | asdict(contender.shape) | {"state": contender.state_name, "error": None}
    record |= {"steps": contender.steps, "memories": contender.memories}
    record |= {"touched_bytes": contender.steps * contender.row_bytes, "step_bytes": 2 * contender.row_bytes}
    return record | dict.fromkeys(("seconds", "bytes_per_second", "copy_share", "speedup"))


def _rollback_record(contender: Contender, count: int) -> dict[str, Any]:
    record = {"shape": str(contender.shape)} | asdict(contender.shape) | {"count": count, "error": None}
    return record | dict.fromkeys(("seconds", "copy_seconds", "copy_over_rollback"))


def _rollback(contender: Contender, count: int) -> str:
    return f"{contender} {count} back"


def _calls(
    group: list[Contender], sparse: list[Contender], counts: list[int], dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Callable[[], None], int]]:
    """By name, a call that goes once round, and how many of what is measured it does."""
    memories: dict[torch.dtype, Tensor] = {}
    first = group[0].shape
    for state in dict.fromkeys(contender.state for contender in group):
        number = max(contender.memories for contender in group if contender.state == state)
        sizes = (number, first.batch, first.heads, first.num_states, first.value_size)
        memories[state] = torch.randn(sizes, device=device).to(state)  # [S, B, H, M, D]
    calls: dict[str, tuple[Callable[[], None], int]] = {}
    for contender in group:
        tokens = Tokens.random(contender.shape, contender.steps, dtype, device)
        calls[str(contender)] = _stepping(contender, tokens, memories[contender.state], device), contender.steps
        if contender in sparse:
            aside = torch.randn(contender.steps, *tokens.update.shape[1:], contender.shape.value_size, device=device)
            for count in counts:
                back = _taking_back(contender, tokens, memories[contender.state], aside, count)
                calls[_rollback(contender, count)] = back, contender.steps // count
    if sparse and counts:
        source = memories[torch.float32]
        target = torch.empty_like(source)

        def copy() -> None:
            for number in range(len(source)):
                target[number].copy_(source[number])

        calls[COPY] = copy, len(source)
    return calls


def _stepping(contender: Contender, tokens: Tokens, memories: Tensor, device: torch.device) -> Callable[[], None]:
    backend, seed = backend_of(contender, device)
    of_steps = [memories[contender.memory_of(number)] for number in range(contender.steps)]

    def steps() -> None:
        for number, state in enumerate(of_steps):
            tokens.step(number, state, backend, seed)

    return steps


def _taking_back(contender: Contender, tokens: Tokens, memories: Tensor, aside: Tensor, count: int) -> Callable[[], None]:
    """Takes `count` steps back at once, as often as the rotation has as many; `aside` `[N, B, H, K, D]` is what they put
    aside."""
    assert tokens.indices is not None
    position = torch.zeros(1, dtype=torch.int64, device=aside.device)
    parts = []
    for first in range(0, contender.steps // count * count, count):
        rows, chosen = (x[first : first + count, :, None] for x in (aside, tokens.indices))
        parts.append((memories[contender.memory_of(first)], rows, chosen))

    def back() -> None:
        for state, rows, chosen in parts:
            recurrence_undo(state, rows, chosen, None, position, count)

    return back


def _captured(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`call`, on a GPU as the replay of a CUDA graph of it."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()  # one-time setup must not be captured
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
