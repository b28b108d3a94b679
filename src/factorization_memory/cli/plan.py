"""`fmem plan PRESET`: what a run would be and cost, without weights, data or a GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from factorization_memory.cli.common import console, emit
from factorization_memory.cli.train import preset_and_options
from factorization_memory.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from factorization_memory.data.shards import PackedCorpus

ASSUMED_VOCABULARY = 16384
"""Of a run whose corpus is not named yet; for the preset `demo`, that of `fmem demo`."""


@dataclass(frozen=True)
class PlanOptions:
    """What a run would be and cost. Any field of the preset can be overridden by its flag."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    json: bool = False
    """Write the result to stdout as JSON."""


def run(arguments: list[str]) -> int:
    """`fmem plan`."""
    options: PlanOptions = preset_and_options(arguments, "plan", PlanOptions)
    result = plan(options.config)
    _show(result)
    emit(result, options.json)
    return 0


def plan(config: RunConfig) -> dict[str, Any]:
    """Counts, memory and schedule of a run."""
    from factorization_memory.models.counting import count, training_memory
    from factorization_memory.training.schedule import learning_rate

    model, corpus = config.model, None
    if config.data.corpus:
        from factorization_memory.data.shards import PackedCorpus
        from factorization_memory.training.trainer import complete_config

        corpus = PackedCorpus.open(Path(config.data.corpus))
        model = complete_config(config, corpus.tokenizer.vocab_size).model
    elif not model.vocab_size:
        from factorization_memory.experiments.demo import VOCABULARY

        model = dataclasses.replace(model, vocab_size=VOCABULARY if config.name == "demo" else ASSUMED_VOCABULARY)
    counts = count(model, config.data.context_length)
    steps, tokens = config.training.steps, config.training.tokens_per_step
    bfloat16 = config.training.precision == "bfloat16"
    marks = sorted({1, config.optimizer.warmup_steps or 1, *(max(1, steps * i // 8) for i in range(1, 9))})
    return {
        "preset": config.name,
        "vocab_size": model.vocab_size,
        "vocabulary_assumed": corpus is None and not config.model.vocab_size,
        "parameters": {"total": counts.parameters, "embedding": counts.embedding_parameters},
        "flops_per_token": {
            "train": counts.train_flops, "prefill": counts.prefill_flops, "decode": counts.decode_flops,
            "of_which_recurrence": counts.recurrence_flops, "of_which_attention": counts.attention_flops,
        },
        "state_bytes": counts.state_bytes,
        "state_bytes_per_token": counts.state_bytes_per_token,
        "training_memory_bytes": training_memory(model, config.micro_batch_size, config.data.context_length, bfloat16),
        "precision": "bfloat16" if bfloat16 else "float32",
        "precision_assumed": config.training.precision == "auto",
        "steps": steps,
        "tokens": steps * tokens,
        "tokens_per_step": tokens,
        "micro_batches": config.sequences_per_step // config.micro_batch_size,
        "epochs": None if corpus is None else _epochs(config, corpus),
        "train_flops": counts.train_flops * steps * tokens,
        "time": _time(config, counts.train_flops * steps * tokens),
        "learning_rate": {str(step): learning_rate(config.optimizer, step, steps) for step in marks if step <= steps},
    }  # fmt: skip


def _epochs(config: RunConfig, corpus: PackedCorpus) -> dict[str, Any]:
    """How often a run reads the corpus's training text: `total`, and of each source where `data.weights` sets shares."""
    read = config.training.steps * config.training.tokens_per_step
    sizes = {name: len(source.splits["train"].tokens) for name, source in corpus.sources.items()}
    weights = {name: config.data.weights.get(name, 0.0) for name in sizes} if config.data.weights else {}
    every = sum(weights.values())
    by_source = {name: read * weight / every / sizes[name] for name, weight in weights.items() if every and sizes[name]}
    return {"total": read / max(1, sum(sizes.values())), "training_tokens": sum(sizes.values()), "sources": by_source}


def _time(config: RunConfig, flops: int) -> dict[str, Any] | None:
    """`seconds` of all steps by the last `fmem bench training` on this machine, and its `date`; None where there is none."""
    from factorization_memory.benchmarks.timing import machine
    from factorization_memory.cli.benchmark_notes import training_rate
    from factorization_memory.models.device import resolve_device

    try:
        device = resolve_device(config.training.device)
    except ConfigError:
        return None  # planned for another machine
    precision = config.training.precision
    bfloat16 = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    dtype = "bfloat16" if bfloat16 else "float32"
    found = training_rate(device.type, machine(device)["name"], dtype, config.data.context_length)
    return None if found is None else {"seconds": flops / found[0], "flops_per_second": found[0], "date": found[1]}


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    from factorization_memory.training.progress import clock

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    vocabulary = f"vocabulary {result['vocab_size']:,}" + (" assumed" if result["vocabulary_assumed"] else "")
    parameters, flops, memory = result["parameters"], result["flops_per_token"], result["training_memory_bytes"]
    grows = result["state_bytes_per_token"]
    of_which = [f"recurrence forward {_short(flops['of_which_recurrence'])}"] if flops["of_which_recurrence"] else []
    if flops["of_which_attention"]:
        of_which.append(f"attention forward, at the mean context of training, {_short(flops['of_which_attention'])}")
    rows = {
        "preset": result["preset"],
        "parameters": f"{parameters['total']:,} ({parameters['embedding']:,} in embedding and head; {vocabulary})",
        "FLOPs per token": f"train {_short(flops['train'])}, prefill {_short(flops['prefill'])}, decode "
        f"{_short(flops['decode'])}; {', '.join(of_which)}",
        "state": f"{_short(result['state_bytes'])}B per sequence"
        + (f" and {_short(grows)}B for each token read" if grows else ", at any length"),
        "training memory": ", ".join(f"{name} {_short(size)}B" for name, size in memory.items())
        + f" (estimate for {result['precision']}"
        + ("; on a GPU precision=auto takes bfloat16 activations)" if result["precision_assumed"] else ")"),
        "steps": f"{result['steps']:,} of {result['tokens_per_step']:,} tokens in {result['micro_batches']} micro-batch(es): "
        f"{_short(result['tokens'])} tokens, {_short(result['train_flops'])}FLOP",
    }
    if result["epochs"] is not None:
        of_each = ", ".join(f"{name} {times:.2f}" for name, times in result["epochs"]["sources"].items())
        rows["corpus"] = (
            f"{result['epochs']['training_tokens']:,} training tokens, read {result['epochs']['total']:.2f} times"
            + (f" ({of_each})" if of_each else "")
        )
    if result["time"] is not None:
        rows["time"] = (
            f"about {clock(result['time']['seconds'])} at the {_short(result['time']['flops_per_second'])}FLOP/s of "
            f"`fmem bench training` on this machine ({result['time']['date']}), evaluations aside"
        )
    else:
        rows["time"] = "not known: run `fmem bench training` once on this machine"
    for name, text in rows.items():
        table.add_row(name, text)
    peak = max(result["learning_rate"].values())
    for i, (step, rate) in enumerate(result["learning_rate"].items()):
        table.add_row("learning rate" if i == 0 else "", f"{int(step):>8,}  {rate:.2e}  " + "█" * round(30 * rate / peak))
    console().print(table)


def _short(number: float) -> str:
    """A number in three digits with its SI prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
