"""Finds, reads, validates and removes the checkpoints of a run and their `state.json`.

The contents of a checkpoint are in checkpoint.py.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from factorization_memory._files import JSONError, explain_unreadable, read_json
from factorization_memory.config import ConfigError, RunConfig, from_dict
from factorization_memory.runs.names import CHECKPOINTS_NAME, STATE_NAME
from factorization_memory.runs.training_record import EvaluationLine, TrainLine

FORMAT_VERSION = 1
FOLDER_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that is missing, is damaged, does not fit or cannot be written; the message says which, and the remedy."""


class DamagedError(CheckpointError):
    """An unreadable checkpoint; another of the same run may be readable."""


class NotFiniteError(CheckpointError):
    """A checkpoint not written because it would contain NaN or infinite numbers; `what` says which."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: not saved, as {what}")
        self.what = what


@dataclass
class TrainingState:
    """Progress of a run after a step: plain numbers, stored in `state.json`."""

    step: int = 0
    """Optimizer steps done; also the position in the data, whose order is a function of the step."""
    tokens: int = 0
    """Tokens read."""
    seconds: float = 0.0
    """Wall-clock time of the run over all its parts, including evaluations and checkpoints."""
    step_seconds: float = 0.0
    """The part of it spent in steps, including waiting for data."""
    observed_step: int = 0
    """Last step whose evaluation, routing and samples, if due, are done."""
    best_step: int | None = None
    """Step of the evaluation with the fewest bits per byte."""
    interval: dict[str, float] = field(default_factory=dict)
    """Sums since the last line of the log."""
    last_train: TrainLine | None = None
    last_evaluation: EvaluationLine | None = None
    best_evaluation: EvaluationLine | None = None


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step`."""
    return run_dir / CHECKPOINTS_NAME / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_dir / CHECKPOINTS_NAME
    with explain_unreadable(folder):
        found = [path for path in folder.iterdir() if FOLDER_NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    match = FOLDER_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def prune_checkpoints(run_dir: Path, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and that of `best_step`, and leftovers of interrupted writes."""
    paths = list_checkpoints(run_dir)
    for path in paths[: max(0, len(paths) - keep)]:
        if step_of(path) != best_step:
            # Rename first, so that an interrupted removal leaves nothing that looks complete.
            doomed = path.with_name(path.name + ".partial")
            path.rename(doomed)
            remove(doomed)
    folder = run_dir / CHECKPOINTS_NAME
    for replaced in folder.glob("*.replaced"):
        whole = replaced.with_name(replaced.name.split(".")[0])
        if not whole.exists():  # a write was killed after the old one was moved aside
            replaced.rename(whole)
    for leftover in chain(folder.glob("*.partial"), folder.glob("*.replaced")):
        remove(leftover)


def find_checkpoint(run_dir: Path, which: str = "best") -> Path:
    """The checkpoint of a run named by `which`: "last", "best" by its evaluations (the last if there are none), "step-N".

    Raises `CheckpointError` if it does not exist, listing those that do.
    """
    paths = list_checkpoints(run_dir)
    if not paths:
        raise CheckpointError(f"{run_dir}: no checkpoint here; give the folder of a run that was trained")
    if which == "last":
        return paths[-1]
    steps = {step_of(path): path for path in paths}
    if which == "best":
        return _best(paths)
    number = which.removeprefix("step-")
    if number.isascii() and number.isdigit() and int(number) in steps:
        return steps[int(number)]
    present = ", ".join(path.name for path in paths)
    raise CheckpointError(f"{run_dir}: no checkpoint {which!r}; use 'best', 'last' or one of {present}")


def _best(paths: list[Path]) -> Path:
    """The best checkpoint, as recorded in the newest readable one."""
    first: CheckpointError | None = None
    for path in reversed(paths):
        try:
            best = read_state(path)["state"]["best_step"]
        except DamagedError as error:
            first = first or error
            continue
        found = next((each for each in paths if step_of(each) == best), path)
        if first is not None:
            warnings.warn(f"{first}. Using {found.name}, the best according to {path.name}", stacklevel=3)
        return found
    assert first is not None
    raise first


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`. Raises `CheckpointError` if it is missing, damaged or of a newer version."""
    try:
        record: dict[str, Any] = read_json(path / STATE_NAME)
        version = record["format_version"]
    except FileNotFoundError:
        raise DamagedError(f"{path}: no checkpoint here ({STATE_NAME} is missing); {present(path)}") from None
    except JSONError as error:
        raise DamagedError(f"{path / STATE_NAME}: damaged or cut short ({error.reason}); {present(path)}") from None
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path / STATE_NAME}: damaged or cut short ({error}); {present(path)}") from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r} is newer than this package reads ({FORMAT_VERSION}); "
            "upgrade factorization-memory"
        )
    wrong = _first_wrong_field(record)
    if wrong is not None:
        raise DamagedError(f"{path / STATE_NAME}: {wrong}; the file is damaged or was edited; {present(path)}")
    return record


