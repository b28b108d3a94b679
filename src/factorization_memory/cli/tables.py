"""Formatting of the benchmarks' figures for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from factorization_memory.cli.common import console, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TABLE_WIDTH = 110


def wide_console() -> Console:
    """A console that is wide enough for tables if no terminal sets the width."""
    people = console()
    if not people.is_terminal:
        people.width = max(people.width, TABLE_WIDTH)
    return people


def table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

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


def show_machine(result: dict[str, Any], people: Console) -> None:
    """Prints where a benchmark ran, and the device's copy and matmul rates."""
    where = result["machine"]
    packages = "".join(f", {package} {version}" for package, version in where["packages"].items())
    text = (
        f"{where['name']} ({where['device']}), {where['threads']} threads, torch {where['torch']}{packages}, {result['dtype']}"
    )
    if "rates" in result:
        rates = result["rates"]
        text += (
            f"; copies {rates['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
            f"products {number(rates['matmul_flops_per_second'] / 1e12)} TFLOP/s ({rates['matmul']})"
        )
    people.print(text, soft_wrap=True)
