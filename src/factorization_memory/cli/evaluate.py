"""`fmem evaluate RUN`: how good a trained model is on held-out text, and how it uses its memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from factorization_memory.cli.common import console, emit, parse, write_aside
from factorization_memory.config import ConfigError


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a trained model: loss, perplexity, bits per byte, loss by position with carried memory, routing health."""

    run: tyro.conf.Positional[Path]
    """Run folder, or the folder of one of its checkpoints."""
    corpus: Path | None = None
    """Packed corpus; by default the one that the run was trained on."""
    max_position: int | None = None
    """Read by position up to here; by default 16 training contexts, 0 leaves positions out."""
    max_tokens: int | None = None
    """Held-out tokens of each source that the loss is measured on; by default all."""
    stretches: int = 8
    """Stretches of text of each source that are read by position."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Write the result to stdout as JSON."""


def run(arguments: list[str]) -> int:
    """`fmem evaluate`."""
    options = parse(EvaluateOptions, arguments, "evaluate")
    for flag, value, least in (
        ("--max-tokens", options.max_tokens, 1),
        ("--stretches", options.stretches, 1),
        ("--max-position", options.max_position, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{flag}={value}: use {least} or more")
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.training import find_checkpoint, list_checkpoints, load_model, resolve_device
    from factorization_memory.training.checkpoint import read_state

    checkpoint = find_checkpoint(options.run, "best") if list_checkpoints(options.run) else options.run
    model, tokenizer, config = load_model(checkpoint, resolve_device(options.device, "--device"))
    folder = options.corpus or Path(config.data.corpus)
    if not folder.exists():
        raise ValueError(f"{folder}: the run's corpus is not there any more; name where it is with --corpus DIR")
    corpus = PackedCorpus.open(folder)
    if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{folder}: packed with another tokenizer than the model's; pack it with the run's tokenizer.json")
    result = evaluate(
        model, corpus, config, checkpoint,
        max_position=options.max_position, max_tokens=options.max_tokens, stretches=options.stretches,
    )  # fmt: skip
    show(result)
    if (options.run / "config.json").exists():
        if read_state(checkpoint)["corpus_fingerprint"] == corpus.fingerprint:
            record_evaluation(options.run, result)
        else:
            console().print(f"{folder}: not the corpus of the run, whose evaluation.json stays as it is; --json gives this one")
    emit(result, options.json)
    return 0


def evaluate(
    model: Any, corpus: Any, config: Any, checkpoint: Path, *,
    max_position: int | None = None, max_tokens: int | None = None, stretches: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """`evaluate_run` under a progress bar and the run's precision; `evaluated` says what was evaluated, and how."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from factorization_memory.evaluation import evaluate_run
    from factorization_memory.training.device import autocast

    device = next(model.parameters()).device
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True) as bar, autocast(config.training, device):
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        options: dict[str, Any] = {"max_position": max_position, "max_tokens": max_tokens, "stretches": stretches}
        record = evaluate_run(model, corpus, config, progress=progress, **options)
    return {"evaluated": {"checkpoint": checkpoint.name, "corpus_fingerprint": corpus.fingerprint, **options}, **record}


def record_evaluation(run_dir: Path, result: dict[str, Any]) -> None:
    """Keep the evaluation in the run folder and bring its report up to date."""
    import json

    from factorization_memory.experiments.report import write_report

    write_aside(run_dir / "evaluation.json", json.dumps(result, ensure_ascii=False, allow_nan=False, indent=1))
    console().print(f"report: {write_report(run_dir)}")


def show(result: dict[str, Any]) -> None:
    """The evaluation as tables on stderr."""
    from rich.table import Table

    out = console()
    orders = [str(order) for order in result["ngram"]["orders"]] if "ngram" in result else []
    table = Table("held-out text", "nats per token", "perplexity", "bits per byte", *(f"{n}-gram bytes" for n in orders))
    for name, row in [*result["sources"].items(), ("all", result["total"])]:
        yardstick = (result["ngram"]["sources"].get(name) or result["ngram"]["total"]) if orders else {}
        table.add_row(
            name, f"{row['loss']:.3f}", f"{row['perplexity']:.1f}", f"{row['bits_per_byte']:.3f}",
            *(f"{yardstick[n]:.3f}" for n in orders),
        )  # fmt: skip
    out.print(table)
    rows = [
        (name, multiple, row)
        for name, position in result.get("position", {}).items()
        for multiple, row in position["beyond"].items()
    ]
    if rows:
        context = result["context_length"]
        table = Table(
            "held-out text", "times the context", "positions", "memory carried", f"restarted each {context}", "difference"
        )
        for name, multiple, row in rows:
            table.add_row(
                name, f"{multiple}x", f"{row['start']:,} to {row['end'] - 1:,}", f"{row['bits_per_byte']:.3f}",
                f"{row['restarted_bits_per_byte']:.3f}", f"{row['bits_per_byte'] - row['restarted_bits_per_byte']:+.3f}",
            )  # fmt: skip
        out.print("bits per byte of the same tokens, memory carried from the beginning against emptied each training context")
        out.print(table)
    if not result["routing"]:
        return
    table = Table("layer", "dead states", "balance", "entropy of a token's affinities")
    for layer in result["routing"]:
        mean = [sum(layer[key]) / len(layer[key]) for key in ("balance", "entropy")]
        states = sum(len(head) for head in layer["share"])
        table.add_row(str(layer["layer"]), f"{sum(layer['dead'])} of {states}", *(f"{value:.2f}" for value in mean))
    out.print(table)
