"""The figures of `fmem bench step`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from factorization_memory.reports.terminal.tables import number, table

if TYPE_CHECKING:
    from rich.console import Console


def show_step_part(section: str, records: list[dict[str, Any]], people: Console) -> None:
    """A part of the result as soon as it is there, as `run` of benchmarks/step.py hands it on."""
    {"checks": _show_checks, "steps": _show_steps, "rollbacks": _show_rollbacks}[section](records, people)


def _show_checks(records: list[dict[str, Any]], people: Console) -> None:
    worst = max(records, key=lambda check: check["error"] / check["tolerance"])
    where = f"{worst['worst']} of a {worst['backend']} at {worst['shape']}, {worst['tolerance']:.0e} allowed"
    restored = ", sparse steps rolled back to the bit" if any(record["restored"] for record in records) else ""
    people.print(f"correctness gate passed: relative error {worst['error']:.1e} ({where}){restored}", soft_wrap=True)
    people.print(
        "moved: rows read and written; of copy: relative to the rate of a large copy; rotation: rows that the steps cycle "
        "through, which are fast if a cache holds them",
        soft_wrap=True,
    )


def _show_steps(records: list[dict[str, Any]], people: Console) -> None:
    columns = ("K", "memory", "us", "moved MB", "GB/s", "of copy", "rotation MB", "faster than dense")
    shown = table(f"one step, {_size(records[0])}", *columns)
    for record in records:
        chosen = f"{record['top_k']:,}" if record["top_k"] else "dense"
        if record["error"]:
            where = f"{_size(record)}, K {chosen}, {record['state']}"
            people.print(f"[yellow]{where}: {record['error']}[/]", soft_wrap=True)
            continue
        shown.add_row(
            chosen,
            record["state"],
            number(1e6 * record["seconds"]["median"]),
            number(record["step_bytes"] / 1e6),
            number(record["bytes_per_second"] / 1e9),
            f"{100 * record['copy_share']:,.0f} %",
            number(record["touched_bytes"] / 1e6),
            number(record["speedup"], "x"),
        )
    if shown.row_count:
        people.print(shown)


def _show_rollbacks(records: list[dict[str, Any]], people: Console) -> None:
    shown = table(
        f"steps rolled back at once, {_size(records[0])}", "K", "steps", "us", "copying the memory us", "faster than that"
    )
    for record in records:
        if record["error"]:
            where = f"{_size(record)}, K {record['top_k']:,}, {record['count']:,} back"
            people.print(f"[yellow]{where}: {record['error']}[/]", soft_wrap=True)
            continue
        shown.add_row(
            f"{record['top_k']:,}",
            f"{record['count']:,}",
            number(1e6 * record["seconds"]["median"]),
            number(1e6 * record["copy_seconds"]["median"]),
            number(record["copy_over_rollback"], "x"),
        )
    if shown.row_count:
        people.print(shown)


def _size(record: dict[str, Any]) -> str:
    names = {"B": "batch", "H": "heads", "M": "num_states", "D": "value_size"}
    return ", ".join(f"{letter}={record[name]:,}" for letter, name in names.items())
