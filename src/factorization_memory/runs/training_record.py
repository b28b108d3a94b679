"""The records of a training: the lines of `metrics.jsonl`, `samples.json` and `result.json`.

In a file a line also has its `kind` ("train", "evaluation", "routing" or "sample"), and null is a figure that is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

if TYPE_CHECKING:
    from factorization_memory.models.routing import LayerUse
    from factorization_memory.runs.evaluation_record import LossFigures


class StepFigures(TypedDict):
    """An optimizer step, or in `metrics.jsonl` the steps since the last line."""

    step: int
    tokens: int
    """Read since the run began."""
    loss: float
    """Nats per token."""
    bits_per_byte: float | None
    """None for no text."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""


class StepTiming(TypedDict):
    """The time of steps."""

    tokens_per_second: float
    seconds: float
    """Since the run began, over all its parts."""
    data_wait_share: float
    """Of the time of steps."""


class TrainLine(StepFigures, StepTiming):
    """A training line."""


class HeldOut(TypedDict):
    """What the trainer's `Evaluate` function returns."""

    sources: Mapping[str, LossFigures]
    bits_per_byte: float
    """Of all sources; ranks checkpoints."""


class EvaluationLine(HeldOut):
    """An evaluation between steps."""

    step: int


class RoutingLine(TypedDict):
    """The use of the memory states, measured on a batch."""

    step: int
    states: int
    """Of all layers and heads."""
    dead_states: int
    entropy: list[float]
    """By layer, the mean of its heads, like `balance`."""
    balance: list[float]
    layers: list[LayerUse]


class SampleRecord(TypedDict):
    """A continuation of a prompt; those of `samples.json` also tell how long it took."""

    prompt: str
    text: str
    tokens: NotRequired[int]
    stop_reason: NotRequired[str]
    prompt_tokens: NotRequired[int]
    prefill_seconds: NotRequired[float]
    capture_seconds: NotRequired[float]
    seconds: NotRequired[float]
    tokens_per_second: NotRequired[float]
    prefill_tokens_per_second: NotRequired[float]
    """Of all continuations together, like `total_tokens_per_second`."""
    total_tokens_per_second: NotRequired[float]


class SampleLine(TypedDict):
    """Samples between steps."""

    step: int
    samples: list[SampleRecord]


class RunResult(TypedDict):
    """`result.json`."""

    stopped: Literal["finished", "interrupted"]
    signal: str | None
    """The one that interrupted the run."""
    steps: int
    total_steps: int
    tokens: int
    seconds: float
    tokens_per_second: float | None
    """None before the first step."""
    parameters: int
    """Trainable ones."""
    train: TrainLine | None
    """The last line, like `evaluation`."""
    evaluation: EvaluationLine | None
    best_evaluation: EvaluationLine | None
    checkpoints: dict[str, str | None]
    """Paths in the run folder of the "last" and the "best" one."""
