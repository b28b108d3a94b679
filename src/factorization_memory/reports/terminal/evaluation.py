"""An evaluation on held-out text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from factorization_memory.reports.recall_text import as_text, distances_as_text
from factorization_memory.reports.terminal.recall import show_recall
from factorization_memory.reports.terminal.tables import plain
from factorization_memory.runs.recall_names import KINDS

if TYPE_CHECKING:
    from rich.console import Console

    from factorization_memory.models.routing import LayerUse
    from factorization_memory.runs.evaluation_record import EvaluationRecord, KindLoss


def show_evaluation(result: EvaluationRecord, out: Console) -> None:
    """What `evaluate_run` returned."""
    _show_losses(result, out)
    _show_repeated(result["recall"], out)
    _show_positions(result, out)
    if "recall_tasks" in result:
        show_recall(result["recall_tasks"], out)
    if result["routing"]:
        _show_routing(result["routing"], out)


def _show_losses(result: EvaluationRecord, out: Console) -> None:
    orders = [str(order) for order in result["ngram"]["orders"]] if "ngram" in result else []
    table = Table("held-out text", "nats per token", "perplexity", "bits per byte", *(f"{n}-gram bytes" for n in orders))
    for name, row in [*result["sources"].items(), ("all", result["total"])]:
        yardstick = (result["ngram"]["sources"].get(name) or result["ngram"]["total"]) if orders else {}
        table.add_row(
            plain(name),
            f"{row['loss']:.3f}",
            f"{row['perplexity']:.1f}",
            f"{row['bits_per_byte']:.3f}",
            *(f"{yardstick[n]:.3f}" for n in orders),
        )
    out.print(table)


def _show_repeated(recall: dict[str, dict[str, KindLoss]], out: Console) -> None:
    """The loss by what the window contained before a token."""
    table = Table("held-out text", *KINDS)
    for name, parts in recall.items():
        table.add_row(plain(name), *as_text(parts))
    out.print(
        "nats per token (and share of tokens) by what came earlier in the same window: the token and its predecessor, the "
        "predecessor followed only by other tokens, or neither"
    )
    out.print(table)
    headings, cells = distances_as_text(recall)
    if headings:
        table = Table("repeated", *headings)
        for name, row in cells.items():
            table.add_row(plain(name), *row)
        out.print("repeated tokens by how many tokens ago the pair last occurred")
        out.print(table)


def _show_positions(result: EvaluationRecord, out: Console) -> None:
    rows = [
        (name, multiple, row)
        for name, position in result.get("position", {}).items()
        for multiple, row in position["beyond"].items()
    ]
    if not rows:
        return
    context = result["context_length"]
    table = Table(
        "held-out text", "times the context", "positions", "memory carried", f"restarted each {context}", "difference"
    )
    for name, multiple, row in rows:
        table.add_row(
            plain(name),
            f"{multiple}x",
            f"{row['start']:,} to {row['end'] - 1:,}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['restarted_bits_per_byte']:.3f}",
            f"{row['bits_per_byte'] - row['restarted_bits_per_byte']:+.3f}",
        )
    out.print(
        "bits per byte of the same tokens, with memory carried from the start and with memory emptied every training context"
    )
    out.print(table)


def _show_routing(layers: list[LayerUse], out: Console) -> None:
    table = Table("layer", "dead states", "balance", "entropy of a token's affinities")
    for layer in layers:
        mean = [sum(values) / len(values) for values in (layer["balance"], layer["entropy"])]
        states = sum(len(head) for head in layer["share"])
        table.add_row(str(layer["layer"] + 1), f"{sum(layer['dead'])} of {states}", *(f"{value:.2f}" for value in mean))
    out.print(table)
