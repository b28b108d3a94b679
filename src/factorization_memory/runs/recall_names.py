"""How a record names tokens by what their window held before, and how far away."""

from __future__ import annotations

from itertools import pairwise

KINDS = ("repeated", "contradicted", "new")
"""Of a token in a window: repeated, if it has followed its predecessor before; contradicted, if its predecessor stood there
before, always followed by other tokens; new, if its predecessor has not been followed by anything yet."""
DISTANCES = (1, 16, 64, 256)
"""Repeated tokens are told apart by how many tokens before them they last stood behind the same predecessor: from each of these
up to the next."""


def distance_ranges() -> list[tuple[int, int | None]]:
    """First distance of each part of `DISTANCES`, and the first beyond it; None at the last."""
    return list(pairwise((*DISTANCES, None)))  # type: ignore[arg-type]


def distance_name(start: int, end: int | None) -> str:
    """A part of `DISTANCES` as people read it: "16-63", "256+"."""
    return f"{start}+" if end is None else f"{start}-{end - 1}"
