"""The recall suite of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from rich.table import Table

from factorization_memory.reports.terminal.tables import plain

if TYPE_CHECKING:
    from rich.console import Console

    from factorization_memory.runs.recall_record import ByLength, Distances, QueryFigures, RecallRecord

Row = TypeVar("Row")


def show_recall(record: RecallRecord, out: Console) -> None:
    """What `evaluate_recall` returned."""
    pairs = record["associative"]["by_pairs"]
    if pairs:
        out.print("recall: random pairs of tokens, then the first of each again; how often is its partner the likeliest token?")
        table = Table("pairs", *(str(row["pairs"]) for row in pairs))
        table.add_row("among the values shown", *(_share(row["choice"], row["choice_error"]) for row in pairs))
        table.add_row("among all tokens", *(_share(row["exact"], row["exact_error"]) for row in pairs))
        table.add_row("chance, among the values shown", *(f"{row['chance']:.0%}" for row in pairs))
        out.print(table)
        rows = record["associative"]["by_distance"]
        table = Table("tokens between", *map(_range, rows))
        table.add_row(
            f"among the values shown, {rows[0]['pairs']} pairs", *(_share(row["choice"], row["choice_error"]) for row in rows)
        )
        out.print(table)
    needles = record["needle"]
    if needles:
        chance = next(iter(needles.values()))["by_length"][0]["chance"]
        out.print(
            f"recall: the number in a sentence hidden in text, likeliest of {round(1 / chance)} (chance {chance:.1%}); "
            "in brackets, how often it would be generated"
        )
        lengths: dict[str, dict[str, ByLength]] = {}
        for name, parts in needles.items():
            for row in parts["by_length"]:
                lengths.setdefault(f"{name}, {row['needles']} hidden", {})[str(row["length"])] = row
        distances = {name: {_range(row): row for row in parts["by_distance"]} for name, parts in needles.items()}
        _grid(out, "tokens of the text", lengths, _both)
        _grid(out, "tokens between", distances, _both)
        depths = {
            name: {f"{row['start']:.0%} to {row['end']:.0%}": row for row in parts["by_depth"]}
            for name, parts in needles.items()
        }
        _grid(out, "text before it", depths, _both)
    copies = record["copy"]
    if copies:
        out.print("recall: a stretch of tokens twice; how much of the second is predicted, and nats per token (of the first)")
        _grid(
            out,
            "tokens of the stretch",
            {name: {str(row["length"]): row for row in parts["by_length"]} for name, parts in copies.items()},
            lambda row: f"{row['accuracy']:.0%}, {row['loss']:.2f} ({row['first_loss']:.2f})",
        )
    for reason in record["left_out"]:
        out.print(f"skipped: {reason}", markup=False)


def _grid(out: Console, title: str, cells: Mapping[str, Mapping[str, Row]], text: Callable[[Row], str]) -> None:
    """A row per name, a column per heading that any of them has, sorted by the number at its start."""
    headings = sorted({heading for row in cells.values() for heading in row}, key=lambda text: int(re.findall(r"\d+", text)[0]))
    table = Table(title, *headings)
    for name, row in cells.items():
        table.add_row(plain(name), *(text(row[heading]) if heading in row else "" for heading in headings))
    out.print(table)


def _share(share: float, error: float | None) -> str:
    return f"{share:.0%}" + ("" if error is None else f" ± {error:.0%}")


def _both(row: QueryFigures) -> str:
    return f"{_share(row['choice'], row['choice_error'])} ({row['exact']:.0%})"


def _range(row: Distances) -> str:
    return f"{row['start']}-{row['end'] - 1}"
