"""Plots of a run's records. Each function returns a matplotlib figure; `png` saves one and `svg` gives it as inline SVG whose
colours follow the page, light or dark."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from factorization_memory.models.routing import DEAD_SHARE

INK, SOFT, LINE = "#1d2127", "#59616c", "#e3e4e0"
SERIES = ("#2257c4", "#c2541d", "#1f8a5b", "#8a4fc4")
BAD = "#b3261e"
_PAGE_COLOURS = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    BAD: "--bad",
    **dict(zip(SERIES, ("--first", "--second", "--third", "--fourth"), strict=True)),
}
_STYLE: Any = {
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
}


def loss_curve(metrics: Sequence[dict[str, Any]]) -> Figure | None:
    """Bits per byte against training tokens, from the lines of `metrics.jsonl`; None without training lines."""
    training = [m for m in metrics if m["kind"] == "train" and m.get("bits_per_byte") is not None]
    if not training:
        return None
    tokens_at = {m["step"]: m["tokens"] for m in training}
    per_step = training[-1]["tokens"] / max(training[-1]["step"], 1)
    evaluations = [m for m in metrics if m["kind"] == "evaluation" and m["step"] > 0]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.add_subplot()
        x = [m["tokens"] for m in training]
        y = [m["bits_per_byte"] for m in training]
        axes.plot(x, y, color=SOFT, alpha=0.28, linewidth=1)
        smooth = _smooth(y)
        axes.plot(x, smooth, color=SOFT, linewidth=1.6)
        ends = [("training", smooth[-1], SOFT)]
        names = sorted({name for m in evaluations for name in m["sources"]})
        shown = smooth[len(smooth) // 10 :]
        for index, name in enumerate(names):
            colour = SERIES[index % len(SERIES)]
            points = [
                (tokens_at.get(m["step"], m["step"] * per_step), m["sources"][name]["bits_per_byte"]) for m in evaluations
            ]
            points = [(at, value) for at, value in points if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, marker="o", markersize=4.5)
                ends.append((f"{name}, held-out", points[-1][1], colour))
                shown += [value for _, value in points]
        # The first steps fall from eight bits per byte; the axis shows what comes after.
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.08 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02)
        axes.set_xlim(0, x[-1])
        _label_ends(axes, ends)
        axes.set_ylabel("bits per byte")
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    return figure


def position_curves(position: dict[str, dict[str, Any]]) -> Figure | None:
    """Bits per byte by position for each source, memory carried and restarted, from the `position` part of evaluation.json."""
    if not position:
        return None
    with matplotlib.rc_context(_STYLE):
        columns = min(len(position), 2)
        rows = -(-len(position) // columns)
        figure = Figure(figsize=(9, 3.9 * rows), layout="constrained")
        for index, (name, result) in enumerate(position.items()):
            axes = figure.add_subplot(rows, columns, index + 1)
            _position_axes(axes, name, result, SERIES[index % len(SERIES)], first=index % columns == 0)
    return figure


def _position_axes(axes: Axes, name: str, result: dict[str, Any], colour: str, first: bool) -> None:
    # Where few tokens stand, the curve is noise and would stretch the axis.
    bins = [b for b in result["bins"] if b["tokens"] >= 256] or result["bins"]
    x = [math.sqrt(b["start"] * (b["end"] - 1)) for b in bins]
    carried = [b["bits_per_byte"] for b in bins]
    error = [b["bits_per_byte"] * b["loss_error"] / b["loss"] if b["loss"] else 0.0 for b in bins]
    context = result["context_length"]
    axes.axvspan(context, x[-1] * 1.25, color=SERIES[0], alpha=0.045, linewidth=0)
    axes.axvline(context, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
    axes.fill_between(
        x,
        [c - 2 * e for c, e in zip(carried, error, strict=True)],
        [c + 2 * e for c, e in zip(carried, error, strict=True)],
        color=colour,
        alpha=0.14,
        linewidth=0,
    )
    beyond = [i for i, b in enumerate(bins) if b["start"] >= context]
    if beyond:
        axes.plot(
            [x[i] for i in beyond],
            [bins[i]["restarted_bits_per_byte"] for i in beyond],
            color=SOFT,
            linewidth=1.6,
            linestyle=(0, (4, 2)),
            label=f"memory restarted every {context:,} tokens",
        )
    axes.plot(x, carried, color=colour, linewidth=2.2, marker="o", markersize=3.8, label="memory carried on")
    axes.set_xscale("log", base=2)
    axes.set_xlim(x[0] / 1.1, x[-1] * 1.25)
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axes.annotate(
        f"trained up to {context:,}",
        (context, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -2),
        textcoords="offset points",
        color=SOFT,
        fontsize=9,
        va="top",
    )
    low, high = min(carried), max(carried)
    room = max(high - low, 0.1)
    axes.set_ylim(low - 0.5 * room, high + 0.35 * room)
    axes.set_title(name)
    axes.set_xlabel("position (tokens read before)")
    if first:
        axes.set_ylabel("bits per byte")
    axes.legend(frameon=False, fontsize=9, loc="lower left", labelcolor=SOFT)


def comparison_curves(contenders: dict[str, dict[str, Any]], context_length: int) -> Figure | None:
    """Loss by position of several models: for each source one plot with a curve for each model.

    `contenders` holds the `by_position` part of a summary in `compare.json` by name: bins of each source with mean and spread
    (drawn as a band) of the loss. None when there are none.
    """
    sources = list(dict.fromkeys(source for by_position in contenders.values() for source in by_position))
    if not sources:
        return None
    with matplotlib.rc_context(_STYLE):
        columns = min(len(sources), 2)
        rows = -(-len(sources) // columns)
        figure = Figure(figsize=(9, 4.2 * rows), layout="constrained")
        for index, source in enumerate(sources):
            axes = figure.add_subplot(rows, columns, index + 1)
            farthest = 1.0
            for turn, (name, by_position) in enumerate(contenders.items()):
                bins = by_position.get(source, [])
                bins = [b for b in bins if b["tokens"] >= 256] or bins
                if not bins:
                    continue
                x = [math.sqrt(b["start"] * (b["end"] - 1)) for b in bins]
                mean, spread = [b["loss"]["mean"] for b in bins], [b["loss"]["spread"] or 0.0 for b in bins]
                # More models than colours go on in another dash.
                colour, dash = SERIES[turn % len(SERIES)], ("-", (0, (4, 2)), (0, (1, 1.5)))[turn // len(SERIES) % 3]
                low, high = zip(*((m - s, m + s) for m, s in zip(mean, spread, strict=True)), strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
                axes.plot(x, mean, color=colour, linestyle=dash, linewidth=2, marker="o", markersize=3.2, label=name)
                farthest = max(farthest, x[-1])
            axes.axvspan(context_length, max(farthest, context_length) * 1.25, color=SERIES[0], alpha=0.045, linewidth=0)
            axes.axvline(context_length, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(
                f"trained up to {context_length:,}",
                (context_length, 1),
                xycoords=("data", "axes fraction"),
                xytext=(5, -2),
                textcoords="offset points",
                color=SOFT,
                fontsize=9,
                va="top",
            )
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(LogLocator(base=4, numticks=9))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
            axes.set_title(source)
            axes.set_xlabel("position (tokens read before)")
            if index % columns == 0:
                axes.set_ylabel("nats per token")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, frameon=False, fontsize=9, labelcolor=SOFT, loc="outside lower center", ncols=min(len(labels), 3)
        )
    return figure


def memory_use(routing: Sequence[dict[str, Any]], context_length: int) -> Figure | None:
    """Share of use of every memory state and how long each remembers, from `RoutingHealth.summary()`; None when it is empty."""
    if not routing:
        return None
    rows = [
        (f"{layer + 1}" if len(health["share"]) == 1 else f"{layer + 1}.{head + 1}", share, health["memory_length"][head])
        # Records of models of memory layers alone once had no number of the layer.
        for layer, health in ((health.get("layer", index), health) for index, health in enumerate(routing))
        for head, share in enumerate(health["share"])
    ]
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(9, 1.5 + 0.24 * max(len(rows), 6)), layout="constrained")
        use, length = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for y, (_, share, lengths) in enumerate(rows):
            _share_row(use, y, share)
            # The dead say nothing about memory; a length past every text is drawn at the edge of what can be told.
            points = [(n, s) for n, s in zip(lengths, share, strict=True) if n is not None and s >= DEAD_SHARE / len(share)]
            if points:
                x, size = [min(n, 1e7) for n, _ in points], [8 + 60 * min(s * len(share), 6) / 6 for _, s in points]
                length.scatter(x, [y] * len(x), s=size, color=SERIES[0], alpha=0.45, linewidths=0)
        use.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        use.set_ylim(len(rows) - 0.4, -0.6)
        use.set_xlim(-0.5, max(len(share) for _, share, _ in rows) - 0.5)
        use.set_ylabel("layer" if all(len(health["share"]) == 1 for health in routing) else "layer.head")
        use.set_xlabel("memory state")
        use.set_title("share of use")
        length.set_xscale("log")
        length.axvline(context_length, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        length.annotate(
            f"training context {context_length:,}",
            (context_length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, 3),
            textcoords="offset points",
            color=SOFT,
            fontsize=8.5,
        )
        length.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
        length.xaxis.set_minor_formatter(NullFormatter())
        length.set_xlabel("tokens remembered (to 1/e)")
        length.set_title("memory length")
        for axes in (use, length):
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(axis="y", length=0)
    return figure


def _share_row(axes: Axes, y: int, share: list[float]) -> None:
    """One head's states as cells, the darker the larger their share; four times an even share is full colour."""
    even = 1 / len(share)
    for x, part in enumerate(share):
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.4), 1, 0.8, facecolor=SERIES[0], alpha=min(1.0, part / (4 * even)), linewidth=0)
        )
    dead = [x for x, part in enumerate(share) if part < DEAD_SHARE * even]
    axes.plot(dead, [y] * len(dead), color=BAD, marker="|", markersize=6, linestyle="none")


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a thirtieth of the curve, started without bias."""
    keep = 1 - 1 / max(len(values) / 30, 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def _label_ends(axes: Axes, ends: list[tuple[str, float, str]]) -> None:
    """Name each curve at its right end, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.058 * (high - low)
    placed = -math.inf
    for label, value, colour in sorted(ends, key=lambda end: end[1]):
        placed = max(value, placed + gap)
        axes.annotate(
            f"{label}  {value:.3f}",
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


def png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG on white, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=160, facecolor="white")
    os.replace(partial, path)


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element to stand in a page with `pages.STYLE`; `name` (unique in the page) keeps its ids apart."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
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
