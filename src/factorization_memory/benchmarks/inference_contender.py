"""What the inference benchmark measures: the requested sizes, and the interface of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Step = Callable[[Tensor], Tensor]
"""Tokens `[B]` to logits `[B, V]`, continuing the sequences."""


class Contender(Protocol):
    """Interface of a model to measure.

    `begin` comes first; after `read` or `invent`, the steps of `modes` go on from there.
    """

    name: str
    top_k: int | None
    parameters: int
    weight_bytes: int

    def reading_work(self, context: int) -> float:
        """Work of reading `context` tokens, in any unit: the time to read grows with it."""

    def begin(self, batch: int, steps: int) -> None:
        """Prepare for `batch` sequences with at most `steps` steps after each prompt; not timed."""

    def read(self, tokens: Tensor) -> Tensor:
        """Read int64 `[B, context]` from the beginning; logits `[B, V]` of the next token."""

    def invent(self, context: int) -> None:
        """Fill the state with random numbers, as if `context` tokens had been read."""

    def keep(self) -> Callable[[], None]:
        """Returns a function that restores the current state, or an equivalent one."""

    def modes(self) -> dict[str, Step]:
        """The forms of a step, all of the same sequences."""

    def state_bytes(self) -> int:
        """Bytes of the state of all sequences."""

    def step_bytes(self) -> int:
        """Bytes that a step must move: reads of the weights and the parts of the state it needs, writes of what it changes."""

    def end(self) -> None:
        """Free the memory."""
