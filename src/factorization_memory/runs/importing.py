"""Imports a model in Hugging Face's layout as a run folder."""

from __future__ import annotations

from pathlib import Path

from factorization_memory._files import atomic_folder
from factorization_memory.config import to_dict
from factorization_memory.runs.checkpoint import save_checkpoint
from factorization_memory.runs.checkpoint_folder import CheckpointError, TrainingState
from factorization_memory.runs.exported import known_training, read_exported
from factorization_memory.runs.loading import is_own
from factorization_memory.runs.names import CONFIG_NAME, ENVIRONMENT_NAME, SOURCES_NAME, TOKENIZER_NAME
from factorization_memory.runs.record import write_json


def import_model(folder: Path | str, run_dir: Path | str) -> Path:
    """Creates a run folder from a model in Hugging Face's layout, to be used like any other, but not resumed.

    For models that `export_run` did not write, or that were trained further since, the run's configuration has the current
    fields of the model, and those of data and training that are known.

    Returns:
        The checkpoint's folder.

    Raises:
        FormatError: there is no such model, or it is damaged.
        FileExistsError: `run_dir` exists and is not empty.
    """
    folder, run_dir = Path(folder), Path(run_dir).absolute()
    if is_own(folder):
        raise CheckpointError(f"{folder}: already a run, or part of one; use it as it is, or `fmem export` it")
    if run_dir.is_symlink() or (run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir()))):
        raise FileExistsError(f"{run_dir}: exists and is not empty; choose another run folder")
    model, tokenizer, config = read_exported(folder)
    record = known_training(folder)
    with atomic_folder(run_dir) as aside:
        try:
            checkpoint = save_checkpoint(
                aside,
                model=model,
                optimizer=None,
                config=config,
                state=TrainingState(**record.get("state", {})),
                tokenizer_fingerprint=tokenizer.fingerprint,
                corpus_fingerprint=record.get("corpus_fingerprint", ""),
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"{run_dir}: the model could not be written ({error.__cause__}), and nothing was kept; free space or grant "
                "access, or choose another folder"
            ) from error
        for name, key in ((ENVIRONMENT_NAME, "environment"), (SOURCES_NAME, "sources")):
            if record.get(key):
                write_json(aside / name, record[key])
        tokenizer.save(aside / TOKENIZER_NAME)
        write_json(aside / CONFIG_NAME, to_dict(config))
        place = checkpoint.relative_to(aside)
    return run_dir / place
