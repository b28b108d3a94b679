"""The look of tables and numbers on a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from factorization_memory._text import visible


def plain(text: str) -> Text:
    """A name from data, for a line or a cell, shown verbatim without parsing markup."""
    return Text(visible(text))


def table(title: str, *columns: str) -> Table:
    """A table with few lines; its first column and "pass" are aligned to the left, the others to the right."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(plain(column), justify="left" if i == 0 or column == "pass" else "right")
    return made


def number(value: float | None, unit: str = "") -> str:
    """At least three significant digits; empty if there is no number."""
    if value is None:
        return ""
    places = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{places}f}{unit}"
