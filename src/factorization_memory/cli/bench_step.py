"""`fmem bench step`: how fast one decoding step of the recurrence is on this machine, and how fast steps are taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from factorization_memory.benchmarks.settings import StepBenchmark
from factorization_memory.cli.common import bench_status, checked, emit
from factorization_memory.cli.tables import number, show_machine, table, wide_console


@dataclass(frozen=True)
class Step(StepBenchmark):
    """One decoding step of the recurrence alone, dense and sparse, beside the device's copies, and steps taken back beside a
    copy of the whole memory. If a step is not right, nothing is timed: status 1."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    threads: int = 0
    """Threads of the CPU; 0 takes PyTorch's number, which suits a machine that does nothing else."""
    json: bool = False
    """Write the result to stdout as one JSON line."""

    def __post_init__(self) -> None:
        """Checked when `run` makes the benchmark of it."""


def run(options: Step, command: str) -> int:
    """`fmem bench step`; 1 if a size failed."""
    from factorization_memory.benchmarks import step
    from factorization_memory.models.device import resolve_device

    device = resolve_device(options.device, "device")
    benchmark = checked(StepBenchmark, options)
    people = wide_console()
    shown = {"checks": _show_checks, "steps": _show_steps, "rollbacks": _show_rollbacks}
    with people.status("") as status:
        result = step.run(benchmark, device, status.update, lambda section, records: shown[section](records, people))
    show_machine(result, people)
    emit({"benchmark": "step", "command": command} | result, options.json)
    return bench_status(result, any(record["error"] for record in (*result["steps"], *result["rollbacks"])))


def _show_checks(records: list[dict[str, Any]], people: Any) -> None:
    worst = max(records, key=lambda check: check["error"] / check["tolerance"])
    where = f"{worst['worst']} of a {worst['backend']} at {worst['shape']}, of {worst['tolerance']:.0e} allowed"
    restored = ", sparse steps taken back to the bit" if any(record["restored"] for record in records) else ""
    people.print(f"correctness gate green: relative error {worst['error']:.1e} ({where}){restored}", soft_wrap=True)
    people.print(
        "moved: rows read and written; of copy: over the rate of a large copy; rotation: rows that steps go round over, which "
        "a cache that holds them makes fast",
        soft_wrap=True,
    )


def _show_steps(records: list[dict[str, Any]], people: Any) -> None:
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


def _show_rollbacks(records: list[dict[str, Any]], people: Any) -> None:
    shown = table(
        f"steps taken back at once, {_size(records[0])}", "K", "steps", "us", "copying the memory us", "faster than that"
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
