"""Times prefill and decoding of a model: prompts unless they would take too long, steps in rounds."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from factorization_memory.benchmarks.device_memory import DeviceMemory
from factorization_memory.benchmarks.inference_contender import Contender, Step
from factorization_memory.benchmarks.inference_record import DecodeFigures, PrefillFigures, TokenSeconds
from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.benchmarks.timing import summary, synchronise
from factorization_memory.generation import default_chunk

WARM_UP = 2
"""Untimed steps before each timed series."""
MOST_MODES = 2
"""Modes of a step at most."""


class Reading:
    """Reads prompts of one number of sequences, as long as that is quick enough."""

    def __init__(self, contender: Contender, benchmark: InferenceBenchmark, device: torch.device) -> None:
        self.contender, self.benchmark, self.device = contender, benchmark, device
        self.known: tuple[int, float] | None = None
        """A number of tokens of a sequence, and the seconds that all sequences took to read as many."""

    def prefill(self, batch: int, context: int) -> PrefillFigures | None:
        """Reads `context` tokens of each of `batch` sequences; its figures, or None if that would take too long."""
        limit = self.benchmark.prefill_seconds
        if limit == 0:
            return None
        if self.known is None:
            self.known = self._try(batch, context)
        length, seconds = self.known
        expected = seconds * self.contender.reading_work(context) / self.contender.reading_work(length)
        if expected > limit:
            return None
        tokens = self._tokens(batch, context)
        self._seconds(tokens)  # compiles kernels for this size
        spent: list[float] = []
        while len(spent) < self.benchmark.repeats and sum(spent) + expected <= limit:
            spent.append(self._seconds(tokens))
            expected = min(spent)
        self.known = context, expected
        spread = summary(spent)
        return {"seconds": spread, "repeats": len(spent), "tokens_per_second": tokens.numel() / spread["median"]}

    def _try(self, batch: int, context: int) -> tuple[int, float]:
        """Reads a piece, which is short at any size, and tells of it as `known`."""
        chunk = 2 * (self.benchmark.prefill_chunk or default_chunk(self.device))
        length = min(context, chunk)
        rows = max(1, min(batch, chunk // length))
        tokens = self._tokens(rows, length)
        self._seconds(tokens)
        return length, self._seconds(tokens) * batch / rows

    def _seconds(self, tokens: Tensor) -> float:
        synchronise(self.device)
        start = time.perf_counter()
        self.contender.read(tokens).argmax(-1).tolist()
        synchronise(self.device)
        return time.perf_counter() - start

    def _tokens(self, batch: int, length: int) -> Tensor:
        return torch.randint(0, self.benchmark.model.vocab_size, (batch, length), device=self.device)


class Writing:
    """Times steps in rounds, each starting from the contender's state at construction.

    `peak_bytes` are those of a few steps, without the copy of the state that only the rounds need.
    """

    def __init__(self, contender: Contender, benchmark: InferenceBenchmark, batch: int, memory: DeviceMemory) -> None:
        device = memory.device
        self.device, self.batch = device, batch
        self.modes = contender.modes()
        with memory.set_aside():
            self.resume = contender.keep()
        memory.start()
        self.tokens = torch.randint(0, benchmark.model.vocab_size, (batch,), device=device)
        self.seconds: dict[str, list[float]] = {mode: [] for mode in self.modes}
        self.each: dict[str, int] = {}
        for mode, step in self.modes.items():
            tried = _series(step, self.tokens, WARM_UP + 1, device)[-1]
            most = min(benchmark.decode_tokens, int(benchmark.decode_seconds / max(tried, 1e-9)))
            self.each[mode] = max(1, -(-most // benchmark.repeats))
        self.peak_bytes = memory.peak_bytes()

    def round(self) -> None:
        """Goes back to the beginning and times each mode's share of the steps."""
        self.resume()
        with _quiet():
            for mode, step in self.modes.items():
                self.seconds[mode] += _series(step, self.tokens, WARM_UP + self.each[mode], self.device)[WARM_UP:]

    def figures(self, floor_seconds: float) -> dict[str, DecodeFigures]:
        """Of all rounds, by mode."""
        result: dict[str, DecodeFigures] = {}
        for mode, spent in self.seconds.items():
            spread: TokenSeconds = {**summary(spent), "p99": sorted(spent)[math.ceil(0.99 * len(spent)) - 1]}
            result[mode] = {
                "tokens": len(spent),
                "seconds": spread,
                "tokens_per_second": self.batch / spread["median"],
                "ratio_to_floor": spread["median"] / floor_seconds,
            }
        return result


def most_steps(benchmark: InferenceBenchmark) -> int:
    """The most steps that follow a reading before the state of then is restored."""
    return MOST_MODES * (WARM_UP + -(-benchmark.decode_tokens // benchmark.repeats))


def _series(step: Step, tokens: Tensor, count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` steps one after the other, from `tokens`."""
    seconds = []
    synchronise(device)
    for _ in range(count):
        start = time.perf_counter()
        tokens = step(tokens).argmax(-1)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which the garbage collector ignores existing objects."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
