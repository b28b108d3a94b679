"""`fmem bench inference`: how fast whole models read prompts and write tokens on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from factorization_memory.cli.common import bench_status, emit, say
from factorization_memory.cli.tables import number, show_machine, table, wide_console
from factorization_memory.config import ModelConfig


@dataclass(frozen=True)
class Inference:
    """Time to the first token, latency of further ones and tokens per second of whole models of random weights, over the tokens
    read, the sequences at once and the states that a token selects, beside the floor."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=4096, hidden_size=256, num_layers=4))
    """Our model."""
    contexts: tuple[int, ...] = (1024, 16384, 131072, 1048576)
    """Tokens that each sequence has read when it starts to write."""
    batches: tuple[int, ...] = (1, 16)
    """Sequences at once."""
    top_k: tuple[int, ...] = ()
    """States that each token selects, one model for each number; 0 is the dense form, none takes --model.top-k."""
    peers: tuple[Literal["llama"], ...] = ()
    """To compare with, if transformers is installed: its Llama of as many parameters, with a cache of keys and values."""
    llama_heads: int = 4
    """Attention heads of Llama."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and arithmetic: auto takes bfloat16 on a GPU, float32 on a CPU. Our memories are float32 in any case."""
    prefill_chunk: int = 0
    """Tokens read in one forward, of all sequences together; 0 takes 16384 on a GPU, 1024 on a CPU."""
    prefill_seconds: float = 2.0
    """A prompt that takes longer to read than this is not read, and its steps go on from random numbers in place of its state,
    which cost the same; 0 reads none."""
    decode_tokens: int = 128
    """Steps that are timed at each size, from Python and (on a GPU) as a CUDA graph."""
    decode_seconds: float = 2.0
    """They are fewer where they would take longer than this."""
    repeats: int = 5
    """Rounds, of which medians are taken."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    threads: int = 0
    """Threads of the CPU; 0 takes PyTorch's number, which suits a machine that does nothing else."""
    plot: Path | None = None
    """Draw latency over context and tokens per second over batch into this .png or .svg file."""
    json: bool = False
    """Write the result to stdout as one JSON line."""


def run(options: Inference, command: str) -> int:
    """`fmem bench inference`; 1 if a size of our model failed."""
    from factorization_memory.benchmarks import inference
    from factorization_memory.models.device import resolve_device

    settings = {name: value for name, value in vars(options).items() if name not in ("device", "threads", "plot", "json")}
    benchmark = inference.InferenceBenchmark(**settings)
    if options.plot is not None:
        from factorization_memory.reports.benchmark_figures import check_path

        check_path(options.plot)
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
                *size, *read, mode, number(1000 * seconds["median"]), number(1000 * seconds["p99"]),
                f"{figures['tokens_per_second']:,.0f}", number(figures["ratio_to_floor"], "x"),
            )  # fmt: skip
            size, read = ["", "", ""], ["", ""]
    people.print(shown)
    if any(record["state"] == "random" for record in records):
        people.print("without a first token: not read, its steps go on from random numbers in place of a state", soft_wrap=True)
