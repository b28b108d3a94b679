"""`python -m factorization_memory.experiments.worker RUN/job.json`: one training of `fmem compare`, in a process of its own.

Trains in the folder of `job.json`, or goes on there, then evaluates the final model as `fmem evaluate` does. Leaves beside the
run's own records `memory.json` (peak memory of the GPU), `evaluation.json` and, where it fails, `failure.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory._files import read_json_or_none, write_atomic
from factorization_memory._streams import prepare_standard_streams
from factorization_memory.runs.names import CHECKPOINTS_NAME, EVALUATION_NAME, FAILURE_NAME, MEMORY_NAME, RESULT_NAME

if TYPE_CHECKING:
    import torch

    from factorization_memory.config import RunConfig


def command(job_file: Path) -> list[str]:
    """The command line that works on a job."""
    return [sys.executable, "-m", __name__, str(job_file)]


def main(job_file: Path) -> int:
    """Work on a job; returns the exit status."""
    try:
        return _work(job_file)  # its imports may fail; this way the error is logged and in failure.json
    except Exception as error:
        traceback.print_exc()
        from factorization_memory.training import TrainingDivergedError

        message = str(error).strip() or type(error).__name__
        failure = {"message": message, "diverged": isinstance(error, TrainingDivergedError), "stopped": False}
        write_atomic(job_file.parent / FAILURE_NAME, json.dumps(failure, ensure_ascii=False))
        return 1


def _work(job_file: Path) -> int:
    import torch

    from factorization_memory.config import RunConfig, from_dict
    from factorization_memory.experiments.processes import is_evaluated
    from factorization_memory.experiments.session import Session
    from factorization_memory.models.device import resolve_device
    from factorization_memory.runs import RunRecord, list_checkpoints
    from factorization_memory.runs.checkpoint_folder import prune_checkpoints
    from factorization_memory.training import RichProgress

    folder = job_file.parent
    job = json.loads(job_file.read_text(encoding="utf-8"))
    config = from_dict(RunConfig, job["config"])
    torch.set_num_threads(job["threads"])
    end_with(job["parent"])
    result = read_json_or_none(folder / RESULT_NAME)
    if result is None or result["stopped"] != "finished":
        result = Session(config, folder, RichProgress()).train(resume=RunRecord(folder).exists)
        device = resolve_device(config.training.device)
        if device.type == "cuda":
            _record_memory(folder, device)
        if result["stopped"] == "interrupted":
            assert result["signal"] is not None
            return 128 + signal.Signals[result["signal"]].value
    if not is_evaluated(folder, job["evaluation"]):
        _evaluate(folder, config, job["evaluation"])
    if job["kind"] == "seed":
        prune_checkpoints(folder, 1, None)
    elif list_checkpoints(folder):
        # For a search or a timing, only the figures matter.
        shutil.rmtree(folder / CHECKPOINTS_NAME)
    return 0


def end_with(parent: int) -> None:
    """Stops as on SIGTERM when the parent process `parent` is gone: if it was killed, it could not stop this one.

    Does nothing if another process started this one, as when run by hand.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.getppid() == parent:
        threading.Thread(target=watch, name="parent", daemon=True).start()


def _record_memory(folder: Path, device: torch.device) -> None:
    """Records the peak memory of the training: the maximum over its parts if it was resumed."""
    import torch

    from factorization_memory.runs.record import write_json

    before = read_json_or_none(folder / MEMORY_NAME) or {}
    peaks = {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
    write_json(folder / MEMORY_NAME, {name: max(peak, before.get(name, 0)) for name, peak in peaks.items()})


def _evaluate(folder: Path, config: RunConfig, options: dict[str, Any]) -> None:
    """Evaluate the last checkpoint."""
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.experiments.evaluation import evaluate_model
    from factorization_memory.models.device import resolve_device
    from factorization_memory.runs import find_checkpoint, load_model
    from factorization_memory.runs.record import write_json

    checkpoint = find_checkpoint(folder, "last")
    model, _, config = load_model(checkpoint, resolve_device(config.training.device))
    corpus = PackedCorpus.open(Path(config.data.corpus))
    record = evaluate_model(model, corpus, config, checkpoint.name, ngram_orders=(), **options)
    write_json(folder / EVALUATION_NAME, record)


if __name__ == "__main__":
    prepare_standard_streams()
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(Path(sys.argv[1])))
    sys.exit(130)
