"""Batches of a packed corpus, prefetched by a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from factorization_memory.config import ConfigError, DataConfig, suggestion
from factorization_memory.data import order
from factorization_memory.data.manifest import TRAIN
from factorization_memory.data.shards import PackedCorpus

IGNORED_TARGET = -100


@dataclass
class Batch:
    """One micro-batch of B rows of T tokens."""

    tokens: Tensor
    """int64 [B, T]; [1, B*T], the rows concatenated, if `cu_seqlens` is given."""
    targets: Tensor
    """Next tokens, same shape; -100 if there is none."""
    cu_seqlens: Tensor | None
    """int32 [N + 1]: starts of the N sequences, and B*T. Given only if the memory is reset inside a row."""
    row_starts: Tensor | None
    """int64 [B]: with `cu_seqlens`, the index of the sequence that begins row r."""
    reset: Tensor
    """bool [B]: whether the row starts from empty memory; with carried state, False if it continues."""
    windows: list[str]
    """Position of each row, "source:first token", for messages."""


class BatchLoader:
    """Infinite training batches: an iterator of lists of micro-batches, one list per optimizer step.

    A step is a pure function of the corpus, the configuration, the seed and its number: starting at `start_step` gives the
    same batches as a loader started from 0 after that many steps. Close it after use, or use it as a context manager.
    """

    wait_seconds: float
    """Total time the consumer waited for batches."""

    def __init__(
        self,
        corpus: PackedCorpus,
        config: DataConfig,
        *,
        sequences_per_step: int,
        micro_batch_size: int,
        carry_state: bool,
        seed: int,
        start_step: int = 0,
    ) -> None:
        """`carry_state`: each row continues where it stopped in the previous step, instead of reading a shuffled window.

        Raises `ConfigError` for sizes or weights that are inconsistent with each other or with the corpus.
        """
        if sequences_per_step < 1 or micro_batch_size < 1 or sequences_per_step % micro_batch_size:
            raise ConfigError(f"micro_batch_size={micro_batch_size}: must divide the {sequences_per_step} sequences of a step")
        self._context_length = config.context_length
        self._reset_documents = config.document_boundary == "reset"
        self._document_end = corpus.tokenizer.document_end
        self._sequences = sequences_per_step
        self._micro_batch_size = micro_batch_size
        self._carry_state = carry_state
        self._seed = seed
        self._names, weights = _mixture(corpus, config)
        self._tokens = [corpus.sources[name].splits[TRAIN].tokens for name in self._names]
        for name, tokens in zip(self._names, self._tokens, strict=True):
            # A window has one more token than the context, the last target.
            if len(tokens) <= self._context_length:
                raise ConfigError(
                    f"data.context_length={self._context_length}: longer than the training text of source {name!r}, "
                    f"{len(tokens)} tokens; use {len(tokens) - 1} or less, or add text"
                )
        self._weights = order.integer_weights(weights)
        self._streams = self._stream_rows() if carry_state else []
        self._step = start_step
        self._read_ahead = config.read_ahead
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=max(1, config.read_ahead))
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._stopped.is_set():
            raise StopIteration
        if self._failure is not None:
            raise self._failure
        began = time.perf_counter()
        if self._read_ahead == 0:
            batches: list[Batch] | BaseException = self._batches(self._step)
            self._step += 1
        else:
            if self._thread is None:
                self._thread = threading.Thread(target=self._prepare, name="batches", daemon=True)
                self._thread.start()
            batches = self._ready.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(batches, BaseException):
            self._failure = batches
            raise batches
        return batches

    def close(self) -> None:
        """Stop the thread; iteration ends."""
        self._stopped.set()
        if self._thread is not None:
            # It may be waiting for room in the queue.
            while self._thread.is_alive():
                while not self._ready.empty():
                    self._ready.get_nowait()
                self._thread.join(timeout=0.01)
            self._thread = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _prepare(self) -> None:
        try:
            while not self._stopped.is_set():
                self._ready.put(self._batches(self._step))
                self._step += 1
        except BaseException as error:  # re-raised in the consumer
            self._ready.put(error)

    def _stream_rows(self) -> list[tuple[int, int, int]]:
        """With carried state: (source, row within it, number of its rows) for each row of a step."""
        try:
            shares = order.shared_rows(self._sequences, self._weights)
        except ValueError as error:
            raise ConfigError(
                f"training.tokens_per_step={self._sequences * self._context_length}: carry_state needs a row for each "
                f"source, but {error}; use more tokens per step, a shorter context, or weight 0 for some sources"
            ) from error
        return [(source, row, rows) for source, rows in enumerate(shares) for row in range(rows)]

    def _place(self, step: int, row: int) -> tuple[int, int]:
        """(source, position of the first token) of a row of a step."""
        if self._carry_state:
            source, own, rows = self._streams[row]
            name, num_tokens = self._names[source], len(self._tokens[source])
            return source, order.stream_start(self._seed, name, own, rows, step, num_tokens, self._context_length)
        source, k = order.draw(step * self._sequences + row, self._weights)
        name, num_tokens = self._names[source], len(self._tokens[source])
        return source, order.window_start(self._seed, name, k, num_tokens, self._context_length)

    def _batches(self, step: int) -> list[Batch]:
        size = self._micro_batch_size
        return [self._batch(step, range(first, first + size)) for first in range(0, self._sequences, size)]

    def _batch(self, step: int, rows: range) -> Batch:
        length = self._context_length
        places = [self._place(step, row) for row in rows]
        # One token before the row, to see whether a document starts with it, and one after it, the last target.
        read = np.stack([_read(self._tokens[source], start - 1, length + 2) for source, start in places])
        starts = read[:, :-2] == self._document_end
        tokens, targets = torch.from_numpy(read[:, 1:-1].copy()), torch.from_numpy(read[:, 2:].copy())
        # The token after the end of a document depends on the order of the corpus, not on the text: do not predict it, whether
        # or not the memory is carried on.
        targets[tokens == self._document_end] = IGNORED_TARGET
        reset = np.ones(len(rows), dtype=bool)
        if self._carry_state and step > 0:
            reset = starts[:, 0].copy() if self._reset_documents else np.zeros(len(rows), dtype=bool)
        cu_seqlens = row_starts = None
        if self._reset_documents and starts[:, 1:].any():
            starts[:, 0] = True
            begins = np.flatnonzero(starts)
            cu_seqlens = torch.from_numpy(np.append(begins, starts.size).astype(np.int32))
            row_starts = torch.from_numpy(np.searchsorted(begins, np.arange(len(rows)) * length))
            tokens, targets = tokens.reshape(1, -1), targets.reshape(1, -1)
        return Batch(
            tokens=tokens,
            targets=targets,
            cu_seqlens=cu_seqlens,
            row_starts=row_starts,
            reset=torch.from_numpy(reset),
            windows=[f"{self._names[source]}:{start}" for source, start in places],
        )


def _mixture(corpus: PackedCorpus, config: DataConfig) -> tuple[list[str], list[float]]:
    """Names and weights of the sources that are read."""
    if not config.weights:
        return list(corpus.sources), [float(len(source.splits[TRAIN].tokens)) for source in corpus.sources.values()]
    for name in config.weights:
        if name not in corpus.sources:
            raise ConfigError(f"data.weights.{name}: the corpus has no such source{suggestion(name, corpus.sources)}")
    names = [name for name in corpus.sources if config.weights.get(name, 0) > 0]
    return names, [config.weights[name] for name in names]


def _read(tokens: np.ndarray, start: int, count: int) -> np.ndarray:
    """int64 [count]: the tokens from `start` on, wrapping around."""
    if start >= 0 and start + count <= len(tokens):
        return tokens[start : start + count].astype(np.int64)
    return np.take(tokens, np.arange(start, start + count), mode="wrap").astype(np.int64)
