"""`fmem evaluate [RUN]`: how good a trained model is on held-out text or on tasks, and how it uses its memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory._text import visible
from factorization_memory.cli.common import at_least, console, emit, load, parse, plain, resolve, say, write_aside
from factorization_memory.cli.evaluate_options import EvaluateOptions
from factorization_memory.config import ConfigError
from factorization_memory.runs.names import EVALUATION_NAME, TOKENIZER_NAME

if TYPE_CHECKING:
    from factorization_memory.config import RunConfig
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel

HELD_OUT = ("corpus", "max_position", "max_tokens", "stretches", "recall")
"""Options for held-out text alone."""
RECALL = ("recall_items", "recall_lengths")
"""Options for the recall suite alone."""
HARNESS = ("harness_data", "harness_tasks", "harness_shots", "harness_limit", "harness_batch_size")
"""Options for tasks alone."""


def run(arguments: list[str]) -> int:
    """`fmem evaluate`."""
    options = parse(EvaluateOptions, arguments, "evaluate")
    default = EvaluateOptions()
    with_harness = [f"--{name.replace('_', '-')}" for name in HARNESS if getattr(options, name) != getattr(default, name)]
    without = [f"--{name.replace('_', '-')}" for name in HELD_OUT if getattr(options, name) != getattr(default, name)]
    if options.harness == ():
        raise ConfigError("--harness: no task is named; name some, for example hellaswag or japanese")
    if options.harness and without:
        raise ConfigError(f"{without[0]}: it is about held-out text, which --harness leaves out; leave one of them out")
    if options.harness:
        from factorization_memory.cli import evaluate_harness

        return evaluate_harness.run(options)
    if with_harness:
        raise ConfigError(f"{with_harness[0]}: there is no task; name some with --harness")
    at_least(options, max_tokens=1, stretches=1, max_position=0, recall_items=1)
    changed = [f"--{name.replace('_', '-')}" for name in RECALL if getattr(options, name) != getattr(default, name)]
    if changed and not options.recall:
        raise ConfigError(f"{changed[0]}: the recall suite is not asked for; add --recall")
    if min(options.recall_lengths, default=0) < 1:
        raise ConfigError(f"--recall-lengths={' '.join(map(str, options.recall_lengths))}: name one or more, each 1 or more")
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.runs.checkpoint_folder import read_state

    run_dir, checkpoint = resolve(options.run)
    model, tokenizer, config = load(checkpoint, options.device)
    limits: dict[str, Any] = {name: getattr(options, name) for name in ("max_position", "max_tokens", "stretches")}
    if options.recall:
        limits |= {"recall_items": options.recall_items, "recall_lengths": options.recall_lengths}
    if checkpoint is None and options.corpus is None:
        with tempfile.TemporaryDirectory() as temporary:
            corpus = sample_books(tokenizer, Path(temporary))
            _check_recall(options, corpus)
            result = evaluate(model, corpus, config, "builtin", ngram_orders=(), **limits)
    else:
        if options.corpus is None and not config.data.corpus:
            raise ValueError(f"{options.run}: an exported model does not say where its corpus is; name one with --corpus DIR")
        folder = options.corpus or Path(config.data.corpus)
        if not folder.exists():
            raise ValueError(f"{folder}: the run's corpus is not there any more; name where it is with --corpus DIR")
        corpus = PackedCorpus.open(folder)
        if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{folder}: packed with another tokenizer than the model's; pack it with the {TOKENIZER_NAME} beside the model"
            )
        _check_recall(options, corpus)
        result = evaluate(model, corpus, config, "builtin" if checkpoint is None else checkpoint.name, **limits)
    show(result)
    if run_dir is not None and checkpoint is not None:
        if read_state(checkpoint)["corpus_fingerprint"] == corpus.fingerprint:
            record_evaluation(run_dir, result)
        else:
            say(f"{corpus.folder}: not the corpus of the run, whose {EVALUATION_NAME} stays as it is; --json gives this one")
    emit(result, options.json)
    return 0


def _check_recall(options: EvaluateOptions, corpus: PackedCorpus) -> None:
    if options.recall:
        from factorization_memory.cli.evaluate_recall import check_recall

        check_recall(corpus, options.recall_lengths)


def sample_books(tokenizer: Tokenizer, folder: Path) -> PackedCorpus:
    """The two books that come with the package, nearly all of them as held-out text, packed into `folder`."""
    from factorization_memory.data.corpora import builtin_corpus
    from factorization_memory.data.shards import pack

    return pack([(None, builtin_corpus())], tokenizer, folder / "packed", holdout="tail", holdout_fraction=0.99)


def evaluate(
    model: LanguageModel, corpus: PackedCorpus, config: RunConfig, checkpoint: str, *,
    max_position: int | None = None, max_tokens: int | None = None, stretches: int = 8, ngram_orders: tuple[int, ...] = (3, 5),
    **recall: Any,
) -> dict[str, Any]:  # fmt: skip
    """`evaluate_run` under a progress bar and the run's precision; `evaluated` says what was evaluated, and how. `recall` are
    its arguments for the recall suite."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from factorization_memory.evaluation import evaluate_run
    from factorization_memory.models.device import autocast

    device = next(model.parameters()).device
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True) as bar, autocast(config.training, device):
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(visible(what))
            bar.update(tasks[what], completed=done, total=total)

        options: dict[str, Any] = {"max_position": max_position, "max_tokens": max_tokens, "stretches": stretches, **recall}
        record = evaluate_run(model, corpus, config, ngram_orders=ngram_orders, progress=progress, **options)
    return {"evaluated": {"checkpoint": checkpoint, "corpus_fingerprint": corpus.fingerprint, **options}, **record}


