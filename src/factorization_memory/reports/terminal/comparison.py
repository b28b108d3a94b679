"""A comparison's record, in the rows of its `compare.md`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from factorization_memory.reports.comparison_table import notes, tables
from factorization_memory.reports.terminal.tables import plain, table

if TYPE_CHECKING:
    from rich.console import Console

    from factorization_memory.runs.comparison_record import ComparisonRecord


def show_comparison(record: ComparisonRecord, people: Console) -> None:
    """A comparison's record: its tables, then the notes to them."""
    for part in tables(record):
        people.print(f"\n{part.title}", soft_wrap=True)
        shown = table("", *part.columns)
        shown.columns[0].overflow = "fold"
        for row in part.rows:
            shown.add_row(*map(plain, row))
        people.print(shown)
    for note in notes(record):
        people.print(note, markup=False, soft_wrap=True)
