"""`fmem bench inference`: how fast whole models read prompts and write tokens on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.cli.common import bench_status, checked, emit, say, wide_console


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
    from factorization_memory.reports.terminal.inference_benchmark import show_inference_end, show_model

    if options.plot is not None:
        from factorization_memory.reports.benchmark_figures import check_path

        check_path(options.plot)
    benchmark = checked(InferenceBenchmark, options)
    people = wide_console()
    with people.status("") as status:
        result = inference.run(
            benchmark, resolve_device(options.device, "device"), status.update, lambda records: show_model(records, people)
        )
    show_inference_end(result, people)
    emit({"benchmark": "inference", "command": command, "model": asdict(options.model)} | result, options.json)
    if options.plot is not None and result["interrupted"]:
        say(f"{options.plot}: not drawn, the measuring was stopped")
    elif options.plot is not None:
        from factorization_memory.reports.benchmark_figures import draw_inference, save

        save(result, options.plot, draw_inference)
    return bench_status(result, any(record["error"] and not record["peer"] for record in result["records"]))
