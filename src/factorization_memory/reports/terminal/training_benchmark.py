"""The figures of `fmem bench training`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from factorization_memory.benchmarks.training import OURS
from factorization_memory.reports.terminal.machine import show_machine
from factorization_memory.reports.terminal.tables import number, table

if TYPE_CHECKING:
    from rich.console import Console


def show_training(result: dict[str, Any], people: Console) -> None:
    """The whole result."""
    show_machine(result, people)
    if not result["records"]:
        return
    budget = result["activation_memory_budget"]
    compiled = (", compiled" + (f", activation memory budget {budget:g}" if budget < 1 else "")) if result["compiled"] else ""
    title = f"training step of {result['records'][0]['batch']} sequences{compiled}"
    shown = table(title, "", "params", "T", "ms", "tokens/s", "MFU", "step MB", "all MB", "ours to it")
    for record in result["records"]:
        name = "ours" if record["model"] == OURS else record["model"]
        if record["error"]:
            people.print(f"[yellow]{name} at T={record['length']}: {record['error']}[/]", soft_wrap=True)
            continue
        shown.add_row(
            name,
            f"{record['parameters'] / 1e6:.2f} M",
            f"{record['length']:,}",
            number(1000 * record["seconds"]["median"]),
            f"{record['tokens_per_second']:,.0f}",
            "" if record["mfu"] is None else f"{record['mfu']:.1%}",
            *(number(size and size / 1e6) for size in (record["peak_bytes"], record["total_bytes"])),
            number(record.get("ours_over_this"), "x"),
        )
    people.print(shown)
    people.print(
        f"MFU: {result['flops_per_token'] / 1e6:,.1f} MFLOP a token, of {number(result['peak']['tflops'])} TFLOP/s "
        f"({result['peak']['source']}); step MB: beyond weights and optimizer state",
        soft_wrap=True,
    )
    if result["missing"]:
        people.print(f"[yellow]{result['missing']}[/]", soft_wrap=True)
