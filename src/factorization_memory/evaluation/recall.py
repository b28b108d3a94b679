"""Which tokens of a window could be predicted from its earlier tokens.

A token that followed its predecessor earlier in the same window is an "associative recall hit" (arXiv 2312.04927): recall
suffices to predict it. Its loss, next to that of other tokens, separates recall from everything else a model knows.
"""

from __future__ import annotations

import numpy as np

from factorization_memory.runs.recall_names import KINDS


def kinds(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The kind of each target of one window, as its index in `KINDS`.

    Args:
        inputs: token ids, int64 [T].
        targets: the token after each, int64 [T]; negative if there is none, which gives len(KINDS), no kind.
    """
    real = targets >= 0
    pairs = inputs * (max(int(targets.max(initial=0)), 0) + 1) + np.where(real, targets, 0)
    result = np.full(len(inputs), KINDS.index("new"))
    result[_seen_before(inputs, real)] = KINDS.index("contradicted")
    result[_seen_before(pairs, real)] = KINDS.index("repeated")
    result[~real] = len(KINDS)
    return result


def distances(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How many tokens ago each target of one window last followed its predecessor, int64 [T]; 0 if it never did.
    Arguments as of `kinds`."""
    places = np.flatnonzero(targets >= 0)
    pairs = inputs[places] * (int(targets.max(initial=0)) + 1) + targets[places]
    order = np.argsort(pairs, kind="stable")  # equal pairs adjacent, in time order
    again = np.flatnonzero(pairs[order][1:] == pairs[order][:-1]) + 1
    result = np.zeros(len(inputs), dtype=np.int64)
    result[places[order[again]]] = places[order[again]] - places[order[again - 1]]
    return result


def _seen_before(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Whether each of `values` occurs at an earlier position that is `real`, bool [T]."""
    places = np.arange(len(values))
    _, inverse = np.unique(values, return_inverse=True)
    first = np.full(len(values), len(values))
    np.minimum.at(first, inverse[real], places[real])
    return first[inverse] < places
