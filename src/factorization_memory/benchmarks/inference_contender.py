"""What the inference benchmark measures: the sizes asked for, and a model as it is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Step = Callable[[Tensor], Tensor]
"""Tokens `[B]` to logits `[B, V]`, going on from where the sequences stand."""


class Contender(Protocol):
    """A model that reads and writes, as it is measured.

    `begin` comes first; after `read` or `invent`, the steps of `modes` go on from there.
    """

    name: str
    top_k: int | None
    parameters: int
    weight_bytes: int
    growth: float
    """Time to read a prompt grows with this power of its length."""

    def begin(self, batch: int, steps: int) -> None:
        """Get ready for `batch` sequences, with at most so many steps after each reading; nothing of it is timed."""

    def read(self, tokens: Tensor) -> Tensor:
        """Read int64 `[B, context]` from the beginning; logits `[B, V]` of the next token."""

    def invent(self, context: int) -> None:
        """Random numbers in place of what `context` tokens would have left."""

    def keep(self) -> Callable[[], None]:
        """What takes the sequences back to where they stand now, or to as good a place."""

    def modes(self) -> dict[str, Step]:
        """The forms of a step, all of the same sequences."""

    def state_bytes(self) -> int:
        """Bytes of what all sequences carry."""

    def step_bytes(self) -> int:
        """Bytes that a step cannot but move: weights and what it needs of the state read, what it changes of that written."""

    def end(self) -> None:
        """Give the room back."""
