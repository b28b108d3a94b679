"""Which tokens of a window its earlier tokens could tell.

A model that recalls names a token that has followed its predecessor before, in the same window: an "associative recall hit"
(arXiv 2312.04927). The loss of these, beside that of the others, tells recall from everything else that a model knows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

KINDS = ("repeated", "contradicted", "new")
"""Of a token in a window: repeated, if it has followed its predecessor before; contradicted, if its predecessor stood there
before, always followed by other tokens; new, if its predecessor has not been followed by anything yet."""
DISTANCES = (1, 16, 64, 256)
"""Repeated tokens are told apart by how many tokens before them they last stood behind the same predecessor: from each of these
up to the next."""


def kinds(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The kind of each target of one window, as its place in `KINDS`.

    Args:
        inputs: token ids, int64 [T].
        targets: the token behind each, int64 [T]; negative where there is none, which is of no kind: len(KINDS).
    """
    real = targets >= 0
    pairs = inputs * (max(int(targets.max(initial=0)), 0) + 1) + np.where(real, targets, 0)
    result = np.full(len(inputs), KINDS.index("new"))
    result[_seen_before(inputs, real)] = KINDS.index("contradicted")
    result[_seen_before(pairs, real)] = KINDS.index("repeated")
    result[~real] = len(KINDS)
    return result


def distances(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How many tokens ago each target of one window last followed its predecessor, int64 [T]; 0 where it is not repeated.
    Arguments as of `kinds`."""
    places = np.flatnonzero(targets >= 0)
    pairs = inputs[places] * (int(targets.max(initial=0)) + 1) + targets[places]
    order = np.argsort(pairs, kind="stable")  # equal pairs side by side, in order of time
    again = np.flatnonzero(pairs[order][1:] == pairs[order][:-1]) + 1
    result = np.zeros(len(inputs), dtype=np.int64)
    result[places[order[again]]] = places[order[again]] - places[order[again - 1]]
    return result


def distance_ranges() -> list[tuple[int, int | None]]:
    """First distance of each part of `DISTANCES`, and the first beyond it; None at the last."""
    return list(pairwise((*DISTANCES, None)))  # type: ignore[arg-type]


def _seen_before(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Whether each of `values` stands at an earlier place that is `real`, bool [T]."""
    places = np.arange(len(values))
    _, inverse = np.unique(values, return_inverse=True)
    first = np.full(len(values), len(values))
    np.minimum.at(first, inverse[real], places[real])
    return first[inverse] < places


def distance_name(start: int, end: int | None) -> str:
    """A part of `DISTANCES` as people read it: "16-63", "256+"."""
    return f"{start}+" if end is None else f"{start}-{end - 1}"


def as_text(parts: dict[str, dict[str, Any]]) -> list[str]:
    """Loss and share of each kind, from the figures of those that there are: "1.500 (25%)", or nothing."""
    tokens = sum(part["tokens"] for part in parts.values())
    return [_text(parts.get(kind), tokens) for kind in KINDS]


def distances_as_text(recall: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, list[str]]]:
    """The same of repeated tokens by distance, of several texts: a heading for each distance that there is, and the cells."""
    found = {
        name: {part["start"]: part for part in parts.get("repeated", {}).get("by_distance", [])}
        for name, parts in recall.items()
    }
    ranges = [each for each in distance_ranges() if any(each[0] in parts for parts in found.values())]
    tokens = {name: sum(part["tokens"] for part in parts.values()) for name, parts in recall.items()}
    cells = {name: [_text(parts.get(start), tokens[name]) for start, _ in ranges] for name, parts in found.items()}
    return [f"{distance_name(*each)} ago" for each in ranges], cells


def _text(part: dict[str, Any] | None, tokens: int) -> str:
    return "" if part is None else f"{part['loss']:.3f} ({part['tokens'] / tokens:.0%})"
