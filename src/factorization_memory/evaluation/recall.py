"""Which tokens of a window its earlier tokens could tell.

A model that recalls names a token that has followed its predecessor before, in the same window: an "associative recall hit"
(arXiv 2312.04927). The loss of these, beside that of the others, tells recall from everything else that a model knows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

KINDS = ("repeated", "contradicted", "new")
"""Of a token in a window: repeated, if it has followed its predecessor before; contradicted, if its predecessor stood there
before, always followed by other tokens; new, if its predecessor has not been followed by anything yet."""


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


def _seen_before(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Whether each of `values` stands at an earlier place that is `real`, bool [T]."""
    places = np.arange(len(values))
    _, inverse = np.unique(values, return_inverse=True)
    first = np.full(len(values), len(values))
    np.minimum.at(first, inverse[real], places[real])
    return first[inverse] < places


def as_text(parts: dict[str, dict[str, Any]]) -> list[str]:
    """Loss and share of each kind, from the figures of those that there are: "1.500 (25%)", or nothing."""
    tokens = sum(part["tokens"] for part in parts.values())
    return [f"{parts[kind]['loss']:.3f} ({parts[kind]['tokens'] / tokens:.0%})" if kind in parts else "" for kind in KINDS]
