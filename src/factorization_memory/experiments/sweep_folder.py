"""Where the runs of a sweep stand, and their record, from the sweep's folder alone.

FOLDER/sweep.json            the runs: id, labels, steps, tokens; in the order of the function
FOLDER/running.json          the process that works in the folder, and the runs under way
FOLDER/record.json           the figures of the runs that are done, for `fmem fit` and `fmem figures`
FOLDER/runs/ID/              a run folder (see runs/names.py), with job.json, log.txt and, after a failure, failure.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

from factorization_memory._files import read_json, read_json_or_none, write_atomic
from factorization_memory.config import ConfigError, RunConfig, from_dict
from factorization_memory.experiments.processes import Failure, Job, Watcher
from factorization_memory.experiments.run_figures import is_finite, seed_record
from factorization_memory.models.device import resolve_device
from factorization_memory.runs.environment import describe_environment
from factorization_memory.runs.names import CONFIG_NAME, METRICS_NAME
from factorization_memory.runs.points import POINTS_VERSION, RECORD_NAME, Point, SweepRecord, make_point
from factorization_memory.runs.training_record import TrainLine

SWEEP_NAME, RUNNING_NAME = "sweep.json", "running.json"
SCHEMA_VERSION = 1
"""Of sweep.json."""


class PlannedRun(TypedDict):
    """An entry of sweep.json."""

    id: str
    title: str
    labels: dict[str, str | int | float]
    steps: int
    tokens: int
    evaluation: dict[str, Any] | None


class RunStatus(TypedDict):
    """Where a run of a sweep stands."""

    id: str
    title: str
    state: str
    """"done", "running", "failed", "diverged", "interrupted" or "waiting"."""
    step: int
    steps: int
    loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    message: str | None
    """Why it failed."""


def sweep_status(folder: Path | str) -> list[RunStatus]:
    """Where the runs of a sweep stand, from its folder alone. Raises ConfigError if the folder has no sweep."""
    running = _running_in(Path(folder))
    return [_status(_job(Path(folder), run), run, run["id"] in running) for run in _planned(Path(folder))]


def sweep_record(folder: Path | str) -> SweepRecord:
    """The figures of all runs that are done and were evaluated. Raises ConfigError if the folder has no sweep."""
    points: list[Point] = []
    diverged, missing = [], []
    for run in _planned(Path(folder)):
        job = _job(Path(folder), run)
        if job.diverged:
            diverged.append(run["title"])
        elif not job.done or run["evaluation"] is None or not is_finite(job):
            missing.append(run["title"])
        else:
            config = read_json(job.folder / CONFIG_NAME)
            farthest = run["evaluation"].get("max_position") or 0
            multiples = [1 << power for power in range(1, (farthest // config["data"]["context_length"]).bit_length())]
            figures = seed_record(dataclasses.replace(job, config=from_dict(RunConfig, config)), Path(folder), multiples)
            points.append(make_point(run["title"], run["id"], run["labels"], config, figures))
    return {
        "schema_version": POINTS_VERSION,
        "environment": describe_environment(resolve_device("auto")),
        "points": points,
        "diverged": diverged,
        "missing": missing,
    }


def write_sweep_record(folder: Path) -> None:
    """Writes `record.json`, if any run is done."""
    record = sweep_record(folder)
    if record["points"] or record["diverged"]:
        write_atomic(folder / RECORD_NAME, json.dumps(record, ensure_ascii=False, allow_nan=False))


def seconds_left(runs: Sequence[RunStatus], planned_tokens: Mapping[str, int]) -> float | None:
    """Time until all runs are done, at the pace of those that are running; None while that is unknown.

    Args:
        runs: from `sweep_status`.
        planned_tokens: tokens of each run, by id.
    """
    pace = sum(run["tokens_per_second"] or 0.0 for run in runs if run["state"] == "running")
    if not pace:
        return None
    open_states = ("running", "interrupted", "waiting", "failed")
    left = sum(planned_tokens[run["id"]] * (1 - run["step"] / run["steps"]) for run in runs if run["state"] in open_states)
    return left / pace


def planned_tokens(folder: Path | str) -> dict[str, int]:
    """Tokens of each run of a sweep, by id."""
    return {planned["id"]: planned["tokens"] for planned in _planned(Path(folder))}


def _planned(folder: Path) -> list[PlannedRun]:
    record = read_json_or_none(folder / SWEEP_NAME)
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(f"folder={folder}: has no sweep; start one with `fmem sweep run`")
    runs: list[PlannedRun] = record["runs"]
    return runs


def _job(folder: Path, planned: PlannedRun) -> Job:
    # Its configuration is not needed to see where it stands.
    return Job(planned["title"], "seed", planned["id"], folder / "runs" / planned["id"], RunConfig(), planned["evaluation"])


def _status(job: Job, planned: PlannedRun, running: bool) -> RunStatus:
    line, result, failure = job.latest(), job.result(), job.failure()
    if running:
        state = "running"
    elif job.diverged:
        state = "diverged"
    elif job.done:
        state = "done"
    elif failure is not None:
        state = "failed"
    else:
        state = "interrupted" if (job.folder / METRICS_NAME).exists() else "waiting"
    held_out = None if result is None else result.get("evaluation")
    return {
        "id": planned["id"],
        "title": planned["title"],
        "state": state,
        "step": planned["steps"] if state == "done" else 0 if line is None else line["step"],
        "steps": planned["steps"],
        "loss": None if line is None else line["loss"],
        "bits_per_byte": None if held_out is None else held_out["bits_per_byte"],
        "tokens_per_second": None if line is None else line["tokens_per_second"],
        "message": failure["message"] if failure is not None and state in ("failed", "diverged") else None,
    }


class RunningNote(Watcher):
    """Keeps running.json while a sweep runs, and passes everything on."""

    def __init__(self, folder: Path, watcher: Watcher) -> None:
        self._path, self._watcher = folder / RUNNING_NAME, watcher
        self._runs: list[str] = []

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)

    def on_start(self, job: Job) -> None:
        self._runs.append(job.label)
        self._write()
        self._watcher.on_start(job)

    def on_progress(self, job: Job, metrics: TrainLine) -> None:
        self._watcher.on_progress(job, metrics)

    def on_end(self, job: Job, failure: Failure | None) -> None:
        if job.label in self._runs:
            self._runs.remove(job.label)
            self._write()
        self._watcher.on_end(job, failure)

    def on_tick(self) -> None:
        self._watcher.on_tick()

    def _write(self) -> None:
        process = {"pid": os.getpid(), "host": platform.node(), "runs": self._runs}
        write_atomic(self._path, json.dumps(process))


def _running_in(folder: Path) -> list[str]:
    """The ids of the runs under way; none if the process that noted them is gone."""
    noted = read_json_or_none(folder / RUNNING_NAME)
    if not isinstance(noted, dict):
        return []
    if noted["host"] == platform.node():
        try:
            os.kill(noted["pid"], 0)
        except ProcessLookupError:
            return []
        except PermissionError:
            pass  # another user's process
    return list(noted["runs"])
