"""The record of a model's memory use on a text: `inspection.json`. evaluation/inspection.py says what its parts mean."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Piece(TypedDict):
    """The text of tokens `start` to `end` - 1, in whole characters."""

    text: str
    start: int
    end: int


class TokenStates(TypedDict):
    """For each token, the states with the largest weights, and these weights: [tokens][states kept]."""

    states: list[list[int]]
    weights: list[list[float]]


class StatePiece(TypedDict):
    """A piece of text that a state is used at."""

    text: str
    count: int
    """Occurrences in the text."""
    weight: float
    """Mean over these."""


class StateUse(TypedDict):
    """The use of one state."""

    state: int
    write_share: float
    read_share: float
    memory_length: float | None
    """Tokens until its contents have decayed to 1/e; None if never updated."""
    pieces: list[StatePiece]
    written_after: NotRequired[list[StatePiece]]
    """With an update lag."""
    read_at: NotRequired[list[StatePiece]]
    """With an update lag."""


class HeadInspection(TypedDict):
    """One head of a memory layer."""

    head: int
    writes: TokenStates
    reads: TokenStates
    states: list[StateUse]


class LayerInspection(TypedDict):
    """One memory layer; `layer` is the number of its block."""

    layer: int
    heads: list[HeadInspection]


class InspectionRecord(TypedDict):
    """What `inspect_text` returns."""

    tokens: list[int]
    """Ids."""
    pieces: list[Piece]
    num_states: int
    update_lag: NotRequired[int]
    """Older records lack it, and had none."""
    layers: list[LayerInspection]
