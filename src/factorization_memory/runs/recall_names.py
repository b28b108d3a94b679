"""Names in records for tokens classified by what preceded them in their window, and how far back."""

from __future__ import annotations

from itertools import pairwise

KINDS = ("repeated", "contradicted", "new")
"""Kinds of a token in a window: repeated, if it has followed its predecessor before; contradicted, if its predecessor occurred
before, but was always followed by other tokens; new, if its predecessor has not been followed by any token yet."""
DISTANCES = (1, 16, 64, 256)
"""Repeated tokens are binned by the distance to their last occurrence after the same predecessor: from each of these up to the
next."""


def distance_ranges() -> list[tuple[int, int | None]]:
    """First distance of each bin of `DISTANCES`, and the first past it; None for the last."""
    return list(pairwise((*DISTANCES, None)))  # type: ignore[arg-type]


def distance_name(start: int, end: int | None) -> str:
    """A bin of `DISTANCES` in human-readable form: "16-63", "256+"."""
    return f"{start}+" if end is None else f"{start}-{end - 1}"
