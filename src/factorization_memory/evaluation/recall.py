"""Which tokens of a window its earlier tokens could tell.

A model that recalls names a token that has followed its predecessor before, in the same window: an "associative recall hit"
(arXiv 2312.04927). The loss of these, beside that of the others, tells recall from everything else that a model knows.
"""

from __future__ import annotations

import numpy as np

from factorization_memory.runs.recall_names import KINDS


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


def _seen_before(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Whether each of `values` stands at an earlier place that is `real`, bool [T]."""
    places = np.arange(len(values))
    _, inverse = np.unique(values, return_inverse=True)
    first = np.full(len(values), len(values))
    np.minimum.at(first, inverse[real], places[real])
    return first[inverse] < places
