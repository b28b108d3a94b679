"""The folder of a comparison: its plan, its runs, and the record, table and figure made from them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from factorization_memory._files import read_json_or_none, write_atomic
from factorization_memory.config import ConfigError
from factorization_memory.experiments.kept_plan import first_difference, is_plan, part_to_keep, with_defaults
from factorization_memory.experiments.plan import Plan, slug
from factorization_memory.experiments.processes import Job, Watcher, run_jobs
from factorization_memory.experiments.record import make_record
from factorization_memory.experiments.worker import command
from factorization_memory.models.device import resolve_device
from factorization_memory.reports.comparison_table import markdown
from factorization_memory.reports.plotting import png
from factorization_memory.reports.position_figures import comparison_curves
from factorization_memory.runs import RunLock
from factorization_memory.runs.comparison_record import ComparisonRecord
from factorization_memory.runs.environment import describe_environment
from factorization_memory.runs.names import ENVIRONMENT_NAME, JOB_NAME
from factorization_memory.runs.record import strict_json
from factorization_memory.training.guard import GracefulStop

PLAN_NAME, RECORD_NAME, TABLE_NAME, FIGURE_NAME = "plan.json", "compare.json", "compare.md", "compare.png"


class Comparison:
    """Carries out a plan in its folder.

    Args:
        arguments: of the command, for the record.
        parallel: number of concurrent runs.
        gpus: GPUs to distribute over them.
        warn: called with messages about non-fatal problems.
    """

    def __init__(
        self,
        plan: Plan,
        arguments: Sequence[str] = (),
        *,
        parallel: int = 1,
        gpus: int = 1,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.plan = plan
        self.arguments = arguments
        self.parallel = parallel
        self.gpus = gpus
        self.warn = warn

    def run(
        self, show: Callable[[Callable[[Job], None]], AbstractContextManager[Watcher]]
    ) -> tuple[ComparisonRecord, str | None]:
        """Runs whatever is not done yet; returns the record, and the signal that stopped the work, if any.

        `show` creates the watcher of the runs, which calls its argument when a run that it saw start has ended. Raises
        ConfigError if the folder has a different comparison, RunLockedError if another process is working in it.
        """
        with RunLock(self.plan.folder):
            more = self._keep_plan()
            started, stopped = self._work(show)
            return self._write_record(changed=more or started > 0), stopped

    def record_without_training(self) -> ComparisonRecord:
        """Rewrites the record from the finished runs. Raises ConfigError if the folder has no comparison."""
        if not (self.plan.folder / PLAN_NAME).exists():
            raise ConfigError(f"out={self.plan.folder}: contains no comparison; drop --no-train to start one")
        with RunLock(self.plan.folder):
            self._keep_plan()
            return self._write_record(changed=True, trained=False)

    def _keep_plan(self) -> bool:
        """Writes the plan, or checks that the folder has it or one that it extends; returns whether it was written."""
        path = self.plan.folder / PLAN_NAME
        # Through JSON, which has only lists.
        own = json.loads(json.dumps(self.plan.description()))
        if path.exists():
            kept = self._begun(with_defaults(read_json_or_none(path)))
            difference = first_difference(kept, part_to_keep(kept, own))
            if difference is not None:
                name, old, new = difference
                raise ConfigError(
                    f"out={self.plan.folder}: contains another comparison, with {name or 'a plan'} = {_brief(old)} instead of "
                    f"{_brief(new)}; choose another folder, or repeat its command (you may add contenders or seeds, and drop "
                    "contenders whose folder in runs/ you deleted)"
                )
            if first_difference(kept, own) is None:
                return False
        write_atomic(path, json.dumps(own, ensure_ascii=False, indent=1))
        return True

    def _begun(self, kept: Any) -> Any:
        """The plan in the folder without contenders and seeds that have no run folder yet: they have nothing to lose."""
        if not is_plan(kept):
            return kept
        contenders = {}
        for name, contender in kept["contenders"].items():
            runs = self.plan.folder / "runs" / slug(name)
            if runs.exists():
                seeds = [seed for seed in contender["seeds"] if (runs / f"seed-{seed}").exists()]
                contenders[name] = contender | {"seeds": seeds}
        every = {str(seed) for contender in contenders.values() for seed in contender["seeds"]}
        order = {seed: digest for seed, digest in kept["order"].items() if seed in every}
        return kept | {"contenders": contenders, "order": order}

    def _work(self, show: Callable[[Callable[[Job], None]], AbstractContextManager[Watcher]]) -> tuple[int, str | None]:
        """Runs whatever is not done yet; returns the number of processes started, and the signal that stopped it. The record
        is written whenever the training of a seed ends, so that finished results are available whatever happens to the
        others."""
        plan, started = self.plan, 0
        gpus = visible_gpus(self.gpus)
        with GracefulStop() as stop, show(self._keep_record) as watcher:
            for jobs, parallel in ((plan.jobs(), self.parallel), (plan.alone_jobs(), 1)):
                started += run_jobs(
                    jobs,
                    command,
                    parallel=parallel,
                    threads=threads(torch.get_num_threads(), parallel),
                    gpus=gpus,
                    then=plan.after,
                    stop=lambda: stop.requested,
                    watcher=watcher,
                )
            return started, stop.requested

    def _keep_record(self, job: Job) -> None:
        """Writes the current record if a seed's training has ended."""
        if job.kind != "seed" or not job.done:
            return
        folder = self.plan.folder
        try:
            for name in (TABLE_NAME, FIGURE_NAME):  # of fewer runs; recreated at the end
                (folder / name).unlink(missing_ok=True)
            write_atomic(folder / RECORD_NAME, _as_json(self._make_record()))
        except Exception as error:  # must not stop the other runs
            self.warn(f"{folder / RECORD_NAME}: not written yet: {error}")

    def _write_record(self, changed: bool, trained: bool = True) -> ComparisonRecord:
        """Writes and returns the record, with its table and figure; the record on disk if nothing has changed."""
        path = self.plan.folder / RECORD_NAME
        record = self._make_record(trained)
        before: ComparisonRecord | None = read_json_or_none(path)
        if (
            before is not None
            and not changed
            and before["schema_version"] == record["schema_version"]
            and before["failures"] == record["failures"]
            and _runs(before) == _runs(record)
        ):
            write_pages(self.plan.folder, before, again=False)
            return before
        write_pages(self.plan.folder, record, again=True)
        # Last: it marks the comparison as complete.
        write_atomic(path, _as_json(record))
        return record

    def _make_record(self, trained: bool = True) -> ComparisonRecord:
        """The current record, as JSON values. If nothing is trained, it names the machine of the most recently started run."""
        made = make_record(self.plan)
        device, count = self.plan.entries[0].config.training.device, threads(torch.get_num_threads(), self.parallel)
        environment: Any = describe_environment(resolve_device(device if trained else "cpu"))
        if not trained:
            found = [
                (read_json_or_none(job.folder / ENVIRONMENT_NAME), read_json_or_none(job.folder / JOB_NAME))
                for job in self.plan.all_jobs()
                if job.done
            ]
            theirs, order = max(found, key=lambda each: (each[0] or {}).get("date", ""), default=(None, None))
            environment |= {name: value for name, value in (theirs or {}).items() if name in environment}
            count = (order or {}).get("threads", count)
        said = [each for each in self.arguments if each not in ("--no-train", "--no_train")]
        environment["command"] = ["fmem", "compare", *said]
        record: ComparisonRecord = {
            "schema_version": made["schema_version"],
            "command": shlex.join(environment["command"]),
            "environment": environment,
            "threads": count,
            **made,
        }
        read: ComparisonRecord = json.loads(strict_json(record))
        return read


