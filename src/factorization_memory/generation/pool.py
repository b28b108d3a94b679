"""The states of many sequences in one pooled state of fixed size, a slot each, of which some may be free.

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
"""A CUDA graph of up to this many sequences is kept as they end: it takes about as long as one of fewer."""
FREE_SLOT_TOKENS = 64
"""Tokens that a free slot of a growing state is fed before it is emptied."""


def slot_bytes(model: LanguageModel, tokens: int = 0) -> int:
    """Memory that a slot takes once it has read `tokens`: its state, and as logits, scores and history a number for every id.
    None of it is allocated."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model.initial_state(1, tokens).num_bytes + 8 * model.config.vocab_size


class StatePool:
    """Where the sequences in S slots stand. It is allocated by the first step, and on a GPU captured; sequences that come and
    go after that change nothing in its size.

    Args:
        model: in evaluation mode.
        slots: S.

    Attributes:
        slots: S.
        capture_seconds: time that captures of the step as a CUDA graph took so far.
    """

    def __init__(self, model: LanguageModel, slots: int) -> None:
        self.slots = slots
        self.capture_seconds = 0.0
        self._model = model
        self._steps: Steps | None = None
        self._held: set[int] = set()  # slots of sequences in the state of `_steps`
        self._waiting: dict[int, tuple[ModelState, int]] = {}  # of others the state, and which of its sequences they are
        self._forwards = 0

    def put(self, slot: int, state: ModelState, row: int) -> None:
        """A sequence begins in a free slot: sequence `row` of `state`, which is not copied before it is stepped."""
        self._waiting[slot] = (state, row)

    def remove(self, slot: int) -> None:
        """The slot is free."""
        self._held.discard(slot)
        self._waiting.pop(slot, None)
        if not self._held and not self._waiting and grows(self._model):
            self._steps = None  # as large as the longest text so far

    def worth_compacting(self) -> bool:
        """Whether steps of fewer slots would save more than it costs to make them, a capture on a GPU."""
        used = len(self._held) + len(self._waiting)
        if self._steps is None or not self._steps.captured:
            return used < self.slots
        return self.slots > SMALL_BATCH and used <= self.slots // 2

    def compact(self, kept: list[int]) -> None:
        """Slot i becomes what `kept[i]` was; there are no others any more."""
        waiting = {new: self._waiting[old] for new, old in enumerate(kept) if old in self._waiting}
        held = [(new, old) for new, old in enumerate(kept) if old in self._held]
        if self._steps is not None and held:
            state = self._steps.state.select([old for _, old in held])
            waiting |= {new: (state, row) for row, (new, _) in enumerate(held)}
        self._steps = None  # the old pool is let go before a new one is made
        self._waiting, self._held, self.slots = waiting, set(), len(kept)

    def step(self, tokens: Tensor, reading: list[int]) -> Tensor:
        """Logits `[S, V]`, which the next step may overwrite, after `tokens` int64 `[S]`. Only those of the slots `reading`
        mean anything: free slots are fed anything, and sequences of others that wait stay where they are."""
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
        """Copy in the sequences that wait for these slots."""
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
        """So that those of a growing state do not grow without end."""
        free = [slot for slot in range(self.slots) if slot not in self._held]
        if free:
            steps.load(self._model.initial_state(len(free)), free)


def wait_for(device: torch.device) -> None:
    """Wait for what runs on a GPU, so that the clock tells what it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
