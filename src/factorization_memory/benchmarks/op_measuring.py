"""Time and memory of the recurrence at one size, of each backend and of peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from factorization_memory.benchmarks import peers
from factorization_memory.benchmarks.correctness import Problem
from factorization_memory.benchmarks.floor import PASSES, Rates, floor
from factorization_memory.benchmarks.op_figures import REFERENCE, Records, empty_record, timing_figures
from factorization_memory.benchmarks.peers import Contender
from factorization_memory.benchmarks.settings import Shape
from factorization_memory.benchmarks.timing import (
    graph_seconds,
    interleaved_seconds,
    peak_bytes,
    reason,
    release,
    tensor_bytes,
)


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
                record["extra_bytes"] = extra = _extra_bytes(contender, peak_bytes(contender.forward_backward, device))
            except Exception as error:
                record["error"] = f"memory: {reason(error)}"
            else:
                record["extra_ratio"] = extra / (2 * tensor_bytes(problem.value))
    return list(records.values())


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
        extra = _extra_bytes(contender, beyond)
        record |= {
            "peak_bytes": peak,
            "ratio": peak / standing,
            "ratio_with_gradients": peak / (standing + differentiable),
            "extra_bytes": extra,
            "extra_ratio": extra / (2 * tensor_bytes(problem.value)),
        }
    return record


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


def _extra_bytes(contender: Contender, peak: int) -> int:
    """The `peak` of forward and backward beyond what stands before (inputs, the output's gradient), less the output and the
    gradients."""
    return max(0, peak - tensor_bytes(contender.d_output, *contender.leaves))
