"""Plots of a run's records. Each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from factorization_memory.models.routing import DEAD_SHARE
from factorization_memory.reports.plotting import BAD, INK, SERIES, SOFT, STYLE, label_ends, largest, named, short

if TYPE_CHECKING:
    from factorization_memory.models.routing import LayerUse
    from factorization_memory.runs.recall_record import RecallDemoRecord


def loss_curve(metrics: Sequence[dict[str, Any]]) -> Figure | None:
    """Bits per byte against training tokens, from the lines of `metrics.jsonl`; None without training lines."""
    training = [m for m in metrics if m["kind"] == "train" and m.get("bits_per_byte") is not None]
    if not training:
        return None
    tokens_at = {m["step"]: m["tokens"] for m in training}
    per_step = training[-1]["tokens"] / max(training[-1]["step"], 1)
    evaluations = [m for m in metrics if m["kind"] == "evaluation" and m["step"] > 0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.add_subplot()
        x = [m["tokens"] for m in training]
        y = [m["bits_per_byte"] for m in training]
        axes.plot(x, y, color=SOFT, alpha=0.28, linewidth=1)
        smooth = _smooth(y)
        axes.plot(x, smooth, color=SOFT, linewidth=1.6)
        ends = [("training", smooth[-1], SOFT)]
        sizes = {name: part.get("tokens", 0) for m in evaluations for name, part in m["sources"].items()}
        names = sorted(largest(sizes))
        shown = smooth[len(smooth) // 10 :]
        for index, name in enumerate(names):
            colour = SERIES[index % len(SERIES)]
            points = [
                (tokens_at.get(m["step"], m["step"] * per_step), m["sources"][name]["bits_per_byte"]) for m in evaluations
            ]
            points = [(at, value) for at, value in points if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, marker="o", markersize=4.5)
                ends.append((f"{named(name)}, held-out", points[-1][1], colour))
                shown += [value for _, value in points]
        # The first steps fall from eight bits per byte; scale the axis to what follows.
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.08 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02)
        axes.set_xlim(0, x[-1])
        label_ends(axes, ends)
        axes.set_ylabel("bits per byte")
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    return figure


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a thirtieth of the curve, started without bias."""
    keep = 1 - 1 / max(len(values) / 30, 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def recall_curves(record: RecallDemoRecord | None) -> Figure | None:
    """Share of correct values against training steps, for each form, from `recall_demo.json`; None without a record."""
    if not record:
        return None
    with matplotlib.rc_context(STYLE):
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
            f"guessing among the {record['pairs']} values in the sequence",
            (0.1 * last, guess),
            xytext=(0, 4),
            textcoords="offset points",
            color=SOFT,
            fontsize=9,
        )
        axes.set_ylim(-3, 106)
        axes.set_xlim(0, last)
        label_ends(axes, ends, "{:.0f} %")
        axes.set_title("How soon each form names the value after a key")
        axes.set_ylabel("values named correctly, %")
        axes.set_xlabel("training steps")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    return figure


def recall_reads(record: RecallDemoRecord | None) -> Figure | None:
    """For one sequence, what each question reads: a row per repeated key, a cell per token that wrote, darker the larger its
    share of what is read; from `recall_demo.json`. None without a record."""
    if not record:
        return None
    tokens, asked = record["tokens"], record["asked"]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
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
                    f"answers {answer} {'✓' if right else '✗'}",
                    (len(tokens) - 0.3, y),
                    va="center",
                    fontsize=9.5,
                    color=INK if right else BAD,
                    annotation_clip=False,
                )
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


def memory_use(routing: Sequence[LayerUse], context_length: int) -> Figure | None:
    """Share of use of every memory state and how long each remembers, from `RoutingHealth.summary()`; None if empty."""
    if not routing:
        return None
    rows = [
        (f"{layer + 1}" if len(health["share"]) == 1 else f"{layer + 1}.{head + 1}", share, health["memory_length"][head])
        # Older records of models with only memory layers have no layer number.
        for layer, health in ((health.get("layer", index), health) for index, health in enumerate(routing))
        for head, share in enumerate(health["share"])
    ]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(9, 1.5 + 0.24 * max(len(rows), 6)), layout="constrained")
        use, length = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for y, (_, share, lengths) in enumerate(rows):
            _share_row(use, y, share)
            # Dead states say nothing about memory; lengths beyond any text are drawn at the limit of what can be measured.
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
    """One head's states as cells, darker for larger shares; four times a uniform share is full color."""
    even = 1 / len(share)
    for x, part in enumerate(share):
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.4), 1, 0.8, facecolor=SERIES[0], alpha=min(1.0, part / (4 * even)), linewidth=0)
        )
    dead = [x for x, part in enumerate(share) if part < DEAD_SHARE * even]
    axes.plot(dead, [y] * len(dead), color=BAD, marker="|", markersize=6, linestyle="none")
