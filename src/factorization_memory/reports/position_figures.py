"""Plots of the loss by position, of one model and of several. Each function returns a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from factorization_memory.reports.plotting import SERIES, SOFT, STYLE, largest, named

if TYPE_CHECKING:
    from factorization_memory.runs.comparison_record import RangeFigures
    from factorization_memory.runs.evaluation_record import PositionBin, SourcePosition


def position_curves(position: dict[str, SourcePosition]) -> Figure | None:
    """Bits per byte by position for each source, memory carried on, and below it how much less or more that is than on the same
    tokens with the memory restarted each training context; from the `position` part of evaluation.json."""
    if not position:
        return None
    kept = largest({name: sum(b["tokens"] for b in result["bins"]) for name, result in position.items()})
    position = {name: position[name] for name in kept}
    with matplotlib.rc_context(STYLE):
        columns = min(len(position), 2)
        rows = -(-len(position) // columns)
        figure = Figure(figsize=(9, 5.6 * rows), layout="constrained")
        axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 2.4] * rows)
        for index in range(rows * columns):
            row, column = divmod(index, columns)
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            if index >= len(position):
                above.set_axis_off()
                below.set_axis_off()
                continue
            name, result = list(position.items())[index]
            colour = SERIES[index % len(SERIES)]
            # With few tokens the curve is noise and would stretch the axis.
            bins = [b for b in result["bins"] if b["tokens"] >= 256] or result["bins"]
            x = [math.sqrt(b["start"] * (b["end"] - 1)) for b in bins]
            _loss_axes(above, name, bins, x, colour)
            _difference_axes(below, bins, x, result["context_length"], colour)
            for each in (above, below):
                _position_axis(each, x, result["context_length"])
            _name_context(above, result["context_length"])
            below.set_xlabel("position (tokens read before)")
            if column == 0:
                above.set_ylabel("bits per byte")
                below.set_ylabel("difference in bits per byte")
    return figure


def comparison_curves(contenders: dict[str, dict[str, list[RangeFigures]]], context_length: int) -> Figure | None:
    """Loss by position of several models: for each source one plot with a curve for each model.

    `contenders` holds the `by_position` part of a summary in `compare.json` by name: bins of each source with mean and spread
    (drawn as a band) of the loss. None when there are none.
    """
    sizes: dict[str, int] = {}
    for by_position in contenders.values():
        for source, bins in by_position.items():
            sizes[source] = max(sizes.get(source, 0), sum(b["tokens"] for b in bins))
    sources = largest(sizes)
    if not sources:
        return None
    with matplotlib.rc_context(STYLE):
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
                # With more models than colors, continue with another dash pattern.
                colour, dash = SERIES[turn % len(SERIES)], ("-", (0, (4, 2)), (0, (1, 1.5)))[turn // len(SERIES) % 3]
                low, high = zip(*((m - s, m + s) for m, s in zip(mean, spread, strict=True)), strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
                axes.plot(x, mean, color=colour, linestyle=dash, linewidth=2, marker="o", markersize=3.2, label=named(name))
                farthest = max(farthest, x[-1])
            _shade_beyond(axes, context_length, farthest)
            _name_context(axes, context_length)
            _scale_positions(axes)
            axes.set_title(named(source))
            axes.set_xlabel("position (tokens read before)")
            if index % columns == 0:
                axes.set_ylabel("nats per token")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, frameon=False, fontsize=9, labelcolor=SOFT, loc="outside lower center", ncols=min(len(labels), 3)
        )
    return figure


def _loss_axes(axes: Axes, name: str, bins: Sequence[PositionBin], x: Sequence[float], colour: str) -> None:
    carried = [b["bits_per_byte"] for b in bins]
    error = [b["bits_per_byte"] * b["loss_error"] / b["loss"] if b["loss"] else 0.0 for b in bins]
    axes.fill_between(
        x,
        [c - 2 * e for c, e in zip(carried, error, strict=True)],
        [c + 2 * e for c, e in zip(carried, error, strict=True)],
        color=colour,
        alpha=0.14,
        linewidth=0,
    )
    axes.plot(x, carried, color=colour, linewidth=2.2, marker="o", markersize=3.8)
    low, high = min(carried), max(carried)
    room = max(high - low, 0.1)
    axes.set_ylim(low - 0.35 * room, high + 0.35 * room)
    axes.set_title(f"{named(name)}: loss, memory carried on")


def _difference_axes(axes: Axes, bins: Sequence[PositionBin], x: Sequence[float], context: int, colour: str) -> None:
    """Carried minus restarted on the same tokens, with two standard errors; up to the context the two are identical."""
    beyond = [i for i, b in enumerate(bins) if b["start"] >= context]
    difference = [bins[i]["bits_per_byte"] - bins[i]["restarted_bits_per_byte"] for i in beyond]
    axes.axhline(0, color=SOFT, linewidth=1)
    axes.set_title("carried − restarted (below 0: it helps)")
    if not beyond:
        axes.set_ylim(-0.05, 0.05)
        return
    errors = []
    for i in beyond:
        # Older records have only the error over tokens.
        over_tokens, over_stretches = bins[i]["gain_error"], bins[i].get("gain_stretch_error")
        error = over_tokens if over_stretches is None else max(over_tokens, over_stretches)
        errors.append(2 * error * bins[i]["tokens"] / math.log(2) / bins[i]["bytes"])
    at = [x[i] for i in beyond]
    axes.errorbar(
        at,
        difference,
        yerr=errors,
        color=colour,
        ecolor=colour,
        elinewidth=1.4,
        capsize=3,
        linewidth=1.6,
        marker="o",
        markersize=4.5,
    )
    low = min(d - e for d, e in zip(difference, errors, strict=True))
    high = max(d + e for d, e in zip(difference, errors, strict=True))
    room = 0.12 * max(high - low, 0.02)
    axes.set_ylim(min(low, 0) - room, max(high, 0) + room)


def _position_axis(axes: Axes, x: Sequence[float], context: int) -> None:
    _shade_beyond(axes, context, x[-1])
    _scale_positions(axes)
    axes.set_xlim(min(x[0], context) / 1.1, max(x[-1], context) * 1.25)


def _scale_positions(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def _shade_beyond(axes: Axes, context: int, farthest: float) -> None:
    """Mark the positions beyond a training context."""
    axes.axvspan(context, max(farthest, context) * 1.25, color=SERIES[0], alpha=0.045, linewidth=0)
    axes.axvline(context, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))


def _name_context(axes: Axes, context: int) -> None:
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
