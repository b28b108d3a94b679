"""The record of an evaluation: `evaluation.json`. evaluation/run.py writes it and says what its parts mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NotRequired, TypedDict

from factorization_memory.runs.recall_record import RecallRecord

if TYPE_CHECKING:
    from factorization_memory.models.routing import LayerUse


class LossFigures(TypedDict):
    """The loss of some text."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


class DistanceLoss(LossFigures):
    """The loss of tokens that are repeated after `start` to `end` - 1 tokens; None: open."""

    start: int
    end: int | None


class KindLoss(LossFigures):
    """The loss of the tokens of one kind of `runs.recall_names.KINDS`; by distance if they are repeated."""

    by_distance: NotRequired[list[DistanceLoss]]


class TextLoss(LossFigures):
    """What `evaluate_loss` returns; `recall`, by kind, if asked for."""

    recall: NotRequired[dict[str, KindLoss]]


class CorpusLoss(TypedDict):
    """What `evaluate_corpus` returns, by source; `recall`, by source and kind, if asked for."""

    sources: Mapping[str, LossFigures]
    total: LossFigures
    recall: NotRequired[dict[str, dict[str, KindLoss]]]


class NgramFigures(TypedDict):
    """Bits per byte of n-gram models over bytes, by order ("3")."""

    orders: list[int]
    training_bytes: int
    sources: dict[str, dict[str, float]]
    total: dict[str, float]


class StretchLoss(TypedDict):
    """The loss of text read with the memory carried on from the beginning, and restarted each training context."""

    tokens: int
    bytes: int
    loss: float
    """Nats per token, like its error and those below."""
    loss_error: float
    bits_per_byte: float
    restarted_loss: float
    restarted_bits_per_byte: float
    gain: float
    """Restarted minus carried loss of the same tokens."""
    gain_error: float
    """Treats tokens as independent."""


class PositionBin(StretchLoss):
    """The same at positions `start` to `end` - 1."""

    start: int
    end: int
    gain_stretch_error: NotRequired[float | None]
    """Treats stretches as independent; None for a single one. Older records lack it."""


class PositionLoss(TypedDict):
    """What `loss_by_position` returns."""

    context_length: int
    max_position: int
    """The last one reached."""
    stretches: int
    tokens: int
    bins: list[PositionBin]


class SourcePosition(PositionLoss):
    """The loss by position of one source."""

    beyond: dict[str, PositionBin]
    """By multiple of the training context ("16"): one bin for 8 to 16 training contexts."""


class RecallOptions(TypedDict, total=False):
    """Arguments of an evaluation for the recall suite."""

    recall_items: int | None
    recall_lengths: Sequence[int]


class Evaluated(RecallOptions):
    """What was evaluated, and the arguments of the evaluation; None is the default."""

    checkpoint: str
    corpus_fingerprint: str
    max_position: int | None
    max_tokens: int | None
    stretches: int


class EvaluationRecord(TypedDict, total=False):
    """`evaluation.json`. Those of other versions and options, which reports read too, may lack any part."""

    evaluated: Evaluated
    context_length: int
    """Tokens of a training sequence."""
    sources: Mapping[str, LossFigures]
    total: LossFigures
    recall: dict[str, dict[str, KindLoss]]
    """By source and kind."""
    ngram: NgramFigures
    position: dict[str, SourcePosition]
    """By source."""
    recall_tasks: RecallRecord
    routing: list[LayerUse]
    """A model without memory layers has none."""
