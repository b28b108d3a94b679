"""`fmem plan PRESET`: size and cost of a run, computed without weights, data or a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from factorization_memory.cli.common import console, emit
from factorization_memory.cli.train import preset_and_options
from factorization_memory.config import RunConfig


@dataclass(frozen=True)
class PlanOptions:
    """What a run would be and cost. Any field of the preset can be overridden by its flag."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    json: bool = False
    """Write the result to stdout as JSON."""


def run(arguments: list[str]) -> int:
    """`fmem plan`."""
    options: PlanOptions = preset_and_options(arguments, "plan", PlanOptions)
    from factorization_memory.experiments.cost import run_cost
    from factorization_memory.reports.terminal.cost import show_cost

    result = run_cost(options.config)
    show_cost(result, console())
    emit(result, options.json)
    return 0
