"""`fmem bench op`: the speed and memory of the recurrence on this machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from factorization_memory.cli.common import bench_status, choose, emit, say, wide_console
from factorization_memory.config import ConfigError

if TYPE_CHECKING:
    from factorization_memory.benchmarks.settings import Shape

SIZES = ("batch", "length", "heads", "num_states", "value_size", "top_k")


@dataclass(frozen=True)
class Op:
    """The recurrence alone: each backend beside others' kernels and the floor (on a CPU also the reference loop), time per
    token over length, memory of training. If a backend is not right, nothing is timed: status 1."""

    backends: tuple[str, ...] = ()
    """Backends to measure; none takes triton and chunked on a GPU, chunked on a CPU. On a GPU ratios are to the first, on a CPU
    to the reference."""
    peers: tuple[Literal["gla", "attention", "ssd"], ...] = ("gla", "attention", "ssd")
    """To compare with: fla's chunk_gla on the same maths, PyTorch's attention and Mamba-2's scan of equal width (all but
    attention on a GPU only, where installed); may be empty."""
    shapes: tuple[str, ...] = ()
    """Sizes to compare at, each written BxTxHxMxD or BxTxHxMxDxK, as 16x2048x1x64x2048; none takes the one of the six options
    that follow. Lengths and memory are measured at the first one's widths."""
    batch: int = 4
    """Sequences."""
    length: int = 1024
    """Tokens of each, where the backends are compared."""
    heads: int = 1
    """Heads."""
    num_states: int = 64
    """Memory states of each head."""
    value_size: int = 512
    """Value width of a head."""
    top_k: int | None = None
    """States each token selects; none is the dense form."""
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Lengths of one sequence for the time per token over length; may be empty."""
    length_tokens: int = 0
    """If positive, those lengths are also measured in batches of this many tokens in all."""
    memory_length: int = 16384
    """Length of the one sequence whose memory is measured; 0 for none."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    """Of values and output."""
    repeats: int = 5
    """Rounds, of which medians are taken."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    threads: int = 0
    """Threads of the CPU; 0 takes PyTorch's number, which suits a machine that does nothing else."""
    tune: bool = False
    """First search the fastest tiles of the Triton kernels on this device, and measure with them."""
    plot: Path | None = None
    """Draw the times per token into this .png or .svg file."""
    json: bool = False
    """Write the result to stdout as one JSON line."""


def run(options: Op, command: str) -> int:
    """`fmem bench op`; 1 if a backend failed."""
    import torch

    from factorization_memory.benchmarks import op
    from factorization_memory.models.device import resolve_device
    from factorization_memory.ops import BACKEND_NAMES
    from factorization_memory.reports.terminal.op_benchmark import show_op_end, show_op_part, show_tuned

    for name in ("memory_length", "length_tokens"):
        if getattr(options, name) < 0:
            raise ConfigError(f"{name}={getattr(options, name)}: use 0 (none) or more tokens")
    for backend in options.backends:
        choose(backend, dict.fromkeys(BACKEND_NAMES), "backend")
    if options.plot is not None:
        from factorization_memory.reports.benchmark_figures import check_path

        check_path(options.plot)
    device = resolve_device(options.device, "device")
    benchmark = op.OpBenchmark(
        shapes=_shapes(options),
        backends=options.backends or op.default_backends(device),
        peers=options.peers,
        dtype=getattr(torch, options.dtype),
        lengths=options.lengths,
        length_tokens=options.length_tokens,
        memory_length=options.memory_length,
        repeats=options.repeats,
    )
    people = wide_console()
    tuned: list[dict[str, Any]] = []
    if options.tune:
        from factorization_memory.benchmarks.tuning import tune

        with people.status("") as status:
            tuned = tune(benchmark.shapes, benchmark.dtype, device, options.repeats, status.update)
        show_tuned(tuned, people)
    with people.status("") as status:
        result = op.run(benchmark, device, status.update, lambda section, records: show_op_part(section, records, people))
    show_op_end(result, people)
    emit({"benchmark": "op", "command": command, "tuned": tuned} | result, options.json)
    if options.plot is not None and result["interrupted"]:
        say(f"{options.plot}: not drawn, the measuring was stopped")
    elif options.plot is not None:
        from factorization_memory.reports.benchmark_figures import save

        save(result, options.plot)
    failed = [record for record in (*result["comparison"], *result["lengths"]) if record["error"] and not record["peer"]]
    return bench_status(result, bool(failed) or any(record["error"] for record in result["memory"]))


def _shapes(options: Op) -> tuple[Shape, ...]:
    from factorization_memory.benchmarks.settings import Shape

    if options.shapes:
        for option in fields(Op):
            value = getattr(options, option.name)
            if option.name in SIZES and value != option.default:
                raise ConfigError(f"{option.name}={value}: not together with shapes, which give every size; drop one of both")
        return tuple(Shape.parse(text) for text in options.shapes)
    for name in ("length", "heads", "num_states", "value_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)}: use 1 or more")
    if options.top_k is not None and not 1 <= options.top_k <= options.num_states:
        raise ConfigError(f"top_k={options.top_k}: use 1 to num_states={options.num_states}")
    return (Shape(*(getattr(options, name) for name in SIZES)),)
