"""Evaluates a trained model on lm-evaluation-harness tasks (it must be installed), for its run's `harness.json`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory._files import write_atomic
from factorization_memory.evaluation.harness_tasks import ChosenTasks, run_tasks
from factorization_memory.models.device import autocast
from factorization_memory.runs.names import HARNESS_NAME

if TYPE_CHECKING:
    from factorization_memory.config import RunConfig
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel


def evaluate_on_tasks(
    chosen: ChosenTasks,
    model: LanguageModel,
    tokenizer: Tokenizer,
    config: RunConfig,
    checkpoint: str,
    *,
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """`run_tasks` in the precision of the run that `config` is of; the record says of which `checkpoint`, and where.

    On a CPU it uses float32, as the harness's own adapter does, whatever precision the model was trained in.
    """
    device = next(model.parameters()).device
    halved = device.type == "cuda" and config.training.precision != "float32"
    arithmetic = replace(config.training, precision="bfloat16" if halved else "float32")
    with autocast(arithmetic, device):
        record = run_tasks(chosen, model, tokenizer, limit=limit, batch_size=batch_size)
    return {"checkpoint": checkpoint, "device": str(device), "precision": arithmetic.precision, **record}


def keep_results(run_dir: Path, record: dict[str, Any]) -> Path:
    """Saves the record in its run folder, replacing any earlier one; returns the file."""
    path = run_dir / HARNESS_NAME
    write_atomic(path, json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1))
    return path
