"""`fmem bench`: the speed and memory of the recurrence (`op`) and of whole training steps (`training`) on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from factorization_memory.cli.common import console, emit, parse
from factorization_memory.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Op:
    """The recurrence alone: each backend beside the reference loop, time per token over length, memory of training. A backend
    that is not right is not timed: status 1."""

    backends: tuple[str, ...] = ("chunked",)
    """Backends to measure next to the reference."""
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
    json: bool = False
    """Write the result to stdout as one JSON line."""


@dataclass(frozen=True)
class Training:
    """Tokens per second of whole training steps, beside transformers' Llama and Mamba-2 of equal parameters where that is
    installed."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=4096, hidden_size=256, num_layers=4))
    """Our model."""
    batch: int = 8
    """Sequences of a step."""
    lengths: tuple[int, ...] = (512, 4096)
    """Tokens of each sequence."""
    peers: tuple[Literal["llama", "mamba2"], ...] = ("llama", "mamba2")
    """Models to compare with; may be empty."""
    llama_heads: int = 4
    """Attention heads of Llama."""
    mamba2_layers: int = 8
    """Layers of Mamba-2."""
    mamba2_chunk: int = 64
    """Chunk of Mamba-2's scan; 64 is the fastest on a CPU."""
    bfloat16: bool = False
    """Autocast to bfloat16."""
    repeats: int = 5
    """Rounds, of which medians are taken."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    threads: int = 0
    """Threads of the CPU; 0 takes PyTorch's number, which suits a machine that does nothing else."""
    json: bool = False
    """Write the result to stdout as one JSON line."""


Bench = Annotated[Op, tyro.conf.subcommand("op")] | Annotated[Training, tyro.conf.subcommand("training")]


def run(arguments: list[str]) -> int:
    """`fmem bench` with `arguments`; returns the exit status."""
    options: Op | Training = parse(Bench, arguments, "bench")  # type: ignore[arg-type]
    for name in ("batch", "repeats"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)}: use 1 or more")
    if any(length < 1 for length in options.lengths):
        raise ConfigError(f"lengths={options.lengths}: use lengths of 1 or more tokens")
    if options.threads < 0:
        raise ConfigError(f"threads={options.threads}: use 0 (PyTorch's number) or more")
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    return _op(options) if isinstance(options, Op) else _training(options)


def _op(options: Op) -> int:
    import torch

    from factorization_memory.benchmarks import op
    from factorization_memory.benchmarks.correctness import Shape
    from factorization_memory.cli.common import choose
    from factorization_memory.ops import BACKENDS
    from factorization_memory.training.device import resolve_device

    for name in ("length", "heads", "num_states", "value_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)}: use 1 or more")
    if options.top_k is not None and not 1 <= options.top_k <= options.num_states:
        raise ConfigError(f"top_k={options.top_k}: use 1 to num_states={options.num_states}")
    if options.memory_length < 0:
        raise ConfigError(f"memory_length={options.memory_length}: use 0 (none) or more tokens")
    for backend in options.backends:
        choose(backend, dict.fromkeys(BACKENDS), "backend")
    people = console()
    benchmark = op.OpBenchmark(
        Shape(options.batch, options.length, options.heads, options.num_states, options.value_size, options.top_k),
        options.backends,
        getattr(torch, options.dtype),
        options.lengths,
        options.memory_length,
        options.repeats,
    )
    with people.status("") as status:
        result = op.run(benchmark, resolve_device(options.device, "device"), status.update)
    _show_op(result, people)
    emit({"benchmark": "op"} | result, options.json)
    return 0


def _show_op(result: dict[str, Any], people: Console) -> None:
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            made.add_column(column, justify="left" if i == 0 else "right")
        return made

    _show_machine(result, people)
    worst = max(result["checks"], key=lambda check: check["error"])
    people.print(f"correctness gate green: largest relative error {worst['error']:.1e} ({worst['backend']})")
    first = result["comparison"][0]
    size = ", ".join(
        f"{letter}={first[name]}"
        for letter, name in zip("BTHMDK", ("batch", "length", "heads", "num_states", "value_size", "top_k"), strict=True)
        if first[name] is not None
    )
    comparison = table(size, "backend", "forward ns/token", "speed-up", "forward+backward ns/token", "speed-up")
    for record in result["comparison"]:
        cells = [record["backend"]]
        for part in ("forward", "forward_backward"):
            cells += [f"{record[part]['ns_per_token']:,.0f}", f"{record[part]['speedup']:.1f}x"]
        comparison.add_row(*cells)
    people.print(comparison)
    if result["lengths"]:
        lengths = table("one sequence, by length", "backend", "T", "forward ns/token", "forward+backward ns/token")
        for record in result["lengths"]:
            lengths.add_row(
                record["backend"],
                f"{record['length']:,}",
                *(f"{record[part]['ns_per_token']:,.0f}" for part in ("forward", "forward_backward")),
            )
        people.print(lengths)
    if result["memory"]:
        columns = ("backend", "T", "peak MB", "over inputs + outputs", "with their gradients")
        memory = table("memory of forward+backward of one sequence, inputs included", *columns)
        for record in result["memory"]:
            memory.add_row(
                record["backend"],
                f"{record['length']:,}",
                f"{record['peak_bytes'] / 1e6:,.0f}",
                f"{record['ratio']:.2f}x",
                f"{record['ratio_with_gradients']:.2f}x",
            )
        people.print(memory)


def _training(options: Training) -> int:
    from factorization_memory.benchmarks import training
    from factorization_memory.training.device import resolve_device

    if not options.lengths:
        raise ConfigError("lengths=(): use one length or more")
    if options.model.vocab_size < 1:
        raise ConfigError(f"model.vocab_size={options.model.vocab_size}: a model needs one or more token ids")
    people = console()
    settings = {name: value for name, value in vars(options).items() if name not in ("device", "threads", "json")}
    with people.status("") as status:
        device = resolve_device(options.device, "device")
        result = training.run(training.TrainingBenchmark(**settings), device, status.update)
    _show_training(result, people)
    emit({"benchmark": "training", "model": asdict(options.model)} | result, options.json)
    return 0


def _show_training(result: dict[str, Any], people: Console) -> None:
    from rich.table import Table

    _show_machine(result, people)
    table = Table(title=f"training step of {result['records'][0]['batch']} sequences", title_justify="left")
    table.add_column("model")
    for column in ("parameters", "T", "ms", "tokens/s", "peak MB", "ours to it"):
        table.add_column(column, justify="right")
    for record in result["records"]:
        table.add_row(
            record["model"] if "ours_over_this" in record else "ours",
            f"{record['parameters'] / 1e6:.2f} M",
            f"{record['length']:,}",
            f"{1000 * record['seconds']['median']:,.0f}",
            f"{record['tokens_per_second']:,.0f}",
            f"{record['peak_bytes'] / 1e6:,.0f}",
            f"{record['ours_over_this']:.2f}x" if "ours_over_this" in record else "",
        )
    people.print(table)
    if result["missing"]:
        people.print(f"[yellow]{result['missing']}[/]", soft_wrap=True)


def _show_machine(result: dict[str, Any], people: Console) -> None:
    where = result["machine"]
    text = f"{where['name']} ({where['device']}), {where['threads']} threads, torch {where['torch']}, {result['dtype']}"
    people.print(text, soft_wrap=True)