def write_pages(folder: Path, record: ComparisonRecord, again: bool) -> None:
    """The record's figure, if it has one, and its table; without `again` only what is missing."""
    page, picture = folder / TABLE_NAME, folder / FIGURE_NAME
    curves = {each["name"]: each["summary"]["by_position"] for each in record["contenders"]}
    drawable = any(curves.values())
    if drawable and (again or not picture.exists()):
        figure = comparison_curves(curves, record["shared"]["context_length"])
        assert figure is not None
        png(figure, picture)
    if again or not page.exists():
        write_atomic(page, markdown(record, figure=drawable))


def visible_gpus(count: int) -> list[str]:
    """The first `count` GPUs visible to this process, as named in CUDA_VISIBLE_DEVICES; empty if one is enough.

    Raises ConfigError where there are fewer.
    """
    if count == 1:
        return []
    if (there := torch.cuda.device_count()) < count:
        raise ConfigError(f"gpus={count}: only {there} visible; use {max(1, there)}, or set CUDA_VISIBLE_DEVICES")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(there)])[:count]


def threads(available: int, parallel: int) -> int:
    """CPU threads for each of `parallel` processes."""
    return max(1, available // parallel)


def _runs(record: ComparisonRecord) -> list[tuple[Any, ...]]:
    """The runs that a record covers."""
    return [
        (each["name"], each.get("planned_seeds"), [seed["seed"] for seed in each["seeds"]]) for each in record["contenders"]
    ]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


def _as_json(record: ComparisonRecord) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1)
