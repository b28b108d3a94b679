"""From logits to the next token: temperature, filters, repetition penalty, and draws that depend only on a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from factorization_memory.config import ConfigError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. Filters act in the order of the fields and always leave the likeliest token."""

    temperature: float = 0.8
    """Temperature that divides the logits; 0 always takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Sample only from the k likeliest tokens."""
    top_p: float | None = None
    """Sample only from the fewest likeliest tokens whose probabilities add up to this."""
    min_p: float | None = None
    """Sample only from tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Penalty on tokens that are in the prompt or the text so far: their positive logits are divided by it, negative ones
    multiplied; 1 is off."""
    seed: int = 0
    """Random seed; sample i of a prompt depends only on (seed, i), not on the other samples."""

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise ConfigError(f"sampling.{name}={getattr(self, name)!r}: {remedy}")

        require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "use 0 (greedy) or a positive number")
        require(self.top_k is None or self.top_k >= 1, "top_k", "use 1 or more, or none for all tokens")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", "use a number above 0 and up to 1, or none")
        require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "use a number from 0 to 1, or none")
        require(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "use a positive number; 1 is off, above 1 repeats less",
        )
        require(0 <= self.seed < 1 << 64, "seed", "use a number from 0 to 2**64 - 1")


def sample_generator(seed: int, number: int) -> torch.Generator:
    """The random generator of sample `number` of a prompt, a function of (seed, number)."""
    # Adjacent seeds of the Mersenne twister give similar first numbers; a prime stride and a warm-up draw decorrelate samples.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % (1 << 63))
    torch.rand(8, generator=generator)
    return generator


def sample_generators(seed: int, num_samples: int) -> list[torch.Generator]:
    """One random generator for each sample, the i-th a function of (seed, i)."""
    return [sample_generator(seed, i) for i in range(num_samples)]


class Uniforms:
    """Uniform random numbers for many slots, each with its own generator. They are drawn for many tokens at a time: drawn one
    by one they would cost as much as a step of a large batch.

    Args:
        slots: number of slots.
        device: where the numbers are needed.
    """

    block = 64
    """Tokens per block of numbers drawn at once."""

    def __init__(self, slots: int, device: torch.device) -> None:
        # A circular buffer over time: row `t % block` has the numbers of draw t, so a draw for all slots is one row.
        self._drawn = torch.zeros(self.block, slots, dtype=torch.float64, device=device)
        self._time = 0
        self._generators: dict[int, torch.Generator] = {}
        self._due: dict[int, int] = {}  # the draw for which a slot's next block is needed

    def begin(self, slot: int, generator: torch.Generator) -> None:
        """From the next draw on, the slot's numbers come from this CPU generator."""
        self._generators[slot], self._due[slot] = generator, self._time

    def end(self, slot: int) -> None:
        """The slot needs no more numbers."""
        del self._generators[slot], self._due[slot]

    def peek(self) -> Tensor:
        """The numbers of the upcoming draw, float64 `[slots]`; arbitrary for slots without a generator."""
        due = [slot for slot, time in self._due.items() if time == self._time]
        if due:
            blocks = [torch.rand(self.block, generator=self._generators[slot], dtype=torch.float64) for slot in due]
            device = self._drawn.device
            numbers = torch.stack(blocks, dim=1).roll(self._time % self.block, dims=0).to(device)
            self._drawn.index_copy_(1, torch.tensor(due, device=device), numbers)
            self._due.update((slot, self._time + self.block) for slot in due)
        return self._drawn[self._time % self.block]

    def advance(self) -> None:
        """Move on to the next draw."""
        self._time += 1

    def select(self, slots: list[int]) -> None:
        """Keep only the given slots: slot `slots[i]` becomes slot i."""
        self._drawn = self._drawn[:, slots]
        used = [(new, old) for new, old in enumerate(slots) if old in self._generators]
        self._generators = {new: self._generators[old] for new, old in used}
        self._due = {new: self._due[old] for new, old in used}


def sample(
    logits: Tensor, config: SamplingConfig, generators: Sequence[torch.Generator] | Tensor, history: Tensor | None = None
) -> Tensor:
    """The next token of each row.

    Args:
        logits: [B, V], any float dtype; -inf bars a token.
        generators: one CPU generator per row, each giving one uniform number (none when greedy); or these numbers, float64
            [B].
        history: bool [B, V], True for tokens that the repetition penalty applies to.

    Returns int64 [B], on the device of the logits.
    """
    scores = logits.float()
    if history is not None and config.repetition_penalty != 1.0:
        penalty = config.repetition_penalty
        scores = torch.where(history, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if config.temperature == 0:
        return scores.argmax(dim=-1)
    # Subtract the maximum first and divide in float64, so that a very small temperature gives no NaN.
    scores = (scores - scores.amax(dim=-1, keepdim=True)).double() / config.temperature
    weights = _filter(scores.softmax(dim=-1), config)
    if not isinstance(generators, Tensor):
        generators = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    uniform = generators.to(weights.device)
    cumulative = weights.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    # Rounding can put a draw past the last token: take the likeliest token then.
    return torch.where(drawn < logits.shape[-1], drawn, weights.argmax(dim=-1))


def _filter(probabilities: Tensor, config: SamplingConfig) -> Tensor:
    """Probabilities [B, V] with filtered tokens set to zero; not renormalized."""
    size = probabilities.shape[-1]
    if config.top_k is None and config.top_p is None and config.min_p is None:
        return probabilities
    ranked, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(size, device=ranked.device).expand_as(ranked) < (config.top_k or size)
    if config.top_p is not None:
        ranked = ranked * kept / (ranked * kept).sum(dim=-1, keepdim=True)
        kept = kept & (ranked.cumsum(dim=-1) - ranked < config.top_p)
    if config.min_p is not None:
        kept = kept & (ranked >= config.min_p * ranked[:, :1])
    return probabilities * torch.zeros_like(kept).scatter(-1, tokens, kept)
