"""`fmem sweep plan|run|status`: many runs from one Python function."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from factorization_memory.cli.common import emit, parse, wide_console
from factorization_memory.config import ConfigError


@dataclass(frozen=True)
class Plan:
    """Runs, tokens, FLOPs, time and disk of a sweep, without starting it."""

    sweep: tyro.conf.Positional[str]
    """FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, a function that yields RunConfig or SweepRun."""
    out: Path
    """Folder of the sweep; what is done there is not counted again."""
    json: bool = False
    """Write the result to stdout as one JSON line."""


@dataclass(frozen=True)
class Run:
    """Run what is not done yet. The same command goes on where it was stopped, also after the function has gained runs."""

    sweep: tyro.conf.Positional[str]
    """FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, a function that yields RunConfig or SweepRun."""
    out: Path
    """Folder of the sweep."""
    parallel: int = 1
    """Runs at the same time."""
    gpus: int = 1
    """GPUs that they are shared out over."""
    retries: int = 1
    """How often a run that failed is started again."""
    json: bool = False
    """Write the states of the runs to stdout as one JSON line."""


@dataclass(frozen=True)
class Status:
    """Where the runs of a sweep stand, from its folder alone: also while it runs."""

    folder: tyro.conf.Positional[Path]
    """Folder of the sweep."""
    every: float | None = None
    """Show it again every so many seconds, until no run is running."""
    json: bool = False
    """Write the states of the runs to stdout as one JSON line."""


Options = (
    Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Status, tyro.conf.subcommand("status")]
)


def run(arguments: list[str]) -> int:
    """`fmem sweep` with `arguments`; returns the exit status: 1 if a run has failed."""
    options: Plan | Run | Status = parse(Options, arguments, "sweep")  # type: ignore[arg-type]
    if isinstance(options, Status):
        return _status(options)
    from factorization_memory.experiments.display import Display
    from factorization_memory.experiments.sweep import Sweep, load_sweep
    from factorization_memory.reports.terminal.sweep import show_sweep_plan, sweep_table

    sweep, people = Sweep(load_sweep(options.sweep), options.out), wide_console()
    plan = sweep.plan()
    show_sweep_plan(plan, people)
    if isinstance(options, Plan):
        emit(plan, options.json)
        return 0
    steps = sum(each.config.training.steps for each in sweep.runs.values())
    states, stopped = sweep.run(
        parallel=options.parallel,
        gpus=options.gpus,
        retries=options.retries,
        show=lambda: Display(people, total_steps=steps),
    )
    people.print(sweep_table(states, None))
    emit(states, options.json)
    if stopped is not None:
        people.print(f"stopped by {stopped}; the same command goes on from there", soft_wrap=True)
        return 128 + signal.Signals[stopped].value
    return 0 if all(state["state"] in ("done", "diverged") for state in states) else 1


def _status(options: Status) -> int:
    from factorization_memory.experiments.sweep_folder import planned_tokens, seconds_left, sweep_status
    from factorization_memory.reports.terminal.sweep import sweep_table

    if options.every is not None and not options.every > 0:
        raise ConfigError(f"every={options.every}: use a number of seconds above 0")
    people = wide_console()
    while True:
        states = sweep_status(options.folder)
        people.print(sweep_table(states, seconds_left(states, planned_tokens(options.folder))))
        if options.every is None or not any(state["state"] == "running" for state in states):
            break
        time.sleep(options.every)
    emit(states, options.json)
    return 1 if any(state["state"] == "failed" for state in states) else 0
