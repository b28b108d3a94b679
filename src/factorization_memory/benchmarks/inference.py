"""Reading prompts and writing tokens with whole models of random weights: time to the first token, and latency of each further
one, over the tokens read, the sequences at once and the memory states that a token selects; on a GPU also the peak memory.

A step maps one token of each sequence to the likeliest next one, which the next step reads; the host waits for it, as any
program that displays text must. It is measured as `eager`, with kernels launched one by one from Python, and on a GPU also as
`graph`, replayed as a CUDA graph, as in `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from factorization_memory.benchmarks.device_memory import DeviceMemory
from factorization_memory.benchmarks.floor import Rates, measure_rates
from factorization_memory.benchmarks.inference_contender import Contender
from factorization_memory.benchmarks.inference_models import AttentionModel, RecurrentModel
from factorization_memory.benchmarks.inference_record import InferenceRecord, LatencySpread
from factorization_memory.benchmarks.inference_rounds import Reading, Writing, most_steps
from factorization_memory.benchmarks.interruption import Interruption
from factorization_memory.benchmarks.matched_peers import MATCHED_PEERS, matched_peer
from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.benchmarks.timing import machine, on_device, reason, release
from factorization_memory.generation import default_chunk, weights_dtype

OURS = "ours"

Records = list[InferenceRecord]
Show = Callable[[Records], None]
MakeContender = Callable[[], Contender]


def _our_models(benchmark: InferenceBenchmark, device: torch.device) -> list[MakeContender]:
    """What makes our model, one for each `top_k`."""
    made: list[MakeContender] = []
    for top_k in dict.fromkeys(k or None for k in benchmark.top_k) if benchmark.top_k else [benchmark.model.top_k]:
        form = "dense" if top_k in (None, benchmark.model.num_states) else f"K={top_k}"
        name = f"{OURS} {form}" if benchmark.top_k else OURS
        made.append(partial(RecurrentModel, name, replace(benchmark.model, top_k=top_k), benchmark, device))
    return made


def _llama(benchmark: InferenceBenchmark, device: torch.device) -> Contender:
    from factorization_memory.benchmarks.inference_peers import Llama

    return Llama(benchmark, device)


def _peer(peer: str, benchmark: InferenceBenchmark, device: torch.device) -> MakeContender:
    """What makes a peer. Raises ConfigError if it cannot be as large as our model."""
    if peer not in MATCHED_PEERS:
        return partial(_llama, benchmark, device)
    kind = AttentionModel if peer == "transformer" else RecurrentModel
    return partial(kind, peer, matched_peer(benchmark, peer), benchmark, device)


def run(
    benchmark: InferenceBenchmark,
    device: torch.device,
    progress: Callable[[str], None] = lambda what: None,
    show: Show = lambda records: None,
) -> dict[str, Any]:
    """All measurements.

    Args:
        benchmark: what to measure.
        device: where.
        progress: called with what comes next, for people.
        show: called with the records of each model as soon as they are there.

    Returns:
        `machine`; `dtype` of the weights; `prefill_chunk`; `rates` of the device; `missing`, why a peer is not there, by name;
        `interrupted`, the name of the signal that ended the measuring early, or None (it is the `error` of records that it cut
        short; those that it left out are not there);
        `spread`, one record per model, number of sequences and mode: `slowest_over_fastest` median latency over the
        contexts (`LatencySpread`); and `records`, one `InferenceRecord` per model, number of sequences and context.

    Raises:
        ConfigError: a peer cannot be as large as our model; raised before anything is measured.
    """
    with on_device(device), torch.no_grad():
        return _run(benchmark, device, progress, show)


def _run(benchmark: InferenceBenchmark, device: torch.device, progress: Callable[[str], None], show: Show) -> dict[str, Any]:
    makers = [(OURS, make) for make in _our_models(benchmark, device)]
    makers += [(peer, _peer(peer, benchmark, device)) for peer in dict.fromkeys(benchmark.peers)]
    progress("measuring the speed of copies and matrix products")
    rates = measure_rates(device)
    release(device)
    records: Records = []
    missing: dict[str, str] = {}
    first = 0  # first record of the current model
    with Interruption() as interruption:
        for kind, make in makers:
            memory = DeviceMemory(device)
            try:
                contender = make()
            except ImportError as error:
                missing[kind] = f"{error}; pip install transformers"
                continue
            interruption.check()
            first = len(records)
            _measure(contender, kind != OURS, benchmark, memory, rates, progress, records)
            show(records[first:])
            del contender
            release(device)
    cut_short = [record for record in records if not record["decode"] and record["error"] is None]
    if interruption.signal is not None and cut_short:
        for record in cut_short:
            record["error"] = f"stopped by {interruption.signal}"
        show(records[first:])
    return {
        "machine": machine(device),
        "dtype": str(weights_dtype(benchmark.precision, device)).removeprefix("torch."),
        "prefill_chunk": benchmark.prefill_chunk or default_chunk(device),
        "rates": rates.asdict(),
        "missing": missing,
        "spread": [] if interruption.signal else _spread(records),
        "interrupted": interruption.signal,
        "records": records,
    }


def _measure(
    contender: Contender,
    peer: bool,
    benchmark: InferenceBenchmark,
    memory: DeviceMemory,
    rates: Rates,
    progress: Callable[[str], None],
    records: Records,
) -> None:
    """Adds the records of one model to `records`."""
    for batch in sorted(dict.fromkeys(benchmark.batches)):
        found: Records = [
            {
                "contender": contender.name,
                "peer": peer,
                "top_k": contender.top_k,
                "parameters": contender.parameters,
                "weight_bytes": contender.weight_bytes,
                "batch": batch,
                "context": context,
                "error": None,
                "state": None,
                "state_bytes": None,
                "peak_bytes": None,
                "step_bytes": None,
                "floor_seconds": None,
                "prefill": None,
                "decode": {},
            }
            for context in sorted(dict.fromkeys(benchmark.contexts))
        ]
        records += found
        others = memory.others
        try:
            contender.begin(batch, most_steps(benchmark))
            _measure_batch(contender, found, benchmark, memory, rates, progress)
        except Exception as error:  # a size that does not fit is a result, and others may fit
            for record in found:
                record["error"] = record["error"] or reason(error)
        contender.end()
        release(memory.device)
        memory.others = others


def _measure_batch(
    contender: Contender,
    records: Records,
    benchmark: InferenceBenchmark,
    memory: DeviceMemory,
    rates: Rates,
    progress: Callable[[str], None],
) -> None:
    """Fills the records of one number of sequences, by context."""
    reading = Reading(contender, benchmark, memory.device)
    writing: list[tuple[InferenceRecord, float, Writing]] = []
    own = memory.allocated() - memory.others
    for record in records:
        progress(f"{contender.name}: {record['batch']} x {record['context']:,} tokens")
        memory.others = memory.allocated() - own  # what the states of other contexts take is theirs
        with _failing_alone(record, memory.device):
            memory.start()
            record["prefill"] = reading.prefill(record["batch"], record["context"])
            prefill_peak = None if record["prefill"] is None else memory.peak_bytes()
            if record["prefill"] is None:
                contender.invent(record["context"])
            record["state"] = "random" if record["prefill"] is None else "read"
            record["state_bytes"] = contender.state_bytes()
            record["step_bytes"] = step_bytes = contender.step_bytes()
            record["floor_seconds"] = floor_seconds = step_bytes / rates.copy_bytes_per_second
            one = Writing(contender, benchmark, record["batch"], memory)
            if one.peak_bytes is not None:
                record["peak_bytes"] = {"prefill": prefill_peak, "decode": one.peak_bytes}
            writing.append((record, floor_seconds, one))
    # Contexts are interleaved, like the modes of a step, so that slow phases of the machine do not bias one of them.
    for number in range(benchmark.repeats):
        progress(f"{contender.name}: {records[0]['batch']} sequences decoding, round {number + 1}")
        for record, _, one in writing:
            if record["error"] is None:
                with _failing_alone(record, memory.device):
                    one.round()
    for record, floor_seconds, one in writing:
        if record["error"] is None:
            record["decode"] = one.figures(floor_seconds)


@contextmanager
def _failing_alone(record: InferenceRecord, device: torch.device) -> Iterator[None]:
    """A block whose failure is recorded and does not affect anything else."""
    try:
        yield
    except Exception as error:
        record["error"] = reason(error)
    if record["error"] is not None:
        release(device)  # here, where the error no longer references what was allocated


def _spread(records: Records) -> list[LatencySpread]:
    """The slowest over the fastest median latency of each model, number of sequences and mode over the contexts."""
    grouped: dict[tuple[str, int, str], list[float]] = {}
    for record in records:
        for mode, figures in record["decode"].items():
            grouped.setdefault((record["contender"], record["batch"], mode), []).append(figures["seconds"]["median"])
    return [
        {"contender": contender, "batch": batch, "mode": mode, "slowest_over_fastest": max(times) / min(times)}
        for (contender, batch, mode), times in grouped.items()
    ]
