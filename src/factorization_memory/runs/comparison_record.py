"""The record of a comparison: `compare.json`. experiments/record.py makes it and says what its parts mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

if TYPE_CHECKING:
    from factorization_memory.runs.environment import EnvironmentRecord


class PartLoss(TypedDict):
    """The loss of a part of the held-out text."""

    tokens: int
    loss: float
    """Nats per token."""
    bits_per_byte: float


class RangeLoss(PartLoss):
    """The loss at positions `start` to `end` - 1."""

    start: int
    end: int


class Accuracy(TypedDict):
    """Share right in a task of the recall suite."""

    accuracy: float


class PeakMemory(TypedDict):
    """`memory.json`: peak memory of a GPU in a training."""

    allocated_bytes: int
    reserved_bytes: int


class SeedRecord(TypedDict):
    """One finished training; figures by source, after multiple of the context ("4"), kind, distance or task."""

    seed: int
    folder: str
    """In the comparison's, with slashes."""
    context: dict[str, PartLoss]
    """With "all" sources together."""
    positions: dict[str, dict[str, RangeLoss]]
    recall: dict[str, dict[str, PartLoss]]
    distance: dict[str, dict[str, PartLoss]]
    tasks: dict[str, dict[str, Accuracy]]
    by_position: dict[str, list[RangeLoss]]
    tokens_per_second: float | None
    seconds: float
    memory: PeakMemory | None
    parallel: list[int]
    """How many runs could be under way at once."""


class MeanAndSpread(TypedDict):
    """Over seeds; no spread of a single one."""

    mean: float
    spread: float | None


class SeedFigures(TypedDict, total=False):
    """A place's figures over seeds: losses, or for tasks the accuracy."""

    loss: MeanAndSpread
    bits_per_byte: MeanAndSpread
    accuracy: MeanAndSpread


class RangeFigures(TypedDict):
    """The losses over seeds at positions `start` to `end` - 1, which hold so many tokens."""

    start: int
    end: int
    tokens: int
    loss: MeanAndSpread
    bits_per_byte: MeanAndSpread


class Summary(TypedDict):
    """All seeds of a contender, in the places of `SeedRecord`."""

    n: int
    context: dict[str, SeedFigures]
    positions: dict[str, dict[str, SeedFigures]]
    recall: NotRequired[dict[str, dict[str, SeedFigures]]]
    distance: NotRequired[dict[str, dict[str, SeedFigures]]]
    tasks: NotRequired[dict[str, dict[str, SeedFigures]]]
    by_position: dict[str, list[RangeFigures]]
    tokens_per_second: float | None
    """Median."""
    peak_memory_bytes: int | None
    """Maximum."""


class MeanAndError(TypedDict):
    """Mean difference over seeds and its standard error; none of a single one."""

    mean: float
    standard_error: float | None


class DifferenceFigures(TypedDict, total=False):
    """A place's differences."""

    loss: MeanAndError
    bits_per_byte: MeanAndError
    accuracy: MeanAndError


class Difference(TypedDict):
    """A contender minus the first, over the `n` seeds that both have, in the places of `SeedRecord`."""

    n: int
    context: dict[str, DifferenceFigures]
    positions: dict[str, dict[str, DifferenceFigures]]
    recall: NotRequired[dict[str, dict[str, DifferenceFigures]]]
    distance: NotRequired[dict[str, dict[str, DifferenceFigures]]]
    tasks: NotRequired[dict[str, dict[str, DifferenceFigures]]]


class CandidateLoss(TypedDict):
    """Losses of held-out text; None if a training diverged or is not done."""

    loss: float | None
    """Nats per token."""
    bits_per_byte: float | None


class Candidate(CandidateLoss):
    """A learning rate that was tried."""

    learning_rate: float
    diverged: bool
    folder: str


class Search(TypedDict):
    """How a learning rate was chosen."""

    chosen: float | None
    """None while a candidate is missing, or if all diverged."""
    searched: bool
    at_edge: bool | None
    """Whether the chosen one is the smallest or the largest."""
    candidates: list[Candidate]


class Parameters(TypedDict):
    """Numbers of parameters."""

    total: int
    embedding: int
    """With the head."""
    non_embedding: int


Varied = TypedDict("Varied", {"from": float, "to": float})
"""A size of a model, before and after matching."""


class Matching(TypedDict):
    """How a model was made as large as the others."""

    varied: dict[str, Varied]
    """By field."""
    target: int | None
    """Parameters outside the embedding."""
    difference: float
    """To the target, as a share of it."""


class ContenderRecord(TypedDict):
    """One contender."""

    name: str
    text: str
    """As given on the command line."""
    config: dict[str, Any]
    """A `RunConfig` as JSON, of the first seed."""
    parameters: Parameters
    matching: Matching
    learning_rate: Search
    planned_seeds: NotRequired[list[int]]
    """Older records lack it: the shared ones."""
    seeds: list[SeedRecord]
    """Those that are done."""
    summary: Summary
    tokens_per_second_alone: float | None
    difference: NotRequired[Difference | None]
    """None for the first contender that has seeds, and for those without. Filled in when all contenders are there."""


class SearchPlan(TypedDict):
    """The training of a search."""

    steps: int
    seed: int


class Shared(TypedDict):
    """What all contenders have in common."""

    context_length: int
    steps: int
    tokens: int
    tokens_per_step: int
    parameters: int | None
    seeds: list[int]
    search: SearchPlan
    alone_steps: int
    evaluation: dict[str, Any]
    """Arguments of `evaluate_model`."""
    positions: list[int]
    """Multiples of the training context."""
    corpus: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    order: dict[str, str]
    """Digest of the text that a training reads, by seed."""


class MissingRun(TypedDict):
    """A run that failed, is not finished, or could not start."""

    run: str
    folder: str
    message: str


class ComparisonFigures(TypedDict):
    """The record without the command, the environment and how it was run."""

    schema_version: int
    parallel: list[int]
    shared: Shared
    contenders: list[ContenderRecord]
    complete: bool
    failures: list[MissingRun]


class ComparisonRecord(ComparisonFigures):
    """`compare.json`."""

    command: str
    environment: EnvironmentRecord
    threads: int
    """Of each run."""
