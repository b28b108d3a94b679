"""Plots of a run's records. Each function returns a matplotlib figure; `png` saves one and `svg` gives it as inline SVG whose
colours follow the page, light or dark."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from factorization_memory._files import atomic_file
from factorization_memory._text import visible
from factorization_memory.models.routing import DEAD_SHARE

INK, SOFT, LINE = "#1d2127", "#59616c", "#e3e4e0"
SERIES = ("#2257c4", "#c2541d", "#1f8a5b", "#8a4fc4")
BAD = "#b3261e"
MOST_SOURCES = 12
"""Sources that a figure shows, those with the most text; tables hold all."""
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
    "text.parse_math": False,  # "$" in a name is a dollar
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
        sizes = {name: part.get("tokens", 0) for m in evaluations for name, part in m["sources"].items()}
        names = sorted(_largest(sizes))
        shown = smooth[len(smooth) // 10 :]
        for index, name in enumerate(names):
            colour = SERIES[index % len(SERIES)]
            points = [
                (tokens_at.get(m["step"], m["step"] * per_step), m["sources"][name]["bits_per_byte"]) for m in evaluations
            ]
            points = [(at, value) for at, value in points if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, marker="o", markersize=4.5)
                ends.append((f"{_named(name)}, held-out", points[-1][1], colour))
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
    """Bits per byte by position for each source, memory carried on, and below it how much less or more that is than on the same
    tokens with the memory restarted each training context; from the `position` part of evaluation.json."""
    if not position:
        return None
    kept = _largest({name: sum(b["tokens"] for b in result["bins"]) for name, result in position.items()})
    position = {name: position[name] for name in kept}
    with matplotlib.rc_context(_STYLE):
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
            # Where few tokens stand, the curve is noise and would stretch the axis.
            bins = [b for b in result["bins"] if b["tokens"] >= 256] or result["bins"]
            x = [math.sqrt(b["start"] * (b["end"] - 1)) for b in bins]
            _loss_axes(above, name, bins, x, colour)
            _difference_axes(below, bins, x, result["context_length"], colour)
            for each in (above, below):
                _position_axis(each, x, result["context_length"])
            _mark_context(above, result["context_length"])
            below.set_xlabel("position (tokens read before)")
            if column == 0:
                above.set_ylabel("bits per byte")
                below.set_ylabel("difference in bits per byte")
    return figure


def _loss_axes(axes: Axes, name: str, bins: Sequence[dict[str, Any]], x: Sequence[float], colour: str) -> None:
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
    axes.set_title(f"{_named(name)}: loss, memory carried on")


def _difference_axes(axes: Axes, bins: Sequence[dict[str, Any]], x: Sequence[float], context: int, colour: str) -> None:
    """Carried minus restarted on the same tokens, with two standard errors; up to the context the two are one reading."""
    beyond = [i for i, b in enumerate(bins) if b["start"] >= context]
    difference = [bins[i]["bits_per_byte"] - bins[i]["restarted_bits_per_byte"] for i in beyond]
    axes.axhline(0, color=SOFT, linewidth=1)
    axes.set_title("carried − restarted (below 0: it helps)")
    if not beyond:
        axes.set_ylim(-0.05, 0.05)
        return
    errors = []
    for i in beyond:
        # Records from before there was an error over stretches have the one over tokens alone.
        over_tokens, over_stretches = bins[i]["gain_error"], bins[i].get("gain_stretch_error")
        error = over_tokens if over_stretches is None else max(over_tokens, over_stretches)
        errors.append(2 * error * bins[i]["tokens"] / math.log(2) / bins[i]["bytes"])
    at = [x[i] for i in beyond]
    axes.errorbar(
        at, difference, yerr=errors, color=colour, ecolor=colour, elinewidth=1.4, capsize=3, linewidth=1.6, marker="o",
        markersize=4.5,
    )  # fmt: skip
    low = min(d - e for d, e in zip(difference, errors, strict=True))
    high = max(d + e for d, e in zip(difference, errors, strict=True))
    room = 0.12 * max(high - low, 0.02)
    axes.set_ylim(min(low, 0) - room, max(high, 0) + room)


def _position_axis(axes: Axes, x: Sequence[float], context: int) -> None:
    axes.axvspan(context, max(x[-1], context) * 1.25, color=SERIES[0], alpha=0.045, linewidth=0)
    axes.axvline(context, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(x[0], context) / 1.1, max(x[-1], context) * 1.25)
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def _mark_context(axes: Axes, context: int) -> None:
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


def recall_curves(record: dict[str, Any] | None) -> Figure | None:
    """Share of values named right against steps of training, for each form, from `recall_demo.json`; None without a record."""
    if not record:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.add_subplot()
        ends = []
        for colour, model in zip(SERIES, record["models"], strict=False):
            accuracy = [100 * value for value in model["accuracy"]]
            axes.plot(model["step"], accuracy, color=colour, linewidth=2.2, marker="o", markersize=3.6)
            ends.append((model["name"], accuracy[-1], colour))
        guess = 100 / record["pairs"]
        axes.axhline(guess, color=SOFT, linewidth=1, linestyle=(0, (4, 2)))
        last = record["models"][0]["step"][-1]
        axes.annotate(
            f"guessing among the {record['pairs']} values in the sequence", (0.1 * last, guess), xytext=(0, 4),
            textcoords="offset points", color=SOFT, fontsize=9,
        )  # fmt: skip
        axes.set_ylim(-3, 106)
        axes.set_xlim(0, last)
        _label_ends(axes, ends, "{:.0f} %")
        axes.set_title("How soon each form names the value behind a key")
        axes.set_ylabel("values named right, %")
        axes.set_xlabel("training steps")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    return figure


def recall_reads(record: dict[str, Any] | None) -> Figure | None:
    """For one sequence, what each question reads: a row for each key asked again, a cell for each token that wrote, its
    colour the stronger the more of what is read; from `recall_demo.json`. None without a record."""
    if not record:
        return None
    tokens, asked = record["tokens"], record["asked"]
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        rows = len(asked)
        figure = Figure(figsize=(9, len(record["models"]) * (1.15 + 0.31 * rows) + 0.3), layout="constrained")
        panels = figure.subplots(len(record["models"]), 1, squeeze=False)[:, 0]
        for colour, axes, model in zip(SERIES, panels, record["models"], strict=False):
            for y, (place, reads) in enumerate(zip(asked, model["reads"], strict=True)):
                for x, part in enumerate(reads):
                    edge = {"edgecolor": SOFT, "linewidth": 0.35} if x <= place else {"linewidth": 0}
                    axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, alpha=0.5, **edge))
                    axes.add_patch(
                        Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, facecolor=colour, alpha=min(part, 1.0), linewidth=0)
                    )
                # Where the value of this key was written.
                axes.add_patch(Rectangle((2 * y + 0.54, y - 0.44), 0.92, 0.88, fill=False, edgecolor=INK, linewidth=1.6))
                answer = model["answers"][y]
                right = answer == tokens[2 * y + 1]
                axes.annotate(
                    f"answers {answer} {'✓' if right else '✗'}", (len(tokens) - 0.3, y), va="center", fontsize=9.5,
                    color=INK if right else BAD, annotation_clip=False,
                )  # fmt: skip
            axes.set_yticks(range(rows), [f"{tokens[place]}?" for place in asked])
            axes.set_xticks(range(len(tokens)), tokens)
            axes.tick_params(axis="both", length=0, labelcolor=INK)
            axes.set_xlim(-0.6, len(tokens) - 0.4)
            axes.set_ylim(rows - 0.4, -0.6)
            axes.spines["bottom"].set_visible(False)
            axes.set_ylabel("question t")
            axes.set_title(f"{model['name'].capitalize()}: which writes each question reads, in layer {model['layer'] + 1}")
        panels[-1].set_xlabel("token s that wrote (A, B, ... keys; a, b, ... their values; · fillers)")
    return figure


def comparison_curves(contenders: dict[str, dict[str, Any]], context_length: int) -> Figure | None:
    """Loss by position of several models: for each source one plot with a curve for each model.

    `contenders` holds the `by_position` part of a summary in `compare.json` by name: bins of each source with mean and spread
    (drawn as a band) of the loss. None when there are none.
    """
    sizes: dict[str, int] = {}
    for by_position in contenders.values():
        for source, bins in by_position.items():
            sizes[source] = max(sizes.get(source, 0), sum(b["tokens"] for b in bins))
    sources = _largest(sizes)
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
                axes.plot(x, mean, color=colour, linestyle=dash, linewidth=2, marker="o", markersize=3.2, label=_named(name))
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
            axes.set_title(_named(source))
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


def _label_ends(axes: Axes, ends: list[tuple[str, float, str]], number: str = "{:.3f}") -> None:
    """Name each curve at its right end, pushed apart where they would overlap."""
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


def _largest(sizes: Mapping[str, int]) -> list[str]:
    """The names, in their order, of the `MOST_SOURCES` with the largest sizes."""
    kept = sorted(sizes, key=lambda name: -sizes[name])[:MOST_SOURCES]
    return [name for name in sizes if name in kept]


def _named(name: str) -> str:
    """The name of a source or model as figures have room for it."""
    shown = visible(name)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


@contextmanager
def _any_script() -> Iterator[None]:
    """Drawing names in scripts that matplotlib's font lacks: an SVG leaves the font to the reader, a PNG shows boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


def png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG on white, whole or not at all."""
    with atomic_file(path) as partial, _any_script():
        figure.savefig(partial, format="png", dpi=160, facecolor="white")


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element to stand in a page with `pages.STYLE`; `name` (unique in the page) keeps its ids apart."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}), _any_script():
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