def record_evaluation(run_dir: Path, result: dict[str, Any]) -> None:
    """Keep the evaluation in the run folder and bring its report up to date; one that tells less, and nothing more, does not
    take the place of one of the same checkpoint."""
    import json

    from factorization_memory._files import read_json_or_none
    from factorization_memory.reports.report import write_report

    path = run_dir / EVALUATION_NAME
    kept = read_json_or_none(path)
    if kept is not None and told_by(result, kept):
        say(f"{path}: tells all that this evaluation does and more, and stays as it is; --json gives this one")
        return
    write_aside(path, json.dumps(result, ensure_ascii=False, allow_nan=False, indent=1))
    say(f"report: {write_report(run_dir)}")


def told_by(result: dict[str, Any], kept: dict[str, Any]) -> bool:
    """Whether `kept`, of the same model and text as `result`, has all that it has, of as much text, and more of something."""
    evaluated = kept.get("evaluated", {})
    if any(evaluated.get(name) != result["evaluated"][name] for name in ("checkpoint", "corpus_fingerprint")):
        return False

    def extent(evaluation: dict[str, Any]) -> tuple[int, ...]:
        positions = evaluation.get("position", {}).values()
        return (
            evaluation["total"]["tokens"],
            min((each["max_position"] for each in positions), default=0),
            min((each["stretches"] for each in positions), default=0),
            len(evaluation.keys() & {"recall", "ngram", "position", "recall_tasks"}),
            evaluation.get("recall_tasks", {}).get("items", 0),
        )

    mine, theirs = extent(result), extent(kept)
    return mine != theirs and all(own <= other for own, other in zip(mine, theirs, strict=True))


def show(result: dict[str, Any]) -> None:
    """The evaluation as tables on stderr."""
    from rich.table import Table

    from factorization_memory.cli.evaluate_recall import show_recall
    from factorization_memory.reports.recall_text import as_text, distances_as_text
    from factorization_memory.runs.recall_names import KINDS

    out = console()
    orders = [str(order) for order in result["ngram"]["orders"]] if "ngram" in result else []
    table = Table("held-out text", "nats per token", "perplexity", "bits per byte", *(f"{n}-gram bytes" for n in orders))
    for name, row in [*result["sources"].items(), ("all", result["total"])]:
        yardstick = (result["ngram"]["sources"].get(name) or result["ngram"]["total"]) if orders else {}
        table.add_row(
            plain(name), f"{row['loss']:.3f}", f"{row['perplexity']:.1f}", f"{row['bits_per_byte']:.3f}",
            *(f"{yardstick[n]:.3f}" for n in orders),
        )  # fmt: skip
    out.print(table)
    table = Table("held-out text", *KINDS)
    for name, parts in result["recall"].items():
        table.add_row(plain(name), *as_text(parts))
    out.print(
        "nats per token (and share of tokens) by what stood before in the same window: the token and its predecessor, the "
        "predecessor followed by others alone, or neither"
    )
    out.print(table)
    headings, cells = distances_as_text(result["recall"])
    if headings:
        table = Table("repeated", *headings)
        for name, row in cells.items():
            table.add_row(plain(name), *row)
        out.print("the repeated ones by how many tokens ago that pair last occurred")
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
                plain(name), f"{multiple}x", f"{row['start']:,} to {row['end'] - 1:,}", f"{row['bits_per_byte']:.3f}",
                f"{row['restarted_bits_per_byte']:.3f}", f"{row['bits_per_byte'] - row['restarted_bits_per_byte']:+.3f}",
            )  # fmt: skip
        out.print("bits per byte of the same tokens, memory carried from the beginning against emptied each training context")
        out.print(table)
    if "recall_tasks" in result:
        show_recall(result["recall_tasks"], out)
    if not result["routing"]:
        return
    table = Table("layer", "dead states", "balance", "entropy of a token's affinities")
    for layer in result["routing"]:
        mean = [sum(layer[key]) / len(layer[key]) for key in ("balance", "entropy")]
        states = sum(len(head) for head in layer["share"])
        table.add_row(str(layer["layer"] + 1), f"{sum(layer['dead'])} of {states}", *(f"{value:.2f}" for value in mean))
    out.print(table)
