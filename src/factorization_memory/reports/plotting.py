"""Style, shared helpers and output of the reports' plots."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from factorization_memory._files import atomic_file
from factorization_memory._text import visible

INK, SOFT, LINE = "#1d2127", "#59616c", "#e3e4e0"
SERIES = ("#2257c4", "#c2541d", "#1f8a5b", "#8a4fc4")
BAD = "#b3261e"
MOST_SOURCES = 12
"""Maximum number of sources in a figure, those with the most text; tables show all."""
_PAGE_COLOURS = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    BAD: "--bad",
    **dict(zip(SERIES, ("--first", "--second", "--third", "--fourth"), strict=True)),
}
STYLE: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlecolor": INK,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 10,
    "axes.edgecolor": LINE,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.parse_math": False,  # "$" in a name is a dollar
}


def label_ends(axes: Axes, ends: list[tuple[str, float, str]], number: str = "{:.3f}") -> None:
    """Labels each curve at its right end; labels that would overlap are moved apart."""
    low, high = axes.get_ylim()
    gap = 0.058 * (high - low)
    placed = -math.inf
    for label, value, colour in sorted(ends, key=lambda end: end[1]):
        placed = max(value, placed + gap)
        axes.annotate(
            f"{label}  {number.format(value)}",
            (1, placed),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9.5,
            annotation_clip=False,
        )


def short(value: float) -> str:
    """3_500_000 as "3.5 M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def largest(sizes: Mapping[str, int]) -> list[str]:
    """The names of the `MOST_SOURCES` largest, in their original order."""
    kept = sorted(sizes, key=lambda name: -sizes[name])[:MOST_SOURCES]
    return [name for name in sizes if name in kept]


def named(name: str) -> str:
    """The name of a source or model, shortened to fit in figures."""
    shown = visible(name)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


@contextmanager
def _any_script() -> Iterator[None]:
    """Allows names in scripts that matplotlib's font lacks: an SVG leaves the font to the viewer, a PNG shows boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


def png(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG on white, atomically."""
    with atomic_file(path) as partial, _any_script():
        figure.savefig(partial, format="png", dpi=160, facecolor="white")


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element for a page with `pages.STYLE`; `name`, unique in the page, keeps its ids distinct."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}), _any_script():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"(font: [^;\"']*?)'[^;\"]*", r"\1var(--sans)", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
    for colour, variable in _PAGE_COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return text
