"""A pooled state of fixed size, with one slot per sequence; slots may be free.

Shapes: S slots, V vocabulary size.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from factorization_memory.generation.graph import Steps, grows, steps_for
from factorization_memory.layers.calling import device_of

if TYPE_CHECKING:
    from factorization_memory.models import LanguageModel, ModelState

SMALL_BATCH = 8
"""CUDA graphs of up to this many sequences are not compacted as sequences end: smaller ones take about as long."""
FREE_SLOT_TOKENS = 64
"""Tokens fed to a free slot of a growing state before it is emptied."""


def slot_bytes(model: LanguageModel, tokens: int = 0) -> int:
    """Bytes of a slot after `tokens` tokens: its state, and its rows of vocabulary size for logits, scores and history.
    Computed without allocating."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model.initial_state(1, tokens).num_bytes + 8 * model.config.vocab_size


class StatePool:
    """The pooled state of the sequences in S slots. It is allocated (on a GPU: captured) by the first step; its size does not
    change as sequences come and go.

    Args:
        model: in evaluation mode.
        slots: S.

    Attributes:
        slots: S.
        capture_seconds: time spent capturing CUDA graphs of the step so far.
    """

    def __init__(self, model: LanguageModel, slots: int) -> None:
        self.slots = slots
        self.capture_seconds = 0.0
        self._model = model
        self._steps: Steps | None = None
        self._held: set[int] = set()  # slots whose sequences are in the state of `_steps`
        self._waiting: dict[int, tuple[ModelState, int]] = {}  # the other slots: a state and the row in it
        self._forwards = 0

    def put(self, slot: int, state: ModelState, row: int) -> None:
        """Start a sequence in a free slot from row `row` of `state`, which is not copied until it is stepped."""
        self._waiting[slot] = (state, row)

    def remove(self, slot: int) -> None:
        """Free the slot."""
        self._held.discard(slot)
        self._waiting.pop(slot, None)
        if not self._held and not self._waiting and grows(self._model):
            self._steps = None  # as large as the longest text so far

    def worth_compacting(self) -> bool:
        """Whether fewer slots would save more time per step than switching costs (a capture on a GPU)."""
        used = len(self._held) + len(self._waiting)
        if self._steps is None or not self._steps.captured:
            return used < self.slots
        return self.slots > SMALL_BATCH and used <= self.slots // 2

    def compact(self, kept: list[int]) -> None:
        """Keep only the slots `kept`: slot `kept[i]` becomes slot i."""
        waiting = {new: self._waiting[old] for new, old in enumerate(kept) if old in self._waiting}
        held = [(new, old) for new, old in enumerate(kept) if old in self._held]
        if self._steps is not None and held:
            state = self._steps.state.select([old for _, old in held])
            waiting |= {new: (state, row) for row, (new, _) in enumerate(held)}
        self._steps = None  # free the old pool before allocating a new one
        self._waiting, self._held, self.slots = waiting, set(), len(kept)

    def step(self, tokens: Tensor, reading: list[int]) -> Tensor:
        """Logits `[S, V]`, which the next step may overwrite, after `tokens` int64 `[S]`. Only rows of the slots `reading` are
        meaningful: free slots read arbitrary tokens, and sequences waiting in other slots do not advance."""
        steps = self._allocated()
        self._load(steps, [slot for slot in reading if slot in self._waiting])
        if grows(self._model) and self._forwards % FREE_SLOT_TOKENS == 0:
            self._empty_free_slots(steps)
        self._forwards += 1
        return steps.step(tokens)

    def _allocated(self) -> Steps:
        if self._steps is None:
            begin = time.perf_counter()
            self._steps = steps_for(self._model, self.slots)
            if self._steps.captured:
                wait_for(device_of(self._model))
                self.capture_seconds += time.perf_counter() - begin
        return self._steps

    def _load(self, steps: Steps, slots: list[int]) -> None:
        """Copy in the sequences waiting in these slots."""
        together: dict[int, list[int]] = {}
        for slot in slots:
            together.setdefault(id(self._waiting[slot][0]), []).append(slot)
        for some in together.values():
            state, rows = self._waiting[some[0]][0], [self._waiting[slot][1] for slot in some]
            state = state if rows == list(range(state.batch_size)) else state.select(rows)
            steps.load(state, None if some == list(range(self.slots)) else some)
            self._held.update(some)
            for slot in some:
                del self._waiting[slot]

    def _empty_free_slots(self, steps: Steps) -> None:
        """Keeps the free slots of a growing state from growing without bound."""
        free = [slot for slot in range(self.slots) if slot not in self._held]
        if free:
            steps.load(self._model.initial_state(len(free)), free)


def wait_for(device: torch.device) -> None:
    """Synchronizes with a GPU, so that wall-clock times include its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
