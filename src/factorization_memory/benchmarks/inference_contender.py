"""What the inference benchmark measures: the sizes asked for, and a model as it is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from factorization_memory.config import ConfigError, ModelConfig

PEERS = ("llama",)
PRECISIONS = ("auto", "float32", "bfloat16")
Step = Callable[[Tensor], Tensor]
"""Tokens `[B]` to logits `[B, V]`, going on from where the sequences stand."""


@dataclass(frozen=True)
class InferenceBenchmark:
    """What to measure: each model at each number of sequences, after each number of tokens."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=4096, hidden_size=256, num_layers=4))
    """Our model."""
    contexts: tuple[int, ...] = (1024, 16384, 131072, 1048576)
    """Tokens that each sequence has read when it starts to write."""
    batches: tuple[int, ...] = (1, 16)
    """Sequences at once."""
    top_k: tuple[int, ...] = ()
    """States that each token selects, one model for each number; 0 is the dense form. Empty takes the model's own."""
    peers: tuple[str, ...] = ()
    """Of `PEERS`, to compare with, if transformers is installed."""
    llama_heads: int = 4
    """Attention heads of Llama."""
    precision: str = "auto"
    """Of weights and arithmetic: float32, bfloat16, or auto (bfloat16 on a GPU). Our memory is float32 in any case."""
    prefill_chunk: int = 0
    """Tokens read in one forward, of all sequences together; 0 takes `generation.default_chunk`."""
    prefill_seconds: float = 2.0
    """A prompt that takes longer to read than this is not read; its steps go on from random numbers in place of its state."""
    decode_tokens: int = 128
    """Steps that are timed, at each size and in each mode."""
    decode_seconds: float = 2.0
    """They are fewer, but `repeats` at least, where they would take longer than this."""
    repeats: int = 5
    """Times that a prompt is read (fewer where that takes longer than `prefill_seconds`), and rounds of steps."""

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {remedy}")

        require(bool(self.contexts) and min(self.contexts) >= 1, "contexts", "use one number of tokens or more, each 1 or more")
        require(bool(self.batches) and min(self.batches) >= 1, "batches", "use one number of sequences or more, each 1 or more")
        states = self.model.num_states
        require(all(0 <= k <= states for k in self.top_k), "top_k", f"use 0 (dense) to model.num_states={states}")
        if self.top_k and self.model.top_k is not None:
            raise ConfigError(f"model.top_k={self.model.top_k}: not together with top_k={self.top_k}; drop one of both")
        require(all(peer in PEERS for peer in self.peers), "peers", f"use some of {', '.join(PEERS)}")
        for name in ("llama_heads", "decode_tokens", "repeats"):
            require(getattr(self, name) >= 1, name, "use 1 or more")
        if "llama" in self.peers:
            size = self.model.hidden_size
            require(size % (2 * self.llama_heads) == 0, "llama_heads", f"heads must be of one even width; divide {size} by it")
        require(self.precision in PRECISIONS, "precision", f"use one of {', '.join(PRECISIONS)}")
        require(self.prefill_chunk >= 0, "prefill_chunk", "use 1 or more tokens, or 0 (automatic)")
        for name in ("prefill_seconds", "decode_seconds"):
            require(0 <= getattr(self, name) < math.inf, name, "use a number of seconds, 0 or more")
        if "attention" in self.model.layer_mixers:
            raise ConfigError(
                f"model.mixers={self.model.mixers}: takes layers whose state does not grow; of attention, the peer llama"
            )
        if self.model.vocab_size < 1:
            raise ConfigError(f"model.vocab_size={self.model.vocab_size}: a model needs one or more token ids")


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
