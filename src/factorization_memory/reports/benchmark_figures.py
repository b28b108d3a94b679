"""Plots of benchmarks: for the recurrence, time per token of each contender at each size, relative to the floor; for whole
models, latency against context length and tokens per second against batch size."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from factorization_memory._files import write_atomic
from factorization_memory.benchmarks.floor import PASSES
from factorization_memory.config import ConfigError

SUFFIXES = (".png", ".svg")
INK, SOFT, LINE = "#1d2127", "#59616c", "#e3e4e0"
COLOURS = ("#2257c4", "#c2541d", "#1f8a5b", "#8a4fc4", "#b8860b", "#59616c", "#b23a6f", "#2a8fa3")
MARKERS = "osD^vPX*"
DENSE, SPARSE = "triton-dense", "triton-sparse"
LEAST_SPAN = 8.0
"""Minimum ratio of top to bottom of the time axis, so that nearly equal times look equal."""
TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "svg.fonttype": "none",
}


def check_path(path: Path) -> None:
    """Raises ConfigError if `path` cannot be a plot: its suffix must be one of `SUFFIXES`, and it must not be a folder."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot={str(path)!r}: name a file that ends in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise ConfigError(f"plot={str(path)!r}: is a folder; name a file in it")


def save(result: dict[str, Any], path: Path, drawing: Callable[[dict[str, Any]], Figure] | None = None) -> None:
    """Draws a result to a .png or .svg file, written atomically; creates folders. `drawing` defaults to `draw`.

    Raises ConfigError as `check_path`.
    """
    check_path(path)
    drawn = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        (drawing or draw)(result).savefig(drawn, format=path.suffix.lower().removeprefix("."), dpi=150)
    write_atomic(path, drawn.getvalue())


