"""`fmem bench training`: the speed and memory of whole training steps on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from factorization_memory.benchmarks.settings import TrainingBenchmark
from factorization_memory.cli.common import bench_status, checked, emit, say
from factorization_memory.cli.tables import number, show_machine, table, wide_console

if TYPE_CHECKING:
    from rich.console import Console


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

    benchmark = checked(TrainingBenchmark, options)
    people = wide_console()
    with people.status("") as status:
        result = training.run(benchmark, resolve_device(options.device, "device"), status.update)
    _show(result, people)
    record = {"benchmark": "training", "command": command, "model": asdict(options.model)} | result
    if result["interrupted"] is None and not options.compile:
        try:
            remember(record)
        except (OSError, RuntimeError) as error:
            say(f"not kept for `fmem plan`: {error}")
    emit(record, options.json)
    return bench_status(result, failed=False)


def _show(result: dict[str, Any], people: Console) -> None:
    from factorization_memory.benchmarks.training import OURS

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
