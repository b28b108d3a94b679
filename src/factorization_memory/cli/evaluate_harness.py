"""`fmem evaluate [RUN] --harness TASKS`: a trained model on tasks of lm-evaluation-harness."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import TYPE_CHECKING

from factorization_memory.cli.common import at_least, console, emit, load, resolve, say

if TYPE_CHECKING:
    from factorization_memory.cli.evaluate_options import EvaluateOptions


def run(options: EvaluateOptions) -> int:
    """`fmem evaluate` with `--harness`."""
    at_least(options, harness_limit=1, harness_shots=0, harness_batch_size=1)
    from factorization_memory.experiments.evaluation import BUILTIN
    from factorization_memory.models.device import resolve_device
    from factorization_memory.reports.terminal.harness import show_tasks

    run_dir, checkpoint = resolve(options.run)
    if checkpoint is not None and not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no such folder; give a run, checkpoint or exported model")
    resolve_device(options.device, "--device")
    try:
        from factorization_memory.evaluation.harness_tasks import choose_tasks
        from factorization_memory.experiments.harness import evaluate_on_tasks, keep_results
    except ModuleNotFoundError as error:
        raise RuntimeError(str(error)) from error

    # What the harness prints is for people; stdout is for the result.
    with (
        redirect_stdout(sys.stderr),
        ended_by_sigterm(),
        choose_tasks(
            options.harness or (), data=options.harness_data, own_tasks=options.harness_tasks, shots=options.harness_shots
        ) as chosen,
    ):
        model, tokenizer, config = load(checkpoint, options.device)
        result = evaluate_on_tasks(
            chosen,
            model,
            tokenizer,
            config,
            BUILTIN if checkpoint is None else checkpoint.resolve().name,
            limit=options.harness_limit,
            batch_size=options.harness_batch_size,
        )
    show_tasks(result, console())
    if run_dir is not None:
        say(f"results: {keep_results(run_dir, result)}")
    emit(result, options.json)
    return 0


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that temporary files are removed."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
