"""`fmem evaluate [RUN] --harness TASKS`: a trained model on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from factorization_memory._files import write_atomic
from factorization_memory.cli.common import at_least, console, emit, load, resolve, say
from factorization_memory.runs.names import HARNESS_NAME

if TYPE_CHECKING:
    from factorization_memory.cli.evaluate_options import EvaluateOptions


def run(options: EvaluateOptions) -> int:
    """`fmem evaluate` with `--harness`."""
    at_least(options, harness_limit=1, harness_shots=0, harness_batch_size=1)
    from factorization_memory.models.device import autocast, resolve_device

    run_dir, checkpoint = resolve(options.run)
    if checkpoint is not None and not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no such folder; give that of a run, of a checkpoint or of an exported model")
    device = resolve_device(options.device, "--device")
    try:
        from factorization_memory.evaluation.harness_tasks import choose_tasks, run_tasks
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
        # On a CPU in float32, as the harness's own adapter has it, whatever the model was trained in.
        halved = device.type == "cuda" and config.training.precision != "float32"
        arithmetic = replace(config.training, precision="bfloat16" if halved else "float32")
        with autocast(arithmetic, device):
            record = run_tasks(chosen, model, tokenizer, limit=options.harness_limit, batch_size=options.harness_batch_size)
    result = {
        "checkpoint": "builtin" if checkpoint is None else checkpoint.resolve().name,
        "device": str(device),
        "precision": arithmetic.precision,
        **record,
    }
    show(result)
    if run_dir is not None:
        write_atomic(run_dir / HARNESS_NAME, json.dumps(result, ensure_ascii=False, allow_nan=False, indent=1))
        say(f"results: {run_dir / HARNESS_NAME}")
    emit(result, options.json)
    return 0


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the process as an exception does, so that temporary files go."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show(result: dict[str, Any]) -> None:
    """The results as a table on stderr."""
    from rich.table import Column, Table

    columns = [Column(name, no_wrap=True) for name in ("n", "shots", "metric", "value", "± error")]
    table = Table(Column("task", overflow="fold"), *columns)
    for part in ("groups", "tasks"):
        for name, entry in result[part].items():
            first = [name, *(("", "") if part == "groups" else (str(entry["examples"]), str(entry["shots"])))]
            for metric, found in entry["metrics"].items():
                table.add_row(*first, metric, _short(found["value"]), _short(found["stderr"]))
                first = ["", "", ""]
    console().print(table)


def _short(value: float | None) -> str:
    """Four digits behind the point, unless a perplexity is that of a model that knows nothing."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
