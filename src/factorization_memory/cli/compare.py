"""`fmem compare A B ...`: train models of equal size on the same text, each at its own learning rate, and compare them."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from factorization_memory.cli.common import emit, parse, wide_console
from factorization_memory.config import to_dict
from factorization_memory.experiments.comparison_settings import ComparisonSettings
from factorization_memory.experiments.contenders import split_overrides

if TYPE_CHECKING:
    from rich.console import Console

    from factorization_memory.experiments.plan import Plan

WIDTH = 132
"""Width of the tables without a terminal: six losses with their spreads next to a name."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ComparisonSettings):
    """Compare models on equal terms: as many parameters outside the embedding, the same tokens in the same order, each at the
    best of several learning rates, over several seeds. Text, steps and schedule are those of the first contender. Any field of
    a run set by its flag (`fmem train PRESET --help` lists them) holds for all. The same command goes on where it was stopped.
    """

    contenders: tyro.conf.Positional[tuple[str, ...]]
    dry_run: bool = False
    """Show what would be compared, and exit."""
    train: bool = True
    """Train what is missing; --no-train makes the record from the finished runs alone."""
    json: bool = False
    """Write the result to stdout as JSON."""


def run(arguments: list[str]) -> int:
    """`fmem compare`."""
    rest, overrides = split_overrides(arguments)
    options = parse(CompareOptions, rest, "compare")
    from factorization_memory.experiments.planning import make_plan
    from factorization_memory.models.device import resolve_device

    plan = make_plan(options, overrides)
    if options.train:
        resolve_device(plan.entries[0].config.training.device)
    people = wide_console(WIDTH)
    _show_plan(plan, people)
    if options.dry_run:
        emit(plan.description(), options.json)
        return 0
    from factorization_memory.experiments.comparison import TABLE_NAME, Comparison
    from factorization_memory.experiments.display import Display
    from factorization_memory.reports.terminal.comparison import show_comparison

    comparison = Comparison(
        plan,
        arguments,
        parallel=options.parallel,
        gpus=options.gpus,
        warn=lambda message: people.print(message, markup=False, soft_wrap=True),
    )
    stopped = None
    if options.train:
        record, stopped = comparison.run(lambda ended: Display(people, ended, plan.total_steps))
    else:
        record = comparison.record_without_training()
    show_comparison(record, people)
    emit(record, options.json)
    if stopped is not None:
        people.print(f"stopped by {stopped}; run the same command again to continue", soft_wrap=True)
        return 128 + signal.Signals[stopped].value
    people.print(f"{options.out / TABLE_NAME}", soft_wrap=True)
    return 0 if record["complete"] else 1


def _show_plan(plan: Plan, people: Console) -> None:
    from factorization_memory.reports.comparison_table import change, differing, seeds_text
    from factorization_memory.reports.terminal.tables import table

    first = plan.entries[0].config
    tokens = first.training.steps * first.training.tokens_per_step
    people.print(
        f"{tokens:,} tokens each ({first.training.steps:,} steps, context {first.data.context_length:,}), "
        f"{seeds_text({entry.name: entry.seeds for entry in plan.entries})}; rates searched by {plan.search_steps:,} steps",
        soft_wrap=True,
    )
    shown = table("", "contender", "parameters", "off", "varied", "learning rates")
    for entry in plan.entries:
        varied = ", ".join(change(name, old, new) for name, (old, new) in entry.match.varied.items())
        rates = " ".join(f"{rate:g}" for rate in entry.rates)
        shown.add_row(entry.name, f"{entry.match.parameters:,}", f"{entry.match.difference:+.2%}", varied or "nothing", rates)
    people.print(shown)
    for sentence in differing({entry.name: to_dict(entry.config) for entry in plan.entries}):
        people.print(sentence, markup=False, soft_wrap=True)
