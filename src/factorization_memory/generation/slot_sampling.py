"""Samples the next token of many sequences at once, each with its own settings and random numbers.

Shapes: S slots, N of them sampled, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from factorization_memory.generation.requests import Request
from factorization_memory.generation.sampling import SamplingConfig, Uniforms, sample, sample_generator


@dataclass(frozen=True)
class _Group:
    """Slots sampled in one call: they differ only in their random numbers."""

    sampling: SamplingConfig
    barred: Tensor | None
    slots: list[int]
    index: Tensor
    """The slots, int64."""
    whole: bool
    """Whether these are all slots."""

    def of(self, tensor: Tensor) -> Tensor:
        """The group's rows of `[S, ...]`."""
        return tensor if self.whole else tensor[self.index]


@dataclass(frozen=True)
class Draw:
    """Tokens of N slots."""

    slots: list[int]
    """The slots, in any order."""
    index: Tensor
    """The same, int64 `[N]`."""
    tokens: Tensor
    """int64 `[N]`."""
    finite: Tensor
    """Whether the logits of the slot are finite, bool `[N]`; if not, its token is meaningless."""


class SlotSampler:
    """Samples tokens in S slots and records the tokens drawn.

    Args:
        slots: S.
        vocab_size: V.
        device: of the logits.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._slots, self._vocab_size, self._device = slots, vocab_size, device
        self._ways: dict[int, tuple[SamplingConfig, Tensor | None]] = {}  # by slot: sampling without the seed, barred tokens
        self._uniforms = Uniforms(slots, device)
        self._history: Tensor | None = None  # bool [S, V], tokens to penalize; None: no slot has a penalty
        self._groups: list[_Group] | None = None  # None: stale, requests have come or gone

    def begin(self, slot: int, request: Request, tokens: Tensor) -> None:
        """Start a request in a free slot; its prompt is `tokens`, int64 `[T]`."""
        if request.sampling.repetition_penalty != 1:
            if self._history is None:
                self._history = torch.zeros(self._slots, self._vocab_size, dtype=torch.bool, device=self._device)
            self._history[slot] = False
            self._history[slot, tokens] = True
        # Do not keep the request: its prompt may hold a large state.
        self._ways[slot] = (replace(request.sampling, seed=0), request.barred)
        self._uniforms.begin(slot, sample_generator(request.sampling.seed, request.sample))
        self._groups = None

    def end(self, slot: int) -> None:
        """Free the slot."""
        del self._ways[slot]
        self._uniforms.end(slot)
        self._groups = None

    def compact(self, kept: list[int]) -> None:
        """Keep only the slots `kept`: slot `kept[i]` becomes slot i."""
        self._ways = {new: self._ways[old] for new, old in enumerate(kept) if old in self._ways}
        self._uniforms.select(kept)
        self._history = None if self._history is None else self._history[kept]
        self._groups, self._slots = None, len(kept)

    def draw(self, logits: Tensor) -> Draw:
        """Draws the next token of every request from the logits `[S, V]`. Repeated draws agree until one is accepted."""
        if self._groups is None:
            self._groups = self._grouped()
        groups, uniforms = self._groups, self._uniforms.peek()
        drawn, finite = zip(*(self._draw(group, logits, uniforms) for group in groups), strict=True)
        if len(groups) == 1:
            return Draw(groups[0].slots, groups[0].index, drawn[0], finite[0])
        slots = [slot for group in groups for slot in group.slots]
        return Draw(slots, torch.cat([group.index for group in groups]), torch.cat(drawn), torch.cat(finite))

    def accept(self, draw: Draw) -> None:
        """Accepts the tokens: the repetition penalty now applies to them, and the next draw uses new random numbers."""
        self._uniforms.advance()
        if self._history is not None:
            self._history[draw.index, draw.tokens] = True

    def _grouped(self) -> list[_Group]:
        alike: dict[tuple[SamplingConfig, int], list[int]] = {}
        for slot, (sampling, barred) in sorted(self._ways.items(), key=lambda way: way[0]):
            alike.setdefault((sampling, id(barred)), []).append(slot)
        groups = []
        for (sampling, _), slots in alike.items():
            barred = self._ways[slots[0]][1]
            index = torch.tensor(slots, device=self._device)
            groups.append(_Group(sampling, barred, slots, index, whole=len(slots) == self._slots))
        return groups

    def _draw(self, group: _Group, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        allowed = group.of(logits)
        if group.barred is not None:
            allowed = allowed.masked_fill(group.barred, -torch.inf)
        history = None if group.sampling.repetition_penalty == 1 or self._history is None else group.of(self._history)
        drawn = sample(allowed, group.sampling, group.of(uniforms), history)
        return drawn, allowed.amax(dim=-1).isfinite()  # the maximum propagates NaN
