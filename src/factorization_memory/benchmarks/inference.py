"""Reading prompts and writing tokens with whole models of random weights: time to the first token, and latency of each further
one, over the tokens read, the sequences at once and the memory states that a token selects.

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
from torch import Tensor

from factorization_memory.benchmarks.floor import Rates, measure_rates
from factorization_memory.benchmarks.inference_contender import Contender, Step
from factorization_memory.benchmarks.inference_rounds import Reading, Writing, most_steps
from factorization_memory.benchmarks.interruption import Interruption
from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.benchmarks.timing import machine, on_device, reason, release, tensor_bytes
from factorization_memory.generation import LoopSteps, Steps, default_chunk, prefill_batch, steps_for, weights_dtype, with_dtype
from factorization_memory.layers import LayerState
from factorization_memory.models import LanguageModel

OURS = "ours"

Records = list[dict[str, Any]]
Show = Callable[[Records], None]


class Ours:
    """`LanguageModel`, with `generation`'s way of reading and stepping."""

    growth = 1.0

    def __init__(self, benchmark: InferenceBenchmark, top_k: int | None, device: torch.device) -> None:
        config = replace(benchmark.model, top_k=top_k)
        torch.manual_seed(0)
        self.model = with_dtype(LanguageModel(config).to(device).eval(), weights_dtype(benchmark.precision, device))
        self.top_k = None if top_k == config.num_states else top_k
        self.name = OURS if benchmark.model.top_k == top_k and not benchmark.top_k else f"{OURS} {_form(self.top_k)}"
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.weight_bytes = tensor_bytes(*self.model.parameters())
        self.chunk = benchmark.prefill_chunk or default_chunk(device)
        self.steps: Steps | None = None
        self.invented: int | None = None

    def begin(self, batch: int, steps: int) -> None:
        """Allocates the state of `batch` sequences, on a GPU with the graph of its step."""
        self.steps = steps_for(self.model, batch)

    def read(self, tokens: Tensor) -> Tensor:
        """Reads int64 `[B, T]` from the beginning; logits `[B, V]` of the next token."""
        logits, state = prefill_batch(self.model, list(tokens), self.chunk)
        # The prompt that a warm-up reads may be of fewer sequences.
        room = self._room()
        room.load(state, None if state.batch_size == room.batch_size else list(range(state.batch_size)))
        self.invented = None
        return logits

    def invent(self, context: int) -> None:
        """Fills the state with random numbers, as if it had read `context` tokens: its size is that of any text."""
        for tensor in self._room().state.tensors():
            if tensor.is_floating_point():  # the rest are indices, set by the first step
                tensor.normal_()
        self.invented = context

    def keep(self) -> Callable[[], None]:
        """Remembers the state; the result brings it back."""
        if self.invented is not None:
            return partial(self.invent, self.invented)
        room = self._room()
        return partial(room.load, room.state.clone())

    def modes(self) -> dict[str, Step]:
        """Steps by name."""
        steps = self._room()
        eager: Step = lambda tokens: self.model.step(tokens, steps.state)[0]  # noqa: E731
        if isinstance(steps, LoopSteps):
            return {"eager": eager, "loops": steps.step}
        return {"eager": eager, "graph": steps.step} if steps.captured else {"eager": eager}

    def state_bytes(self) -> int:
        """Bytes of the state."""
        return self._room().state.num_bytes

    def step_bytes(self) -> int:
        """Bytes that a step must move: the weights once, the states that it touches in and out."""
        room, config = self._room(), self.model.config
        weights = self.weight_bytes
        if not config.tie_word_embeddings:  # a table to look B rows up in, and not also the head's weight
            rows = self.model.embedding.weight
            weights -= tensor_bytes(rows) - room.batch_size * tensor_bytes(rows[0])
        memories = [layer.memory for layer in room.state if isinstance(layer, LayerState)]
        moved = room.state.num_bytes - tensor_bytes(*memories)
        touched = sum(tensor_bytes(memory) * (self.top_k or config.num_states) // config.num_states for memory in memories)
        # With a lag other states are read than those that are read and written.
        read_alone = touched if config.update_lag and self.top_k else 0
        return weights + 2 * (moved + touched) + read_alone

    def end(self) -> None:
        """Frees the state."""
        self.steps = None

    def _room(self) -> Steps:
        assert self.steps is not None, "begin comes first"
        return self.steps


def _form(top_k: int | None) -> str:
    return "dense" if top_k is None else f"K={top_k}"


def _our_contenders(benchmark: InferenceBenchmark, device: torch.device) -> Iterator[Contender]:
    for top_k in dict.fromkeys(k or None for k in benchmark.top_k) if benchmark.top_k else [benchmark.model.top_k]:
        yield Ours(benchmark, top_k, device)


def _llama(benchmark: InferenceBenchmark, device: torch.device) -> Iterator[Contender]:
    from factorization_memory.benchmarks.inference_peers import Llama

    yield Llama(benchmark, device)


CONTENDERS: dict[str, Callable[[InferenceBenchmark, torch.device], Iterator[Contender]]] = {
    OURS: _our_contenders,
    "llama": _llama,
}
"""By name, what makes the models to measure, one after the other."""


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
        contexts; and `records`, one per model, number of sequences and context:

        `contender`, `peer`, `top_k`, `parameters`, `weight_bytes`, `batch`, `context`, `error` (None, or what it raised);
        `state`, "read" (the steps go on from `context` tokens that were read) or "random" (from random numbers);
        `state_bytes` of all sequences, `step_bytes` (what a step cannot but move) and `floor_seconds`, these over the rate
        of copies; `prefill`, None if nothing was read, or `seconds` (median, min, max) to the first token of every sequence,
        `repeats` and `tokens_per_second`; `decode`, by mode: `tokens` timed, `seconds` of a step (median, min, max, p99),
        `tokens_per_second` of all sequences (at the median) and `ratio_to_floor`.
    """
    with on_device(device), torch.no_grad():
        return _run(benchmark, device, progress, show)


def _run(benchmark: InferenceBenchmark, device: torch.device, progress: Callable[[str], None], show: Show) -> dict[str, Any]:
    progress("measuring the speed of copies and matrix products")
    rates = measure_rates(device)
    release(device)
    records: Records = []
    missing: dict[str, str] = {}
    first = 0  # first record of the current model
    with Interruption() as interruption:
        for kind in (OURS, *dict.fromkeys(benchmark.peers)):
            contenders = CONTENDERS[kind](benchmark, device)
            while True:
                try:
                    contender = next(contenders, None)
                except ImportError as error:
                    missing[kind] = f"{error}; pip install transformers"
                    break
                if contender is None:
                    break
                interruption.check()
                first = len(records)
                _measure(contender, kind != OURS, benchmark, device, rates, progress, records)
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
    device: torch.device,
    rates: Rates,
    progress: Callable[[str], None],
    records: Records,
) -> None:
    """Adds the records of one model to `records`."""
    for batch in sorted(dict.fromkeys(benchmark.batches)):
        found = []
        for context in sorted(dict.fromkeys(benchmark.contexts)):
            record: dict[str, Any] = {
                "contender": contender.name,
                "peer": peer,
                "top_k": contender.top_k,
                "parameters": contender.parameters,
                "weight_bytes": contender.weight_bytes,
                "batch": batch,
                "context": context,
            }
            record |= dict.fromkeys(("error", "state", "state_bytes", "step_bytes", "floor_seconds", "prefill"))
            found.append(record | {"decode": {}})
        records += found
        try:
            contender.begin(batch, most_steps(benchmark))
            _measure_batch(contender, found, benchmark, device, rates, progress)
        except Exception as error:  # a size that does not fit is a result, and others may fit
            for record in found:
                record["error"] = record["error"] or reason(error)
        contender.end()
        release(device)


def _measure_batch(
    contender: Contender,
    records: Records,
    benchmark: InferenceBenchmark,
    device: torch.device,
    rates: Rates,
    progress: Callable[[str], None],
) -> None:
    """Fills the records of one number of sequences, by context."""
    reading = Reading(contender, benchmark, device)
    writing: list[tuple[dict[str, Any], Writing]] = []
    for record in records:
        progress(f"{contender.name}: {record['batch']} x {record['context']:,} tokens")
        with _failing_alone(record, device):
            record["prefill"] = reading.prefill(record["batch"], record["context"])
            if record["prefill"] is None:
                contender.invent(record["context"])
            record["state"] = "random" if record["prefill"] is None else "read"
            record |= {"state_bytes": contender.state_bytes(), "step_bytes": contender.step_bytes()}
            record["floor_seconds"] = record["step_bytes"] / rates.copy_bytes_per_second
            writing.append((record, Writing(contender, benchmark, record["batch"], device)))
    # Contexts are interleaved, like the modes of a step, so that slow phases of the machine do not bias one of them.
    for number in range(benchmark.repeats):
        progress(f"{contender.name}: {records[0]['batch']} sequences decoding, round {number + 1}")
        for record, one in writing:
            if record["error"] is None:
                with _failing_alone(record, device):
                    one.round()
    for record, one in writing:
        if record["error"] is None:
            record["decode"] = one.figures(record["floor_seconds"])


@contextmanager
def _failing_alone(record: dict[str, Any], device: torch.device) -> Iterator[None]:
    """A block whose failure is recorded and does not affect anything else."""
    try:
        yield
    except Exception as error:
        record["error"] = reason(error)
    if record["error"] is not None:
        release(device)  # here, where the error no longer references what was allocated


def _spread(records: Records) -> Records:
    """The slowest over the fastest median latency of each model, number of sequences and mode over the contexts."""
    grouped: dict[tuple[str, int, str], list[float]] = {}
    for record in records:
        for mode, figures in record["decode"].items():
            grouped.setdefault((record["contender"], record["batch"], mode), []).append(figures["seconds"]["median"])
    return [
        {"contender": contender, "batch": batch, "mode": mode, "slowest_over_fastest": max(times) / min(times)}
        for (contender, batch, mode), times in grouped.items()
    ]