def draw(result: dict[str, Any]) -> Figure:
    """The figure: a panel per pass with the sizes side by side. Below, if lengths were measured, time against length; if both
    forms of a sparse memory were measured, the speedup of the sparse form over the masked dense one."""
    with matplotlib.rc_context(_STYLE):
        names = list(dict.fromkeys(record["contender"] for record in (*result["comparison"], *result["lengths"])))
        gains = {part: _gains(result, part) for part in PASSES}
        rows = 1 + bool(result["lengths"]) + any(gains.values())
        figure = Figure(figsize=(max(9.0, 3.2 * len(result["floors"])), 4.2 * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, len(PASSES), squeeze=False)
        for column, part in enumerate(PASSES):
            panels = iter(axes[:, column])
            _compare(first := next(panels), result, part, names)
            _scale(first)
            if result["lengths"]:
                _lengths(second := next(panels), result, part, names)
                _scale(second)
            if any(gains.values()):
                _break_even(next(panels), gains[part], part)
        for row in range(1 + bool(result["lengths"])):
            axes[row][0].set_ylabel("ns per token")
        _frame(figure, result)
    return figure


def draw_inference(result: dict[str, Any]) -> Figure:
    """The figure of a result of `inference.run`: latency of a token over the context, with the fewest and the most sequences;
    tokens per second over the number of sequences, after the longest context. Of a step's two modes, the graph where there is
    one."""
    with matplotlib.rc_context(_STYLE):
        records = [record | {"figures": _fastest(record)} for record in result["records"] if record["decode"]]
        names = list(dict.fromkeys(record["contender"] for record in result["records"]))
        batches = sorted({record["batch"] for record in result["records"]})
        longest = max(record["context"] for record in result["records"])
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        latency, speed = figure.subplots(1, 2)
        latency.set_title("latency of a token, ms, by context")
        latency.set_xlabel("tokens read (k = 1024)")
        speed.set_title(f"tokens per second, after {_thousands(longest)} tokens")
        speed.set_xlabel("sequences at once")
        for index, name in enumerate(names):
            mine = [record for record in records if record["contender"] == name]
            for batch in dict.fromkeys((batches[0], batches[-1])):
                points = [(r["context"], 1000 * r["figures"]["seconds"]["median"]) for r in mine if r["batch"] == batch]
                second = batch != batches[0]
                look = _look(index) | ({"markerfacecolor": "white"} if second else {})
                label = f"{name}, B={batch}" if len(batches) > 1 else name
                _line(latency, points, label, linestyle="--" if second else "-", **look)
            last = [(r["batch"], r["figures"]["tokens_per_second"]) for r in mine if r["context"] == longest]
            _line(speed, last, name if len(batches) == 1 else None, linestyle="-", **_look(index))
        for axes, written in ((latency, _thousands), (speed, lambda value: f"{value:g}")):
            _powers_of_two(axes, written)
            _scale(axes)
        _frame(figure, result)
    return figure


def _fastest(record: dict[str, Any]) -> dict[str, Any]:
    return record["decode"].get("graph") or record["decode"].get("loops") or record["decode"]["eager"]


def _line(axes: Axes, points: list[tuple[int, float]], label: str | None, **look: Any) -> None:
    if points:
        axes.plot(*zip(*sorted(points), strict=True), linewidth=1.5, label=label, **look)


def _frame(figure: Figure, result: dict[str, Any]) -> None:
    """One legend for all panels, and the origin of the figures."""
    labels: dict[str, Artist] = {}
    for panel in figure.axes:
        handles, texts = panel.get_legend_handles_labels()
        labels |= dict(zip(texts, handles, strict=True))
    figure.legend(
        list(labels.values()),
        list(labels),
        loc="outside lower center",
        ncols=max(1, min(len(labels), int(figure.get_figwidth() / 2.2))),
        frameon=False,
    )
    where = result["machine"]
    figure.suptitle(f"{where['name']}, {result['dtype']}, torch {where['torch']}", x=0.01, ha="left", fontsize=10, color=SOFT)


def _compare(axes: Axes, result: dict[str, Any], part: str, names: list[str]) -> None:
    shapes = list(result["floors"])
    axes.set_title(TITLES[part])
    for position, shape in enumerate(shapes):
        label = "floor" if position == 0 else None
        least = result["floors"][shape][part]["ns_per_token"]
        axes.plot((position - 0.42, position + 0.42), (least, least), color=INK, linewidth=1.6, label=label, zorder=1)
        there = [r for r in result["comparison"] if r["shape"] == shape and r[part] is not None]
        for slot, record in enumerate(there):
            # Contenders are placed side by side in order, so that equal times do not hide each other.
            x = position + (slot - (len(there) - 1) / 2) * min(0.16, 0.8 / max(len(there), 1))
            index, y = names.index(record["contender"]), record[part]["ns_per_token"]
            axes.plot(x, y, **_look(index), linestyle="none", label=record["contender"])
            axes.annotate(_number(y), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7.5, color=SOFT)
    axes.set_xticks(range(len(shapes)), [_title(shape) for shape in shapes])
    axes.set_xlim(-0.6, len(shapes) - 0.4)


def _gains(result: dict[str, Any], part: str) -> dict[str, list[tuple[float, float]]]:
    """M / K and the speedup of the sparse form over the masked dense one, by the rest of the size; from CUDA graphs if both
    were captured."""
    found: dict[str, list[tuple[float, float]]] = {}
    for shape in result["floors"]:
        records = {r["contender"]: r for r in result["comparison"] if r["shape"] == shape and r[part] is not None}
        if not {DENSE, SPARSE} <= records.keys() or records[SPARSE]["top_k"] is None:
            continue
        size, figures = records[SPARSE], [records[name][part] for name in (DENSE, SPARSE)]
        captured = all(figure["graph_ns_per_token"] is not None for figure in figures)
        dense, sparse = (figure["graph_ns_per_token" if captured else "ns_per_token"] for figure in figures)
        label = f"M={size['num_states']}, D={size['value_size']}, B={size['batch']}, T={size['length']}"
        found.setdefault(label, []).append((size["num_states"] / size["top_k"], dense / sparse))
    return found


def _break_even(axes: Axes, gains: dict[str, list[tuple[float, float]]], part: str) -> None:
    axes.set_title(f"{TITLES[part]}: speed of {SPARSE} over {DENSE}, by M / K")
    axes.axhline(1, color=INK, linewidth=1.2)
    for index, (label, points) in enumerate(gains.items()):
        axes.plot(*zip(*sorted(points), strict=True), linestyle="-", linewidth=1.5, label=label, **_look(index))
        for x, y in points:
            text = f"{y:.2g}x"
            axes.annotate(text, (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7.5, color=SOFT)
    _powers_of_two(axes, lambda value: f"{value:g}")
    axes.set_ylim(bottom=0)


def _lengths(axes: Axes, result: dict[str, Any], part: str, names: list[str]) -> None:
    axes.set_title(f"{TITLES[part]}, by length")
    groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in result["lengths"]:
        if record[part] is not None:
            point = (record["length"], record[part]["ns_per_token"])
            groups.setdefault((record["contender"], record["sweep"]), []).append(point)
    sweeps = list(dict.fromkeys(sweep for _, sweep in groups))
    for (contender, sweep), points in groups.items():
        second = sweeps.index(sweep) > 0
        look = _look(names.index(contender)) | ({"markerfacecolor": "white"} if second else {})
        label = contender if len(sweeps) == 1 else f"{contender}, {sweep}"
        axes.plot(*zip(*sorted(points), strict=True), linestyle="--" if second else "-", linewidth=1.5, label=label, **look)
    _powers_of_two(axes, _thousands)
    axes.set_xlabel("tokens of a sequence (k = 1024)")


def _powers_of_two(axes: Axes, written: Callable[[float], str]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _thousands(value: float) -> str:
    return f"{value / 1024:g}k"


def _scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    low, high = low / 1.1, high * 1.25  # room for the numbers
    spread = max(1.0, math.sqrt(LEAST_SPAN / (high / low)))
    axes.set_ylim(low / spread, high * spread)


def _look(index: int) -> dict[str, Any]:
    colour = COLOURS[index % len(COLOURS)]
    return {"color": colour, "marker": MARKERS[index % len(MARKERS)], "markersize": 6, "zorder": 2}


def _title(shape: str) -> str:
    batch, length, heads, states, width, *selected = shape.split("x")
    lines = [f"M={states}, D={width}", *(f"K={count}" for count in selected), f"B={batch}, T={length}"]
    return "\n".join(lines if heads == "1" else [*lines, f"H={heads}"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
