"""`fmem compare A B ...`: train models of equal size on the same text, each at its own learning rate, and compare them."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory.cli.common import emit, parse, plain, write_aside
from factorization_memory.cli.compare_display import Display
from factorization_memory.cli.compare_plan import CompareOptions, check, make_plan
from factorization_memory.cli.tables import table, wide_console
from factorization_memory.config import ConfigError, to_dict
from factorization_memory.experiments.contenders import split_overrides
from factorization_memory.experiments.worker import command

if TYPE_CHECKING:
    from rich.console import Console

    from factorization_memory.experiments.compare import Plan
    from factorization_memory.experiments.processes import Job

PLAN_NAME, RECORD_NAME, TABLE_NAME, FIGURE_NAME = "plan.json", "compare.json", "compare.md", "compare.png"
WIDTH = 132
"""Of the tables where nobody's terminal sets it: six losses with their spreads beside a name."""


def run(arguments: list[str]) -> int:
    """`fmem compare`."""
    rest, overrides = split_overrides(arguments)
    options = parse(CompareOptions, rest, "compare")
    check(options, overrides)
    plan = make_plan(options, overrides)
    people = wide_console()
    if not people.is_terminal:
        people.width = max(people.width, WIDTH)
    _show_plan(plan, people)
    if options.dry_run:
        emit(plan.description(), options.json)
        return 0
    from factorization_memory.runs import RunLock

    if not options.train and not (plan.folder / PLAN_NAME).exists():
        raise ConfigError(f"--out={plan.folder}: holds no comparison to make a record of; leave --no-train out to begin one")
    with RunLock(plan.folder):
        more = _keep_plan(plan)
        started, stopped = _work(plan, options, arguments, people) if options.train else (0, None)
        record = _record(plan, options, arguments, changed=more or started > 0 or not options.train)
    _show_record(record, people)
    emit(record, options.json)
    if stopped is not None:
        import signal

        people.print(f"stopped by {stopped}; the same command goes on from there", soft_wrap=True)
        return 128 + signal.Signals[stopped].value
    people.print(f"{options.out / TABLE_NAME}", soft_wrap=True)
    return 0 if record["complete"] else 1


def _keep_plan(plan: Plan) -> bool:
    """Write the plan, or see that the folder holds it or one that it goes on from; returns whether it was written."""
    from factorization_memory._files import read_json_or_none
    from factorization_memory.experiments.compare import first_difference, part_to_keep, with_defaults

    path = plan.folder / PLAN_NAME
    # Through JSON, which knows lists alone.
    own = json.loads(json.dumps(plan.description()))
    if path.exists():
        kept = _begun(with_defaults(read_json_or_none(path)), plan)
        difference = first_difference(kept, part_to_keep(kept, own))
        if difference is not None:
            name, old, new = difference
            raise ConfigError(
                f"--out={plan.folder}: holds another comparison, with {name or 'a plan'} = {_brief(old)} where this one has "
                f"{_brief(new)}; choose another folder, or repeat its command (with more contenders or seeds, if you like; "
                "one whose folder in runs/ is deleted may be left out)"
            )
        if first_difference(kept, own) is None:
            return False
    write_aside(path, json.dumps(own, ensure_ascii=False, indent=1))
    return True


def _begun(kept: Any, plan: Plan) -> Any:
    """The plan that a folder holds without the contenders and seeds that have no folder there: of these nothing can be lost."""
    from factorization_memory.experiments.compare import is_plan, slug

    if not is_plan(kept):
        return kept
    contenders = {}
    for name, contender in kept["contenders"].items():
        runs = plan.folder / "runs" / slug(name)
        if runs.exists():
            contenders[name] = contender | {"seeds": [seed for seed in contender["seeds"] if (runs / f"seed-{seed}").exists()]}
    every = {str(seed) for contender in contenders.values() for seed in contender["seeds"]}
    order = {seed: digest for seed, digest in kept["order"].items() if seed in every}
    return kept | {"contenders": contenders, "order": order}


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


def _work(plan: Plan, options: CompareOptions, arguments: list[str], people: Console) -> tuple[int, str | None]:
    """Run what is not done yet; returns the number of processes started, and the signal that stopped it. The record is
    written whenever a training of a seed has ended, so that what is there can be read whatever happens to the others."""
    import torch

    from factorization_memory.experiments.processes import run_jobs
    from factorization_memory.training.guard import GracefulStop

    started = 0
    gpus = visible_gpus(options.gpus)

    def keep(job: Job) -> None:
        if job.kind != "seed" or not job.done:
            return
        try:
            for name in (TABLE_NAME, FIGURE_NAME):  # of fewer runs; made again at the end
                (plan.folder / name).unlink(missing_ok=True)
            write_aside(plan.folder / RECORD_NAME, _as_json(_make_record(plan, options, arguments)))
        except Exception as error:  # the others must not end with it
            people.print(f"{plan.folder / RECORD_NAME}: not written yet: {error}", markup=False, soft_wrap=True)

    with GracefulStop() as stop, Display(people, keep, plan.total_steps) as display:
        for jobs, parallel in ((plan.jobs(), options.parallel), (plan.alone_jobs(), 1)):
            started += run_jobs(
                jobs, command, parallel=parallel, threads=threads(torch.get_num_threads(), parallel), gpus=gpus,
                then=plan.after, stop=lambda: stop.requested, watcher=display,
            )  # fmt: skip
        return started, stop.requested


