"""`fmem bench inference`: how fast whole models read prompts and write tokens on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.cli.common import bench_status, checked, emit, say
from factorization_memory.cli.tables import number, show_machine, table, wide_console


@dataclass(frozen=True)
class Inference(InferenceBenchmark):
    """Time to the first token, latency of further ones and tokens per second of whole models of random weights, over the tokens
    read, the sequences at once and the states that a token selects, beside the floor."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    threads: int = 0
    """Threads of the CPU; 0 takes PyTorch's number, which suits a machine that does nothing else."""
    plot: Path | None = None
    """Draw latency over context and tokens per second over batch into this .png or .svg file."""
    json: bool = False
    """Write the result to stdout as one JSON line."""

    def __post_init__(self) -> None:
        """Checked when `run` makes the benchmark of it."""


def run(options: Inference, command: str) -> int:
    """`fmem bench inference`; 1 if a size of our model failed."""
    from factorization_memory.benchmarks import inference
    from factorization_memory.models.device import resolve_device

    if options.plot is not None:
        from factorization_memory.reports.benchmark_figures import check_path

        check_path(options.plot)
    benchmark = checked(InferenceBenchmark, options)
    people = wide_console()
    with people.status("") as status:
        result = inference.run(benchmark, resolve_device(options.device, "device"), status.update, lambda r: _show(r, people))
    show_machine(result, people)
    for spread in result["spread"]:
        ratio = spread["slowest_over_fastest"]
        people.print(
            f"{spread['contender']}, B={spread['batch']}, {spread['mode']}: slowest over fastest context "
            f"{number(ratio, 'x')}, flat within {100 * (ratio - 1):,.0f} %",
            soft_wrap=True,
        )
    for name, why in result["missing"].items():
        people.print(f"[yellow]without {name}: {why}[/]", soft_wrap=True)
    emit({"benchmark": "inference", "command": command, "model": asdict(options.model)} | result, options.json)
    if options.plot is not None and result["interrupted"]:
        say(f"{options.plot}: not drawn, the measuring was stopped")
    elif options.plot is not None:
        from factorization_memory.reports.benchmark_figures import draw_inference, save

        save(result, options.plot, draw_inference)
    return bench_status(result, any(record["error"] and not record["peer"] for record in result["records"]))


def _show(records: list[dict[str, Any]], people: Any) -> None:
    """The table of one model."""
    first = records[0]
    title = (
        f"{first['contender']}: {first['parameters'] / 1e6:,.2f} M parameters, weights {first['weight_bytes'] / 1e6:,.1f} MB"
    )
    columns = ("B", "context", "state MB", "first token ms", "read tokens/s", "step", "ms", "p99 ms", "tokens/s", "to floor")
    shown = table(title, *columns)
    for record in records:
        if record["error"]:
            where = f"{record['batch']:,} x {record['context']:,} tokens"
            people.print(f"[yellow]{record['contender']} at {where}: {record['error']}[/]", soft_wrap=True)
        prefill = record["prefill"]
        read = [number(1000 * prefill["seconds"]["median"]), f"{prefill['tokens_per_second']:,.0f}"] if prefill else ["", ""]
        size = [f"{record['batch']:,}", f"{record['context']:,}", number(record["state_bytes"] and record["state_bytes"] / 1e6)]
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
            size, read = ["", "", ""], ["", ""]
    people.print(shown)
    if any(record["state"] == "random" for record in records):
        people.print("without a first token: not read, its steps go on from random numbers in place of a state", soft_wrap=True)
