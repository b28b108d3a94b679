"""A sweep: many runs from one Python function, each in a folder named by the hash of its configuration.

    def grid():
        for rate in (3e-3, 6e-3, 1.2e-2):
            for seed in range(3):
                config = PRESETS["tiny"]()
                ...
                yield SweepRun(config, labels={"rate": rate, "seed": seed})

    sweep = Sweep(load_sweep("experiments/rates.py:grid"), "sweeps/rates")
    sweep.plan()                 what it will cost; nothing is started
    sweep.run(parallel=4)        as processes, side by side
    sweep_status("sweeps/rates") from the folder alone, also while it runs (sweep_folder.py)

What is finished is never run again, whatever else the sweep has gained since; what was interrupted goes on from its last
checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch

from factorization_memory._files import write_atomic
from factorization_memory.config import ConfigError, RunConfig, to_dict
from factorization_memory.data.shards import PackedCorpus
from factorization_memory.experiments.comparison import threads, visible_gpus
from factorization_memory.experiments.cost import run_cost
from factorization_memory.experiments.processes import Job, Watcher, run_jobs
from factorization_memory.experiments.session import with_absolute_paths
from factorization_memory.experiments.sweep_folder import (
    SCHEMA_VERSION,
    SWEEP_NAME,
    PlannedRun,
    RunningNote,
    RunStatus,
    sweep_status,
    write_sweep_record,
)
from factorization_memory.experiments.worker import command
from factorization_memory.runs import RunLock
from factorization_memory.training.guard import GracefulStop

ID_LENGTH = 16
"""Hexadecimal digits of a run's id."""
BYTES_PER_PARAMETER = 12
"""Of the one checkpoint that a finished run keeps: weights and two moments in float32."""


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep."""

    config: RunConfig
    labels: Mapping[str, str | int | float] = field(default_factory=dict)
    """What tells it from the others, for tables and figures; not part of its id."""
    evaluation: Mapping[str, Any] | None = None
    """Options of `evaluate_model` for the trained model; None evaluates nothing."""

    @property
    def title(self) -> str:
        """Its labels, or the preset's name."""
        return ", ".join(f"{name}={value}" for name, value in self.labels.items()) or self.config.name


class SweepPlan(TypedDict):
    """What a sweep costs before it starts: totals over the runs that are not done."""

    runs: int
    done: int
    tokens: int
    train_flops: int
    seconds: float | None
    """One run at a time, by the last `fmem bench training` of this machine; None without one."""
    disk_bytes: int


def load_sweep(spec: str) -> list[SweepRun]:
    """The runs that a function yields, named FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION. Raises ConfigError if there is no
    such function, or if it yields something else."""
    place, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise ConfigError(f"sweep={spec!r}: write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, FileNotFoundError) as error:
        raise ConfigError(f"sweep={spec!r}: cannot be imported ({error})") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"sweep={spec!r}: {place} has no function {name}")
    runs = []
    for made in function():
        if not isinstance(made, SweepRun | RunConfig):
            raise ConfigError(f"sweep={spec!r}: yields a {type(made).__name__}; yield a RunConfig or a SweepRun")
        runs.append(made if isinstance(made, SweepRun) else SweepRun(made))
    return runs


class Sweep:
    """The runs of a sweep, in a folder. Raises ConfigError if there are none, or if two are the same; CorpusError if one's text
    is not packed."""

    def __init__(self, runs: Iterable[SweepRun], folder: Path | str) -> None:
        self.folder = Path(folder)
        self.runs: dict[str, SweepRun] = {}
        fingerprints: dict[str, str] = {}
        for run in runs:
            run = dataclasses.replace(run, config=with_absolute_paths(run.config))
            corpus = run.config.data.corpus
            if corpus not in fingerprints:
                fingerprints[corpus] = PackedCorpus.open(Path(corpus)).fingerprint
            run_id = _id(run, fingerprints[corpus])
            if run_id in self.runs:
                raise ConfigError(f"sweep: {self.runs[run_id].title} and {run.title} have the same configuration; drop one")
            self.runs[run_id] = run
        if not self.runs:
            raise ConfigError("sweep: its function yields no run; yield at least one")

    def plan(self) -> SweepPlan:
        """What is still to be done, and what it takes."""
        jobs = self._jobs()
        waiting = [job for job in jobs if not job.done]
        costs = [run_cost(job.config) for job in waiting]
        times = [cost["time"]["seconds"] if cost["time"] is not None else None for cost in costs]
        return {
            "runs": len(jobs),
            "done": len(jobs) - len(waiting),
            "tokens": sum(cost["tokens"] for cost in costs),
            "train_flops": sum(cost["train_flops"] for cost in costs),
            "seconds": None if None in times else sum(time for time in times if time is not None),
            "disk_bytes": sum(BYTES_PER_PARAMETER * cost["parameters"]["total"] for cost in costs),
        }

    def run(
        self,
        *,
        parallel: int = 1,
        gpus: int = 1,
        retries: int = 1,
        show: Callable[[], AbstractContextManager[Watcher]] = lambda: nullcontext(Watcher()),
    ) -> tuple[list[RunStatus], str | None]:
        """Runs whatever is not done; returns the state of all runs, and the signal that stopped the work, if any.

        Args:
            parallel: runs at the same time.
            gpus: GPUs to share out over them.
            retries: how often a run that failed is started again. One that diverged is not.
            show: makes the watcher of the runs.

        Raises RunLockedError if another process is working in the folder.
        """
        for name, value, least in (("parallel", parallel, 1), ("gpus", gpus, 1), ("retries", retries, 0)):
            if value < least:
                raise ConfigError(f"{name}={value}: use {least} or more")
        with RunLock(self.folder):
            write_atomic(self.folder / SWEEP_NAME, json.dumps(self._description(), ensure_ascii=False, indent=1))
            with GracefulStop() as stop, show() as shown, RunningNote(self.folder, shown) as watcher:
                for _ in range(1 + retries):
                    jobs = [job for job in self._jobs() if not job.done]
                    if not jobs or stop.requested:
                        break
                    run_jobs(
                        jobs,
                        command,
                        parallel=parallel,
                        threads=threads(torch.get_num_threads(), parallel),
                        gpus=visible_gpus(gpus),
                        stop=lambda: stop.requested,
                        watcher=watcher,
                    )
                stopped = stop.requested
            write_sweep_record(self.folder)
        return sweep_status(self.folder), stopped

    def _jobs(self) -> list[Job]:
        return [
            Job(
                run.title,
                "seed",
                run_id,
                self.folder / "runs" / run_id,
                run.config,
                None if run.evaluation is None else dict(run.evaluation),
            )
            for run_id, run in self.runs.items()
        ]

    def _description(self) -> dict[str, Any]:
        planned: list[PlannedRun] = [
            {
                "id": run_id,
                "title": run.title,
                "labels": dict(run.labels),
                "steps": run.config.training.steps,
                "tokens": run.config.training.steps * run.config.training.tokens_per_step,
                "evaluation": None if run.evaluation is None else dict(run.evaluation),
            }
            for run_id, run in self.runs.items()
        ]
        return {"schema_version": SCHEMA_VERSION, "runs": planned}


def _id(run: SweepRun, corpus: str) -> str:
    """Hash of a run's configuration and evaluation, in which the text is named by its fingerprint, not by its folder."""
    config = to_dict(run.config)
    config["data"] = config["data"] | {"corpus": corpus}
    content = {"config": config, "evaluation": None if run.evaluation is None else dict(run.evaluation)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:ID_LENGTH]


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
