"""The record of one model at one size in the result of the inference benchmark."""

from __future__ import annotations

from typing import Literal, TypedDict

from factorization_memory.benchmarks.timing import Spread


class TokenSeconds(Spread):
    """Seconds of a token, with those that 99 of 100 do not exceed."""

    p99: float


class PrefillFigures(TypedDict):
    """Reading a prompt."""

    seconds: Spread
    """To the first token of every sequence."""
    repeats: int
    tokens_per_second: float
    """At the median, of all sequences."""


class DecodeFigures(TypedDict):
    """One mode of decoding."""

    tokens: int
    """Timed, of each sequence."""
    seconds: TokenSeconds
    tokens_per_second: float
    """At the median, of all sequences."""
    ratio_to_floor: float


class PeakBytes(TypedDict):
    """The most bytes of a GPU's memory that a model takes at once: weights, state and what is allocated for a moment."""

    prefill: int | None
    """None if the prompt was not read."""
    decode: int
    """Over all modes of a step; what a CUDA graph takes within itself is not seen."""


class InferenceRecord(TypedDict):
    """One model with one number of sequences after one number of tokens."""

    contender: str
    peer: bool
    top_k: int | None
    parameters: int
    weight_bytes: int
    batch: int
    context: int
    error: str | None
    """What it raised."""
    state: Literal["read", "random"] | None
    """What the steps go on from: `context` tokens that were read, or random numbers."""
    state_bytes: int | None
    """Of all sequences, after `context` tokens."""
    peak_bytes: PeakBytes | None
    """None on a CPU; older records do not have it."""
    step_bytes: int | None
    """What a step cannot but move."""
    floor_seconds: float | None
    """`step_bytes` over the rate of copies."""
    prefill: PrefillFigures | None
    """None if nothing was read."""
    decode: dict[str, DecodeFigures]
    """By mode: `eager`, and `graph` on a GPU or `loops` on a CPU where the model has such a step."""


class LatencySpread(TypedDict):
    """How much a model's latency depends on the context."""

    contender: str
    batch: int
    mode: str
    slowest_over_fastest: float
    """Of the median latencies."""
