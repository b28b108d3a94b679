"""`fmem demo`: the whole pipeline, from two books to a report, on the texts that come with the package."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from factorization_memory._streams import best_effort
from factorization_memory.cli.common import console, emit, interrupted_status, parse, say
from factorization_memory.cli.evaluate import evaluation_progress, say_kept
from factorization_memory.cli.generate import stream
from factorization_memory.config import ConfigError
from factorization_memory.experiments.demo import PROMPTS, RECALL_STEPS, inspected_text, learn_recall, pack_books
from factorization_memory.generation.sampling import SamplingConfig
from factorization_memory.presets import demo
from factorization_memory.runs.names import CORPUS_NAME, REPORT_NAME

if TYPE_CHECKING:
    from rich.console import Console

    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.evaluation import RecallProgress
    from factorization_memory.runs.recall_record import RecallDemoRecord

RUN_DIR = Path("runs/demo")


@dataclass(frozen=True)
class DemoOptions:
    """Train a small model on one English and one Japanese book (about two minutes on two cores), evaluate it, let it write,
    show two still smaller ones learning to recall, and leave a run folder with plots and a report. Uses the GPU where there is
    one."""

    run_dir: Path | None = None
    """Run folder; by default runs/demo, or the next free name unless --resume is given."""
    resume: bool = False
    """Resume an interrupted demo from its last checkpoint; give the same --steps."""
    steps: int | None = None
    """Training steps, for a shorter or longer demo."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Write the results to stdout as JSON."""


def run(arguments: list[str]) -> int:
    """`fmem demo`."""
    options = parse(DemoOptions, arguments, "demo")
    run_dir = options.run_dir or (RUN_DIR if options.resume else _free_name(RUN_DIR))
    out = console()
    out.rule("[bold]1  text to tokens")
    corpus = _corpus_to_resume(run_dir) if options.resume else pack_books(run_dir / CORPUS_NAME)
    for name, source in corpus.sources.items():
        parts = ", ".join(f"{part} {len(s.tokens):,} tokens of {s.text_bytes:,} bytes" for part, s in source.splits.items())
        out.print(f"{name}: {parts}")

    from factorization_memory.experiments.evaluation import keep_evaluation
    from factorization_memory.experiments.session import Session
    from factorization_memory.reports.terminal.evaluation import show_evaluation
    from factorization_memory.training import RichProgress

    out.rule("[bold]2  training")
    config = demo()
    training = dataclasses.replace(
        config.training, device=options.device, steps=config.training.steps if options.steps is None else options.steps
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=str(corpus.folder)), training=training)
    session = Session(config, run_dir, RichProgress(console()))
    result = session.train(options.resume)
    if result["stopped"] == "interrupted":
        emit({"run_dir": str(run_dir), "training": result}, options.json)
        say(f"stopped by {result['signal']}; to resume: {_resume_command(run_dir, options)}")
        return interrupted_status(result)

    out.rule("[bold]3  evaluation on the held-out end of each book")
    with evaluation_progress() as progress:
        evaluation = session.evaluate(stretches=4, progress=progress)
    show_evaluation(evaluation, out)

    out.rule("[bold]4  generated text")
    samples, (_, model, tokenizer, _) = [], session.trained
    for prompt in PROMPTS:
        sampling = SamplingConfig(temperature=0.7, min_p=0.05)
        samples += stream(model, tokenizer, prompt, to=best_effort(sys.stderr), max_tokens=100, sampling=sampling)
    session.keep_samples(samples)
    session.inspect(inspected_text(corpus))

    out.rule("[bold]5  recall: two small models learn to name the value behind a key")
    recall = _recall(run_dir, out)

    out.rule("[bold]6  report")
    say_kept(run_dir, keep_evaluation(run_dir, evaluation))
    say("next:")
    say(f"  open {run_dir / REPORT_NAME} in a browser")
    say(f"  {shlex.join(['fmem', 'generate', str(run_dir), '--prompt', PROMPTS[0]])}")
    say("  fmem data pack TEXTS --output CORPUS     (your own texts; then fmem train demo --data.corpus CORPUS)")
    record = {"training": result, "evaluation": evaluation, "samples": samples, "recall": recall}
    emit({"run_dir": str(run_dir), **record}, options.json)
    return 0


def _recall(run_dir: Path, out: Console) -> RecallDemoRecord:
    """The recall demonstration's record; shows the progress of both models as they learn."""
    from rich.live import Live

    from factorization_memory.evaluation.recall_demo import FORMS
    from factorization_memory.reports.terminal.recall_demo import learning_table

    out.print("the same sequences and sizes; they differ only in update_lag. Share of values named correctly in new sequences:")
    reports: list[tuple[int, dict[str, float]]] = []
    with Live(learning_table(FORMS, reports), console=out, auto_refresh=False, transient=True) as live:

        def progress(report: dict[str, RecallProgress]) -> None:
            step = next(iter(report.values())).step
            reports.append((step, {name: each.accuracy for name, each in report.items()}))
            live.update(learning_table(FORMS, reports), refresh=True)

        record = learn_recall(run_dir, RECALL_STEPS, progress)
    out.print(learning_table(FORMS, reports))
    out.print(f"{record['seconds']:.0f} seconds for both")
    return record


def _free_name(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    names = chain([path], (path.with_name(f"{path.name}-{n}") for n in count(2)))
    return next(name for name in names if not name.exists())


def _resume_command(run_dir: Path, options: DemoOptions) -> str:
    words = ["fmem", "demo", "--resume", "--run-dir", str(run_dir)]
    words += ["--steps", str(options.steps)] if options.steps is not None else []
    words += ["--device", options.device] if options.device != "auto" else []
    return shlex.join(words + (["--json"] if options.json else []))


def _corpus_to_resume(run_dir: Path) -> PackedCorpus:
    """The corpus of an interrupted demo. Raises ConfigError if there is none."""
    from factorization_memory.data.shards import PackedCorpus

    if not (run_dir / CORPUS_NAME).is_dir():
        raise ConfigError(f"--run-dir={str(run_dir)!r}: no demo to resume; start one without --resume")
    return PackedCorpus.open(run_dir / CORPUS_NAME)
