"""`fmem bench training`: the speed and memory of whole training steps on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from factorization_memory.benchmarks.settings import TrainingBenchmark
from factorization_memory.cli.common import bench_status, checked, emit, say, wide_console


@dataclass(frozen=True)
class Training(TrainingBenchmark):
    """Tokens per second, MFU and memory of whole training steps, beside transformers' Llama and Mamba-2 of equal parameters
    where that is installed."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    threads: int = 0
    """Threads of the CPU; 0 takes PyTorch's number, which suits a machine that does nothing else."""
    json: bool = False
    """Write the result to stdout as one JSON line."""

    def __post_init__(self) -> None:
        """Checked when `run` makes the benchmark of it."""


def run(options: Training, command: str) -> int:
    """`fmem bench training`."""
    from factorization_memory.benchmarks import training
    from factorization_memory.benchmarks.notes import remember
    from factorization_memory.models.device import resolve_device
    from factorization_memory.reports.terminal.training_benchmark import show_training

    benchmark = checked(TrainingBenchmark, options)
    people = wide_console()
    with people.status("") as status:
        result = training.run(benchmark, resolve_device(options.device, "device"), status.update)
    show_training(result, people)
    record = {"benchmark": "training", "command": command, "model": asdict(options.model)} | result
    if result["interrupted"] is None and not options.compile:
        try:
            remember(record)
        except (OSError, RuntimeError) as error:
            say(f"not kept for `fmem plan`: {error}")
    emit(record, options.json)
    return bench_status(result, failed=False)
