"""The figures of a recall suite's queries, grouped by size, depth or distance; recall_suite.py says what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def grouped(queries: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Any]:
    """The figures of queries grouped by `key`, in its order: a list of `QueryFigures`, each with what `key` returns."""
    groups: dict[tuple[Any, ...], tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for query in queries:
        named = key(query)
        groups.setdefault(tuple(named.values()), (named, []))[1].append(query)
    return [{**named, **_figures(part)} for _, (named, part) in sorted(groups.items(), key=lambda each: each[0])]


def _figures(queries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_sequence: dict[Any, list[dict[str, Any]]] = {}
    for query in queries:
        by_sequence.setdefault(query["sequence"], []).append(query)
    figures: dict[str, Any] = {"sequences": len(by_sequence), "asked": len(queries)}
    figures["chance"] = float(np.mean([query["chance"] for query in queries]))
    for share in ("choice", "exact"):
        right = [sum(query[share] for query in part) for part in by_sequence.values()]
        figures[share] = sum(right) / len(queries)
        figures[f"{share}_error"] = standard_error(right, [len(part) for part in by_sequence.values()])
    return figures


def standard_error(right: Sequence[float], asked: Sequence[int]) -> float | None:
    """Standard error of sum(right) / sum(asked) over independent sequences, but at least that of as many independent queries
    at a share half a query away from 0 and 1: a few sequences that happen to agree do not give certainty."""
    n, all_asked = len(right), sum(asked)
    if n < 2:
        return None
    share, smoothed = sum(right) / all_asked, (sum(right) + 0.5) / (all_asked + 1)
    squares = sum((hit - share * count) ** 2 for hit, count in zip(right, asked, strict=True))
    return float(max((n / (n - 1) * squares) ** 0.5 / all_asked, (smoothed * (1 - smoothed) / all_asked) ** 0.5))


def doubling(distance: int) -> dict[str, int]:
    """The powers of two that a distance lies between."""
    start = 1 << (distance.bit_length() - 1)
    return {"start": start, "end": 2 * start}


def fifth_of(depth: float) -> dict[str, float]:
    """The fifth of the haystack that a depth lies in."""
    fifth = min(int(5 * depth), 4)
    return {"start": fifth / 5, "end": (fifth + 1) / 5}
