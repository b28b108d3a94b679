"""What a run ends with: the contents of `result.json`, and what a run that was stopped early tells its user."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from factorization_memory.runs.checkpoint_folder import TrainingState, checkpoint_path

if TYPE_CHECKING:
    from factorization_memory.runs.training_record import RunResult


def run_result(
    state: TrainingState, total_steps: int, signal: str | None, parameters: int, run_dir: Path, checkpoint: Path | None
) -> RunResult:
    """The contents of `result.json`.

    Args:
        state: after the last step.
        total_steps: as configured.
        signal: the one that stopped the run, if any.
        parameters: number of trainable parameters.
        run_dir: the run folder.
        checkpoint: the last one, if any.
    """
    finished = state.step == total_steps and state.observed_step == total_steps
    best = None if state.best_step is None else checkpoint_path(run_dir, state.best_step)
    return {
        "stopped": "finished" if finished else "interrupted",
        "signal": None if finished else signal,
        "steps": state.step,
        "total_steps": total_steps,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens / state.step_seconds if state.step_seconds else None,
        "parameters": parameters,
        "train": state.last_train,
        "evaluation": state.last_evaluation,
        "best_evaluation": state.best_evaluation,
        "checkpoints": {
            name: None if path is None else path.relative_to(run_dir).as_posix()
            for name, path in (("last", checkpoint), ("best", best))
        },
    }


def stopped_early(step: int, total_steps: int, signal: str | None, run_dir: Path, checkpoint: Path | None) -> str:
    """The message of a run that a signal stopped: what is kept of it, and how to resume it."""
    kept = "before the first step, so no checkpoint was saved" if checkpoint is None else f"and saved {checkpoint}"
    return (
        f"{signal}: stopped at step {step} of {total_steps} {kept}. "
        f"Resume with `fmem train --resume {shlex.quote(str(run_dir))}`, or add --resume to the same command"
    )
