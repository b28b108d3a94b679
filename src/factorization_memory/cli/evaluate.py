"""`fmem evaluate [RUN]`: how good a trained model is on held-out text or on tasks, and how it uses its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory._text import visible
from factorization_memory.cli.common import at_least, console, emit, load, parse, resolve, say
from factorization_memory.cli.evaluate_options import EvaluateOptions
from factorization_memory.config import ConfigError
from factorization_memory.runs.names import EVALUATION_NAME

if TYPE_CHECKING:
    from factorization_memory.experiments.evaluation import Progress

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
        raise ConfigError("--harness: no task given; name one or more, such as hellaswag or japanese")
    if options.harness and without:
        raise ConfigError(f"{without[0]}: applies to held-out text, which --harness does not read; drop one of them")
    if options.harness:
        from factorization_memory.cli import evaluate_harness

        return evaluate_harness.run(options)
    if with_harness:
        raise ConfigError(f"{with_harness[0]}: no task given; name one or more with --harness")
    at_least(options, max_tokens=1, stretches=1, max_position=0, recall_items=1)
    changed = [f"--{name.replace('_', '-')}" for name in RECALL if getattr(options, name) != getattr(default, name)]
    if changed and not options.recall:
        raise ConfigError(f"{changed[0]}: needs the recall suite; add --recall")
    if min(options.recall_lengths, default=0) < 1:
        raise ConfigError(
            f"--recall-lengths={' '.join(map(str, options.recall_lengths))}: use one or more lengths, each 1 or more"
        )
    from factorization_memory.experiments.evaluation import (
        BUILTIN,
        evaluate_model,
        held_out_corpus,
        keep_evaluation,
        require_recall_texts,
    )
    from factorization_memory.reports.terminal.evaluation import show_evaluation
    from factorization_memory.runs.checkpoint_folder import read_state

    run_dir, checkpoint = resolve(options.run)
    model, tokenizer, config = load(checkpoint, options.device)
    limits: dict[str, Any] = {name: getattr(options, name) for name in ("max_position", "max_tokens", "stretches")}
    if options.recall:
        limits |= {"recall_items": options.recall_items, "recall_lengths": options.recall_lengths}
    if checkpoint is None and options.corpus is None:
        limits["ngram_orders"] = ()  # of so little training text they tell nothing
    with held_out_corpus(options.corpus, options.run, tokenizer, config) as corpus:
        if options.recall:
            require_recall_texts(corpus, options.recall_lengths)
        with evaluation_progress() as progress:
            name = BUILTIN if checkpoint is None else checkpoint.name
            result = evaluate_model(model, corpus, config, name, progress=progress, **limits)
    show_evaluation(result, console())
    if run_dir is not None and checkpoint is not None:
        if read_state(checkpoint)["corpus_fingerprint"] == corpus.fingerprint:
            say_kept(run_dir, keep_evaluation(run_dir, result))
        else:
            say(f"{corpus.folder}: not the run's own corpus, so its {EVALUATION_NAME} is unchanged; --json shows this result")
    emit(result, options.json)
    return 0


@contextmanager
def evaluation_progress() -> Iterator[Progress]:
    """A progress bar for each part of an evaluation."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(visible(what))
            bar.update(tasks[what], completed=done, total=total)

        yield progress


def say_kept(run_dir: Path, report: Path | None) -> None:
    """Reports what was done with an evaluation: the path of the `report` with it; None if it was not saved."""
    if report is None:
        path = run_dir / EVALUATION_NAME
        say(f"{path}: unchanged, since it already has more than this evaluation; --json shows this result")
    else:
        say(f"report: {report}")
