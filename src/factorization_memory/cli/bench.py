"""`fmem bench`: the speed and memory of the recurrence (`op`), of one decoding step of it (`step`), of whole training steps
(`training`) and of reading and writing with whole models (`inference`) on this machine.

Tables go to stderr as soon as their figures are available, the whole result to stdout as one JSON line at the end.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from factorization_memory.benchmarks.op_settings import OpBenchmark
from factorization_memory.benchmarks.settings import InferenceBenchmark, StepBenchmark, TrainingBenchmark
from factorization_memory.cli.common import bench_status, checked, emit, parse, say, wide_console
from factorization_memory.config import ConfigError

if TYPE_CHECKING:
    import torch
    from rich.console import Console


@dataclass(frozen=True)
class Machine:
    """Where to measure."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    threads: int = 0
    """CPU threads; 0 means PyTorch's default, which suits an otherwise idle machine."""

    def __post_init__(self) -> None:
        """What is to be measured is checked when `run` makes the benchmark of it."""


@dataclass(frozen=True)
class Op(Machine, OpBenchmark):
    """The recurrence alone: each backend beside others' kernels and the floor (on a CPU also the reference loop), time per
    token over length, memory of training. If a backend is not right, nothing is timed: status 1."""

    tune: bool = False
    """Search for the fastest tiles of the Triton kernels on this device first, and measure with them."""
    plot: Path | None = None
    """Plot time per token to this .png or .svg file."""
    json: bool = False
    """Write the result to stdout as one JSON line."""


@dataclass(frozen=True)
class Training(Machine, TrainingBenchmark):
    """Tokens per second, MFU and memory of whole training steps, beside transformers' Llama and Mamba-2 of equal parameters
    where that is installed."""

    json: bool = False
    """Write the result to stdout as one JSON line."""


@dataclass(frozen=True)
class Inference(Machine, InferenceBenchmark):
    """Time to the first token, latency of further ones and tokens per second of whole models of random weights, over the tokens
    read, the sequences at once and the states that a token selects, beside the floor and peers of equal parameters."""

    plot: Path | None = None
    """Plot latency over context and tokens per second over batch size to this .png or .svg file."""
    json: bool = False
    """Write the result to stdout as one JSON line."""


@dataclass(frozen=True)
class Step(Machine, StepBenchmark):
    """One decoding step of the recurrence alone, dense and sparse, beside the device's copies, and steps taken back beside a
    copy of the whole memory. If a step is not right, nothing is timed: status 1."""

    json: bool = False
    """Write the result to stdout as one JSON line."""


Bench = (
    Annotated[Op, tyro.conf.subcommand("op")]
    | Annotated[Training, tyro.conf.subcommand("training")]
    | Annotated[Inference, tyro.conf.subcommand("inference")]
    | Annotated[Step, tyro.conf.subcommand("step")]
)


def run(arguments: list[str]) -> int:
    """`fmem bench` with `arguments`; returns the exit status: 1 if something of ours failed."""
    options: Op | Training | Inference | Step = parse(Bench, arguments, "bench")  # type: ignore[arg-type]
    if options.threads < 0:
        raise ConfigError(f"threads={options.threads}: use 0 (PyTorch's default) or more")
    plot = options.plot if isinstance(options, Op | Inference) else None
    if plot is not None:
        from factorization_memory.reports.benchmark_figures import check_path

        check_path(plot)
    from factorization_memory.models.device import resolve_device

    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    device = resolve_device(options.device, "device")
    record: dict[str, Any] = {"benchmark": type(options).__name__.lower(), "command": shlex.join(["fmem", "bench", *arguments])}
    people = wide_console()
    if isinstance(options, Op):
        result, failed = _op(options, device, people)
    elif isinstance(options, Training):
        result, failed = _training(options, device, people)
    elif isinstance(options, Inference):
        result, failed = _inference(options, device, people)
    else:
        result, failed = _step(options, device, people)
    record |= result
    if isinstance(options, Training) and result["interrupted"] is None and not options.compile:
        _remember(record)
    emit(record, options.json)
    if plot is not None and result["interrupted"]:
        say(f"{plot}: not drawn, as the benchmark was interrupted")
    elif plot is not None:
        from factorization_memory.reports.benchmark_figures import draw, draw_inference, save

        save(result, plot, draw_inference if isinstance(options, Inference) else draw)
    return bench_status(result, failed)


def _op(options: Op, device: torch.device, people: Console) -> tuple[dict[str, Any], bool]:
    """The result, and whether a backend failed."""
    import torch

    from factorization_memory.benchmarks import op
    from factorization_memory.reports.terminal.op_benchmark import show_op_end, show_op_part, show_tuned

    benchmark = checked(OpBenchmark, options)
    tuned: list[dict[str, Any]] = []
    if options.tune:
        from factorization_memory.benchmarks.tuning import tune

        with people.status("") as status:
            tuned = tune(benchmark.sizes, getattr(torch, benchmark.dtype), device, benchmark.repeats, status.update)
        show_tuned(tuned, people)
    with people.status("") as status:
        result = op.run(benchmark, device, status.update, lambda section, records: show_op_part(section, records, people))
    show_op_end(result, people)
    failed = [record for record in (*result["comparison"], *result["lengths"]) if record["error"] and not record["peer"]]
    return {"tuned": tuned} | result, bool(failed) or any(record["error"] for record in result["memory"])


def _training(options: Training, device: torch.device, people: Console) -> tuple[dict[str, Any], bool]:
    """The result, and that nothing of ours failed: then there is none."""
    from factorization_memory.benchmarks import training
    from factorization_memory.reports.terminal.training_benchmark import show_training

    benchmark = checked(TrainingBenchmark, options)
    with people.status("") as status:
        result = training.run(benchmark, device, status.update)
    show_training(result, people)
    return {"model": asdict(options.model)} | result, False


def _remember(record: dict[str, Any]) -> None:
    """Keeps the record for `fmem plan`, or says why that cannot be."""
    from factorization_memory.benchmarks.notes import remember

    try:
        remember(record)
    except (OSError, RuntimeError) as error:
        say(f"speed not saved for `fmem plan`: {error}")


def _inference(options: Inference, device: torch.device, people: Console) -> tuple[dict[str, Any], bool]:
    """The result, and whether a size of our model failed."""
    from factorization_memory.benchmarks import inference
    from factorization_memory.reports.terminal.inference_benchmark import show_inference_end, show_model

    benchmark = checked(InferenceBenchmark, options)
    with people.status("") as status:
        result = inference.run(benchmark, device, status.update, lambda records: show_model(records, people))
    show_inference_end(result, people)
    failed = any(record["error"] and not record["peer"] for record in result["records"])
    return {"model": asdict(options.model)} | result, failed


def _step(options: Step, device: torch.device, people: Console) -> tuple[dict[str, Any], bool]:
    """The result, and whether a size failed."""
    from factorization_memory.benchmarks import step
    from factorization_memory.reports.terminal.machine import show_machine
    from factorization_memory.reports.terminal.step_benchmark import show_step_part

    benchmark = checked(StepBenchmark, options)
    with people.status("") as status:
        result = step.run(benchmark, device, status.update, lambda section, records: show_step_part(section, records, people))
    show_machine(result, people)
    return result, any(record["error"] for record in (*result["steps"], *result["rollbacks"]))