_TEXT, _OBJECT, _WHOLE, _NUMBER = (str,), (dict,), (int,), (int, float)
_NOTHING = type(None)
_RECORD_FIELDS: dict[str, tuple[type, ...]] = {
    "format_version": _WHOLE,
    "state": _OBJECT,
    "config": _OBJECT,
    "tokenizer_fingerprint": _TEXT,
    "corpus_fingerprint": _TEXT,
    "random": _OBJECT,
    "carried": (list, _NOTHING),
}
_STATE_FIELDS: dict[str, tuple[type, ...]] = {
    "step": _WHOLE,
    "tokens": _WHOLE,
    "seconds": _NUMBER,
    "step_seconds": _NUMBER,
    "observed_step": _WHOLE,
    "best_step": (int, _NOTHING),
    "interval": _OBJECT,
    "last_train": (dict, _NOTHING),
    "last_evaluation": (dict, _NOTHING),
    "best_evaluation": (dict, _NOTHING),
}


def _first_wrong_field(record: dict[str, Any]) -> str | None:
    """The first field of `state.json` that is missing, unknown or of the wrong type; None if all are valid."""
    wrong = _wrong_field("", record, _RECORD_FIELDS) or wrong_state_field(record["state"])
    return wrong or (None if "cpu" in record["random"] else "the field 'random.cpu' is missing")


def wrong_state_field(state: dict[str, Any]) -> str | None:
    """The first field of a `TrainingState` that is missing, unknown or of the wrong type; None if all are valid."""
    wrong = _wrong_field("state.", state, _STATE_FIELDS)
    return wrong or (f"the field 'state.step' cannot be {state['step']!r}" if state["step"] < 0 else None)


def _wrong_field(prefix: str, values: dict[str, Any], fields: Mapping[str, tuple[type, ...]]) -> str | None:
    for name in sorted(fields.keys() | values.keys()):
        if name not in values:
            return f"the field {prefix + name!r} is missing"
        if name not in fields:
            return f"the field {prefix + name!r} is unknown"
        if not isinstance(values[name], fields[name]):
            return f"the field {prefix + name!r} cannot be {values[name]!r}"
    return None


def read_run_config(record: dict[str, Any], path: Path) -> RunConfig:
    """The configuration in the `state.json` of the checkpoint at `path`. Raises `CheckpointError` if it is invalid."""
    try:
        return from_dict(RunConfig, record["config"])
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / STATE_NAME}: unreadable configuration ({error}); {present(path)}") from None


def present(path: Path) -> str:
    """Describes what to use instead of the checkpoint at `path`."""
    others = [other.name for other in list_checkpoints(path.parent.parent) if other.name != path.name]
    if not others:
        return "the run has no other checkpoint; restore it, or start again in another folder"
    listed = f"other checkpoints: {', '.join(others)}"
    return f"{listed}; delete the folder {path} to make --resume continue from {others[-1]}" if path.is_dir() else listed


def remove(folder: Path) -> None:
    """Removes a folder if it exists; for a link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
