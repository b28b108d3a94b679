"""`fmem bench training`: the speed and memory of whole training steps on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from factorization_memory.cli.common import bench_status, emit, say
from factorization_memory.cli.tables import number, show_machine, table, wide_console
from factorization_memory.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Training:
    """Tokens per second, MFU and memory of whole training steps, beside transformers' Llama and Mamba-2 of equal parameters
    where that is installed."""

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
    compile: bool = False
    """Compile the losses with torch.compile, ours as one graph (which the backend chunked does not allow)."""
    activation_memory_budget: float = 1.0
    """With --compile: share of the bytes kept for the backward pass, 0 to 1; the rest is computed again."""
    peak_tflops: float = 0
    """The device's peak in TFLOP/s that MFU is relative to; 0 takes the data sheet's for dense bfloat16 where the device is
    known (H100, H200, A100), otherwise the measured rate of a large matrix product."""
    repeats: int = 5
    """Rounds, of which medians are taken."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    threads: int = 0
    """Threads of the CPU; 0 takes PyTorch's number, which suits a machine that does nothing else."""
    json: bool = False
    """Write the result to stdout as one JSON line."""


def run(options: Training, command: str) -> int:
    """`fmem bench training`."""
    from factorization_memory.benchmarks import training
    from factorization_memory.benchmarks.notes import remember
    from factorization_memory.models.device import resolve_device

    if not options.lengths:
        raise ConfigError("lengths=(): use one length or more")
    if options.model.vocab_size < 1:
        raise ConfigError(f"model.vocab_size={options.model.vocab_size}: a model needs one or more token ids")
    people = wide_console()
    settings = {name: value for name, value in vars(options).items() if name not in ("device", "threads", "json")}
    benchmark = training.TrainingBenchmark(**settings)
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
