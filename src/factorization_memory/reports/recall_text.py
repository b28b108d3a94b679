"""Losses of tokens by what their window contained before, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from factorization_memory.runs.recall_names import KINDS, distance_name, distance_ranges

if TYPE_CHECKING:
    from factorization_memory.runs.evaluation_record import KindLoss, LossFigures


def as_text(parts: dict[str, KindLoss]) -> list[str]:
    """Loss and share of each kind, from the figures of those that there are: "1.500 (25%)", or nothing."""
    tokens = sum(part["tokens"] for part in parts.values())
    return [_text(parts.get(kind), tokens) for kind in KINDS]


def distances_as_text(recall: dict[str, dict[str, KindLoss]]) -> tuple[list[str], dict[str, list[str]]]:
    """The same for repeated tokens by distance, for several texts: a heading per distance that occurs, and the cells."""
    found = {
        name: {part["start"]: part for part in (parts["repeated"].get("by_distance", []) if "repeated" in parts else [])}
        for name, parts in recall.items()
    }
    ranges = [each for each in distance_ranges() if any(each[0] in parts for parts in found.values())]
    tokens = {name: sum(part["tokens"] for part in parts.values()) for name, parts in recall.items()}
    cells = {name: [_text(parts.get(start), tokens[name]) for start, _ in ranges] for name, parts in found.items()}
    return [f"{distance_name(*each)} ago" for each in ranges], cells


def _text(part: LossFigures | None, tokens: int) -> str:
    return "" if part is None else f"{part['loss']:.3f} ({part['tokens'] / tokens:.0%})"
