"""Results on tasks of lm-evaluation-harness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

if TYPE_CHECKING:
    from rich.console import Console


def show_tasks(result: dict[str, Any], out: Console) -> None:
    """What `run_tasks` returned: groups, then tasks."""
    columns = [Column(name, no_wrap=True) for name in ("n", "shots", "metric", "value", "± error")]
    table = Table(Column("task", overflow="fold"), *columns)
    for part in ("groups", "tasks"):
        for name, entry in result[part].items():
            first = [name, *(("", "") if part == "groups" else (str(entry["examples"]), str(entry["shots"])))]
            for metric, found in entry["metrics"].items():
                table.add_row(*first, metric, metric_text(found["value"]), metric_text(found["stderr"]))
                first = ["", "", ""]
    out.print(table)


def metric_text(value: float | None) -> str:
    """A metric with four decimals, except for huge perplexities; empty if there is none."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
