"""`fmem bench step`: how fast one decoding step of the recurrence is on this machine, and how fast steps are taken back."""

from __future__ import annotations

from dataclasses import dataclass

from factorization_memory.benchmarks.settings import StepBenchmark
from factorization_memory.cli.common import bench_status, checked, emit, wide_console


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
    from factorization_memory.reports.terminal.machine import show_machine
    from factorization_memory.reports.terminal.step_benchmark import show_step_part

    device = resolve_device(options.device, "device")
    benchmark = checked(StepBenchmark, options)
    people = wide_console()
    with people.status("") as status:
        result = step.run(benchmark, device, status.update, lambda section, records: show_step_part(section, records, people))
    show_machine(result, people)
    emit({"benchmark": "step", "command": command} | result, options.json)
    return bench_status(result, any(record["error"] for record in (*result["steps"], *result["rollbacks"])))
