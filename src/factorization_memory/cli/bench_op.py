"""`fmem bench op`: the speed and memory of the recurrence on this machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from factorization_memory.cli.common import bench_status, choose, emit, say
from factorization_memory.cli.tables import number, show_machine, table, wide_console
from factorization_memory.config import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from factorization_memory.benchmarks.settings import Shape

SIZES = ("batch", "length", "heads", "num_states", "value_size", "top_k")
PASSES = {"forward": "fwd", "forward_backward": "fwd+bwd"}


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
        for record in tuned:
            of = f"{record['kernel']}, chunks of {record['chunk']}, {record['padded']} states"
            kept = "as shipped" if record["shipped"] else "another than ships"
            people.print(f"{of}: {record['tile']} ({kept})", soft_wrap=True)
    with people.status("") as status:
        result = op.run(benchmark, device, status.update, _OpTables(people).show)
    show_machine(result, people)
    for spread in result["length_spread"]:
        labels = PASSES | {f"graph_{part}": f"{label} graph" for part, label in PASSES.items()}
        ratios = ", ".join(f"{label} {number(spread[part], 'x')}" for part, label in labels.items() if spread[part])
        people.print(f"{spread['contender']}, {spread['sweep']}: slowest over fastest length {ratios}", soft_wrap=True)
    for name, why in result["missing"].items():
        people.print(f"without {name}: {why}", soft_wrap=True)
    for record in result["same_maths"]:
        error = record["reason"] or f"relative error {record['error']:.1e}"
        text = f"{record['peer']} at {record['shape']} beside the float64 reference: {error}"
        if not record["passed"]:
            tolerance = f"{record['tolerance']:.0e}"
            text = f"[yellow]{text}; NOT the same maths (more than {tolerance} off): its times compare nothing[/]"
        people.print(text, soft_wrap=True)
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


class _OpTables:
    """The tables of the recurrence's figures."""

    def __init__(self, people: Console) -> None:
        self.people = people

    def show(self, section: str, records: list[dict[str, Any]]) -> None:
        """Print a part of the result."""
        getattr(self, f"_{section}")(records)

    def _checks(self, records: list[dict[str, Any]]) -> None:
        worst = max(records, key=lambda check: check["error"])
        where = f"{worst['worst']} of {worst['backend']} at {worst['shape']}"
        self.people.print(f"correctness gate green: largest relative error {worst['error']:.1e} ({where})", soft_wrap=True)
        self.people.print(
            "graph: the same as a replayed CUDA graph; GB/s, TFLOP/s, floor: of what the formula must move and compute; "
            "extra: memory of fwd+bwd beyond inputs, output and gradients, over the bytes of v and y",
            soft_wrap=True,
        )

    def _comparison(self, records: list[dict[str, Any]]) -> None:
        first = next(record for record in records if not record["peer"])
        size = ", ".join(
            f"{letter}={first[name]}" for letter, name in zip("BTHMDK", SIZES, strict=True) if first[name] is not None
        )
        figures = [record[part] for record in records for part in PASSES if record[part] is not None]
        graphs = any(figure["graph_ns_per_token"] is not None for figure in figures)
        reference = any("speedup" in figure for figure in figures)
        ratio = "speed-up" if reference else f"to {first['contender']}"
        columns = ("", "pass", "ns/token", *(["graph"] if graphs else []), "GB/s", "TFLOP/s", "to floor", ratio, "extra")
        shown = table(size, *columns)
        for record in records:
            if record["error"]:
                self.people.print(f"[yellow]{record['contender']}: {record['error']}[/]", soft_wrap=True)
            for part, label in PASSES.items():
                figure = record[part]
                if figure is None:
                    continue
                over = figure["speedup"] if reference else figure["time_over_first"]
                shown.add_row(
                    record["contender"] if part == "forward" else "",
                    label,
                    number(figure["ns_per_token"]),
                    *([number(figure["graph_ns_per_token"])] if graphs else []),
                    number(figure["gigabytes_per_second"]),
                    number(figure["teraflops_per_second"]),
                    number(figure["ratio_to_floor"], "x"),
                    number(over, "x"),
                    number(record["extra_ratio"], "x") if part == "forward_backward" else "",
                )
            shown.add_section()
        self.people.print(shown)
        for record in records:
            if record["note"]:
                self.people.print(f"{record['contender']}: {record['note']}", soft_wrap=True)

    def _lengths(self, records: list[dict[str, Any]]) -> None:
        kinds = ["ns_per_token"]
        if any(record[part] and record[part]["graph_ns_per_token"] is not None for record in records for part in PASSES):
            kinds.append("graph_ns_per_token")
        heads = ("forward ns/token", "forward+backward ns/token")
        columns = [head if kind == "ns_per_token" else "graph" for head in heads for kind in kinds]
        for sweep in dict.fromkeys(record["sweep"] for record in records):
            shown = table(f"{sweep}, by length", "backend", "B", "T", *columns)
            for record in records:
                if record["sweep"] == sweep:
                    times = [record[part] and record[part][kind] for part in PASSES for kind in kinds]
                    shown.add_row(record["contender"], f"{record['batch']:,}", f"{record['length']:,}", *map(number, times))
            self.people.print(shown)
        for error in dict.fromkeys(f"{record['contender']}: {record['error']}" for record in records if record["error"]):
            self.people.print(f"[yellow]{error}[/]", soft_wrap=True)

    def _memory(self, records: list[dict[str, Any]]) -> None:
        columns = ("backend", "T", "peak MB", "over inputs + outputs", "with their gradients", "extra")
        shown = table("memory of forward and backward of one sequence, inputs included", *columns)
        for record in records:
            if record["error"]:
                self.people.print(f"[yellow]{record['backend']}: {record['error']}[/]", soft_wrap=True)
                continue
            shown.add_row(
                record["backend"],
                f"{record['length']:,}",
                number(record["peak_bytes"] / 1e6),
                *(f"{record[name]:.2f}x" for name in ("ratio", "ratio_with_gradients", "extra_ratio")),
            )
        self.people.print(shown)
