"""What is installed here, and which backends are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console


def show_findings(findings: dict[str, Any], people: Console) -> None:
    """What `examine` returned."""
    facts = Table.grid(padding=(0, 2))
    for name, version in findings["versions"].items():
        facts.add_row(name, version or "[dim]not installed[/]")
    cpu = findings["cpu"]
    facts.add_row("cpu", f"{escape(cpu['name'])}, {cpu['cores']} cores, {cpu['threads']} threads")
    for i, gpu in enumerate(findings["gpus"]):
        memory = gpu["memory_bytes"] / 2**30
        facts.add_row(
            f"gpu {i}", f"{escape(gpu['name'])}, {memory:.0f} GiB, capability {gpu['capability']}, CUDA {gpu['cuda']}"
        )
    if findings["no_gpu"]:
        facts.add_row("gpu", f"[dim]none: {findings['no_gpu']}[/]")
    people.print(facts)

    # Without lines between the columns, so that all fit a terminal of 80.
    table = Table("backend", "device", box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("case", no_wrap=True)
    table.add_column("values")
    table.add_column("error", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("")
    for result in findings["checks"]:
        table.add_row(
            result["backend"],
            result["device"],
            result["case"],
            result["dtype"],
            "-" if result["error"] is None else f"{result['error']:.1e}",
            f"{result['tolerance']:.0e}",
            f"{1000 * result['seconds']:.0f}",
            "[green]pass[/]" if result["passed"] else f"[red]fail[/]: {escape(result['reason'] or result['worst'])}",
        )
    people.print(table)
    for one in findings["skipped"]:
        people.print(f"[dim]{one['backend']} not on {one['device']}: {escape(one['reason'])}[/]", soft_wrap=True)
    failed = sum(not result["passed"] for result in findings["checks"])
    people.print("[green]all backends that can run here are correct[/]" if not failed else f"[red]{failed} checks failed[/]")