def visible_gpus(count: int) -> list[str]:
    """The first `count` GPUs that this process sees, as CUDA_VISIBLE_DEVICES calls them; none where one is enough.

    Raises ConfigError where there are fewer.
    """
    import torch

    if count == 1:
        return []
    if (there := torch.cuda.device_count()) < count:
        raise ConfigError(f"--gpus={count}: this process sees {there}; use {max(1, there)}, or see to CUDA_VISIBLE_DEVICES")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(there)])[:count]


def threads(available: int, parallel: int) -> int:
    """CPU threads of each of `parallel` processes."""
    return max(1, available // parallel)


def _record(plan: Plan, options: CompareOptions, arguments: list[str], changed: bool) -> dict[str, Any]:
    """The record, written with its table and figure; the one on disk where nothing has changed since."""
    from factorization_memory._files import read_json_or_none

    path = plan.folder / RECORD_NAME
    record, before = _make_record(plan, options, arguments), read_json_or_none(path)
    same = before is not None and all(before[part] == record[part] for part in ("schema_version", "failures"))
    if same and not changed and _runs(before) == _runs(record):
        _write_pages(plan.folder, before, again=False)
        return dict(before)
    _write_pages(plan.folder, record, again=True)
    # Last: with it, the comparison is there.
    write_aside(path, _as_json(record))
    return record


def _make_record(plan: Plan, options: CompareOptions, arguments: list[str]) -> dict[str, Any]:
    """The record as it stands, of values that JSON knows. Where nothing is trained, the machine that it names is that of the
    run that began last."""
    import torch

    from factorization_memory._files import read_json_or_none
    from factorization_memory.experiments.record import make_record
    from factorization_memory.models.device import resolve_device
    from factorization_memory.runs.environment import describe_environment
    from factorization_memory.runs.names import ENVIRONMENT_NAME, JOB_NAME
    from factorization_memory.runs.record import strict_json

    made = make_record(plan)
    device, count = plan.entries[0].config.training.device, threads(torch.get_num_threads(), options.parallel)
    environment = describe_environment(resolve_device(device if options.train else "cpu"))
    if not options.train:
        found = [
            (read_json_or_none(job.folder / ENVIRONMENT_NAME), read_json_or_none(job.folder / JOB_NAME))
            for job in plan.all_jobs()
            if job.done
        ]
        theirs, order = max(found, key=lambda each: (each[0] or {}).get("date", ""), default=(None, None))
        environment |= {name: value for name, value in (theirs or {}).items() if name in environment}
        count = (order or {}).get("threads", count)
    environment["command"] = ["fmem", "compare", *(each for each in arguments if each not in ("--no-train", "--no_train"))]
    record = {
        "schema_version": made.pop("schema_version"),
        "command": shlex.join(environment["command"]),
        "environment": environment,
        "threads": count,
        **made,
    }
    return dict(json.loads(strict_json(record)))


def _runs(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Which runs a record tells of."""
    return [
        (each["name"], each.get("planned_seeds"), [seed["seed"] for seed in each["seeds"]]) for each in record["contenders"]
    ]


def _as_json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1)


def _write_pages(folder: Path, record: dict[str, Any], again: bool) -> None:
    """The record's figure, if it has one, and its table; without `again` only what is missing."""
    from factorization_memory.reports.comparison_table import markdown

    page, picture = folder / TABLE_NAME, folder / FIGURE_NAME
    curves = {each["name"]: each["summary"]["by_position"] for each in record["contenders"]}
    drawable = any(curves.values())
    if drawable and (again or not picture.exists()):
        from factorization_memory.reports.figures import comparison_curves, png

        figure = comparison_curves(curves, record["shared"]["context_length"])
        assert figure is not None
        png(figure, picture)
    if again or not page.exists():
        write_aside(page, markdown(record, figure=drawable))


def _show_plan(plan: Plan, people: Console) -> None:
    from factorization_memory.reports.comparison_table import change, differing, seeds_text

    first = plan.entries[0].config
    tokens = first.training.steps * first.training.tokens_per_step
    people.print(
        f"{tokens:,} tokens each ({first.training.steps:,} steps, context {first.data.context_length:,}), "
        f"{seeds_text({entry.name: entry.seeds for entry in plan.entries})}; learning rates by {plan.search_steps:,} steps",
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


def _show_record(record: dict[str, Any], people: Console) -> None:
    from factorization_memory.reports.comparison_table import notes, tables

    for part in tables(record):
        people.print(f"\n{part.title}", soft_wrap=True)
        shown = table("", *part.columns)
        shown.columns[0].overflow = "fold"
        for row in part.rows:
            shown.add_row(*map(plain, row))
        people.print(shown)
    for note in notes(record):
        people.print(note, markup=False, soft_wrap=True)
