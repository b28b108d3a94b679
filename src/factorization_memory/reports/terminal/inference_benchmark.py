"""The figures of `fmem bench inference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from factorization_memory.reports.terminal.machine import show_machine
from factorization_memory.reports.terminal.tables import number, table

if TYPE_CHECKING:
    from rich.console import Console


def show_model(records: Sequence[Mapping[str, Any]], people: Console) -> None:
    """The table of one model, from its records."""
    first = records[0]
    title = (
        f"{first['contender']}: {first['parameters'] / 1e6:,.2f} M parameters, weights {first['weight_bytes'] / 1e6:,.1f} MB"
    )
    columns = ["B", "context", "state MB", "first token ms", "read tokens/s", "step", "ms", "p99 ms", "tokens/s", "to floor"]
    # A CPU's memory is not measured.
    peaks = any(record.get("peak_bytes") for record in records)
    if peaks:
        columns.insert(3, "peak MB")
    shown = table(title, *columns)
    for record in records:
        if record["error"]:
            where = f"{record['batch']:,} x {record['context']:,} tokens"
            people.print(f"[yellow]{record['contender']} at {where}: {record['error']}[/]", soft_wrap=True)
        prefill = record["prefill"]
        read = [number(1000 * prefill["seconds"]["median"]), f"{prefill['tokens_per_second']:,.0f}"] if prefill else ["", ""]
        size = [f"{record['batch']:,}", f"{record['context']:,}", _megabytes(record["state_bytes"])]
        if peaks:
            parts = record["peak_bytes"] or {}
            size.append(_megabytes(max((part for part in parts.values() if part is not None), default=None)))
        for mode, figures in record["decode"].items():
            seconds = figures["seconds"]
            shown.add_row(
                *size,
                *read,
                mode,
                number(1000 * seconds["median"]),
                number(1000 * seconds["p99"]),
                f"{figures['tokens_per_second']:,.0f}",
                number(figures["ratio_to_floor"], "x"),
            )
            size, read = [""] * len(size), ["", ""]
    people.print(shown)
    if any(record["state"] == "random" for record in records):
        people.print(
            "no first token: the prompt was not read, and its steps started from random numbers in place of a state",
            soft_wrap=True,
        )


def _megabytes(size: int | None) -> str:
    return "" if size is None else number(size / 1e6)


def show_inference_end(result: dict[str, Any], people: Console) -> None:
    """What the whole result says beside the tables of its models: the machine, how flat latency is, which peers are missing."""
    show_machine(result, people)
    for spread in result["spread"]:
        ratio = spread["slowest_over_fastest"]
        flat = f", flat within {100 * (ratio - 1):,.0f} %" if ratio < 2 else ""
        people.print(
            f"{spread['contender']}, B={spread['batch']}, {spread['mode']}: slowest over fastest context "
            f"{number(ratio, 'x')}{flat}",
            soft_wrap=True,
        )
    for name, why in result["missing"].items():
        people.print(f"[yellow]without {name}: {why}[/]", soft_wrap=True)
