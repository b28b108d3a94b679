"""`fmem demo`: the whole road, from two books to a report, on the texts that come with the package."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory._streams import best_effort
from factorization_memory.cli import evaluate, generate, train
from factorization_memory.cli.common import console, emit, interrupted_status, parse, say, write_aside
from factorization_memory.config import ConfigError
from factorization_memory.presets import demo
from factorization_memory.runs.names import INSPECTION_NAME, RECALL_DEMO_NAME, REPORT_NAME, SAMPLES_NAME

if TYPE_CHECKING:
    from rich.console import Console

    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.evaluation import RecallProgress

RUN_DIR = Path("runs/demo")
PROMPTS = ("“My dear Watson,” said", "おれは")
VOCABULARY = 512
HELD_OUT = 0.1
RECALL_STEPS = 100
INSPECTED_CHARACTERS = {"en": 900, "ja": 450}


@dataclass(frozen=True)
class DemoOptions:
    """Train a small model on one English and one Japanese book (about two minutes on two cores), evaluate it, let it write,
    show two still smaller ones learning to recall, and leave a run folder with plots and a report. Uses the GPU where there is
    one."""

    run_dir: Path | None = None
    """Run folder; by default runs/demo, or (without --resume) the next name that is free."""
    resume: bool = False
    """Go on with a demo that was stopped: its corpus, its last checkpoint, the same --steps."""
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
    corpus = _packed(run_dir) if options.resume else _corpus(run_dir / "corpus")
    for name, source in corpus.sources.items():
        parts = ", ".join(f"{part} {len(s.tokens):,} tokens of {s.text_bytes:,} bytes" for part, s in source.splits.items())
        out.print(f"{name}: {parts}")

    out.rule("[bold]2  training")
    config = demo()
    training = dataclasses.replace(
        config.training, device=options.device, steps=config.training.steps if options.steps is None else options.steps
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=str(corpus.folder)), training=training)
    result = train.train(config, run_dir, options.resume)
    if result["stopped"] == "interrupted":
        emit({"run_dir": str(run_dir), "training": result}, options.json)
        say(f"stopped by {result['signal']}; to go on: {_resume_command(run_dir, options)}")
        return interrupted_status(result)

    from factorization_memory.evaluation import inspect_text
    from factorization_memory.models.device import resolve_device
    from factorization_memory.runs import find_checkpoint, load_model

    checkpoint = find_checkpoint(run_dir, "best")
    model, tokenizer, config = load_model(checkpoint, resolve_device(options.device, "--device"))
    out.rule("[bold]3  evaluation on the held-out end of each book")
    evaluation = evaluate.evaluate(model, corpus, config, checkpoint.name, stretches=4)
    evaluate.show(evaluation)

    out.rule("[bold]4  writing")
    samples = []
    for prompt in PROMPTS:
        sampling = generate.SamplingConfig(temperature=0.7, min_p=0.05)
        samples += generate.stream(model, tokenizer, prompt, to=best_effort(sys.stderr), max_tokens=100, sampling=sampling)
    write_aside(run_dir / SAMPLES_NAME, json.dumps(samples, ensure_ascii=False, indent=1))
    text = "\n\n".join(_held_out_text(corpus, name)[:length] for name, length in INSPECTED_CHARACTERS.items())
    write_aside(run_dir / INSPECTION_NAME, json.dumps(inspect_text(model, tokenizer, text), ensure_ascii=False))

    out.rule("[bold]5  recall: two small models learn to name the value behind a key")
    recall = _recall(out)
    write_aside(run_dir / RECALL_DEMO_NAME, json.dumps(recall, ensure_ascii=False, allow_nan=False))

    out.rule("[bold]6  report")
    evaluate.record_evaluation(run_dir, evaluation)
    say("what to do next:")
    say(f"  open {run_dir / REPORT_NAME} in a browser")
    say(f"  {shlex.join(['fmem', 'generate', str(run_dir), '--prompt', PROMPTS[0]])}")
    say("  fmem data pack TEXTS --output CORPUS     (your own texts; then fmem train demo --data.corpus CORPUS)")
    record = {"training": result, "evaluation": evaluation, "samples": samples, "recall": recall}
    emit({"run_dir": str(run_dir), **record}, options.json)
    return 0


def _recall(out: Console) -> dict[str, Any]:
    """The recall demonstration's record; how far both models have come is shown as they learn."""
    from rich.live import Live
    from rich.table import Table

    from factorization_memory.evaluation.recall_demo import FORMS, recall_demo

    out.print("the same sequences and sizes; they differ in update_lag alone. Share of values named right in new sequences:")
    reports: list[dict[str, RecallProgress]] = []

    def table() -> Table:
        shown = Table("steps", *(f"{name} (update_lag={lag})" for name, lag in FORMS.items()))
        for number, report in enumerate(reports, start=1):
            # The first reports, ever fewer later ones, and the last.
            if number & (number - 1) == 0 or number == len(reports):
                step = next(iter(report.values())).step
                shown.add_row(str(step), *(_bar(report[name].accuracy) for name in FORMS))
        return shown

    with Live(table(), console=out, auto_refresh=False, transient=True) as live:

        def progress(report: dict[str, RecallProgress]) -> None:
            reports.append(report)
            live.update(table(), refresh=True)

        record = recall_demo(RECALL_STEPS, progress=progress)
    out.print(table())
    out.print(f"{record['seconds']:.0f} seconds for both")
    return record


def _bar(share: float, width: int = 20) -> str:
    return f"{'█' * round(width * share):·<{width}} {share:4.0%}"


def _free_name(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    names = chain([path], (path.with_name(f"{path.name}-{n}") for n in count(2)))
    return next(name for name in names if not name.exists())


def _resume_command(run_dir: Path, options: DemoOptions) -> str:
    words = ["fmem", "demo", "--resume", "--run-dir", str(run_dir)]
    words += ["--steps", str(options.steps)] if options.steps is not None else []
    words += ["--device", options.device] if options.device != "auto" else []
    return shlex.join(words + (["--json"] if options.json else []))


def _packed(run_dir: Path) -> PackedCorpus:
    """The corpus of a demo that was stopped."""
    from factorization_memory.data.shards import PackedCorpus

    if not (run_dir / "corpus").is_dir():
        raise ConfigError(f"--run-dir={str(run_dir)!r}: there is no demo here to resume; start one without --resume")
    return PackedCorpus.open(run_dir / "corpus")


def _corpus(folder: Path) -> PackedCorpus:
    """The two books, packed with a tokenizer trained on the part that is not held out."""
    from factorization_memory.data.corpora import builtin_corpus, read_documents
    from factorization_memory.data.shards import pack
    from factorization_memory.data.tokenizer import Tokenizer

    books = list(read_documents(builtin_corpus()))
    # A little less than the training part: in these two books the held-out end begins after it.
    texts = [book.text[: int(len(book.text) * (1 - 1.2 * HELD_OUT))] for book in books]
    tokenizer: Tokenizer = Tokenizer.train(texts, VOCABULARY)
    return pack([(None, builtin_corpus())], tokenizer, folder, holdout="tail", holdout_fraction=HELD_OUT)


def _held_out_text(corpus: PackedCorpus, source: str) -> str:
    split = corpus.sources[source].splits["validation"]
    whole = corpus.tokenizer.stream()  # not a part of the character at the cut
    return "".join(whole.push(token) for token in split.tokens[:4096].tolist()).strip()
