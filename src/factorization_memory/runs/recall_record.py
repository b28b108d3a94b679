"""The records of what a model recalls: the suite's part of `evaluation.json`, and `recall_demo.json`."""

from __future__ import annotations

from typing import Any, TypedDict


class QueryFigures(TypedDict):
    """Figures of queries. Standard errors treat sequences, not queries, as independent; None for a single sequence."""

    sequences: int
    asked: int
    """Queries in all of them."""
    chance: float
    """Share that guessing among the candidates would get right."""
    choice: float
    """Share whose correct answer is the likeliest candidate."""
    choice_error: float | None
    exact: float
    """Share that greedy decoding answers correctly."""
    exact_error: float | None


class Distances(TypedDict):
    """Distances in tokens, `start` to `end` - 1."""

    start: int
    end: int


class ByPairs(QueryFigures):
    """Sequences of so many keys and values."""

    pairs: int


class ByPairsAndDistance(ByPairs, Distances):
    """The same, of the keys that occurred so many tokens earlier."""


class ByNeedles(QueryFigures):
    """Haystacks of so many needles."""

    needles: int


class ByLength(ByNeedles):
    """Haystacks of so many tokens with so many needles."""

    length: int


class ByDepth(QueryFigures):
    """Needles with `start` to `end` of the haystack before them, as shares of it."""

    start: float
    end: float


class ByDistance(QueryFigures, Distances):
    """Needles that the question follows by so many tokens."""


class AssociativeFigures(TypedDict):
    """Keys and values, random tokens."""

    by_pairs: list[ByPairs]
    by_distance: list[ByPairsAndDistance]
    """Of the largest number of pairs."""


class NeedleFigures(TypedDict):
    """Names with numbers, hidden in one source's text."""

    language: str
    by_length: list[ByLength]
    by_needles: list[ByNeedles]
    by_depth: list[ByDepth]
    by_distance: list[ByDistance]


class CopyLength(TypedDict):
    """Copies of stretches of `length` tokens."""

    length: int
    sequences: int
    tokens: int
    """In the copies of all sequences."""
    accuracy: float
    accuracy_error: float | None
    loss: float
    """Nats per token of the copy."""
    first_loss: float
    """Nats per token of the stretch."""


class CopyFigures(TypedDict):
    """Copies of one source's text, or of random tokens."""

    by_length: list[CopyLength]


class RecallRecord(TypedDict):
    """What `evaluate_recall` returns; see evaluation/recall_suite.py."""

    version: str
    """Of the items: figures of different versions are not comparable."""
    items: int
    associative: AssociativeFigures
    needle: dict[str, NeedleFigures]
    """By source."""
    copy: dict[str, CopyFigures]
    """By source, or "random"."""
    left_out: list[str]
    """Sentences: what was skipped, and why."""


class RecallDemoAnswers(TypedDict):
    """What one of the two models of the demonstration answers, and what it reads from its memory for that."""

    answers: list[str]
    layer: int
    """Number of its block."""
    reads: list[list[float]]
    """[questions][tokens], as shares of 1."""


class RecallDemoModel(RecallDemoAnswers):
    """One of the two models."""

    name: str
    update_lag: int
    config: dict[str, Any]
    """A `ModelConfig` as JSON."""
    parameters: int
    step: list[int]
    accuracy: list[float]
    """After each of `step`: share of correct values."""


class RecallDemoRecord(TypedDict):
    """`recall_demo.json`; see evaluation/recall_demo.py."""

    pairs: int
    seconds: float
    """Of both models together."""
    tokens: list[str]
    asked: list[int]
    """Positions in `tokens`."""
    models: list[RecallDemoModel]
