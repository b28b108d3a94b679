"""Runs lm-evaluation-harness tasks: named groups, task names checked before anything is loaded, data from local files.

    with choose_tasks(["japanese", "hellaswag"], data=Path("data")) as chosen:
        record = run_tasks(chosen, model, tokenizer)

The record is the contents of a run folder's `harness.json`:

tasks       {name: {metrics: {metric: {value, stderr, filter, higher_is_better}}, shots, examples, version, local_data}}; stderr
            is null if the harness gives none; a metric with several filters is named "metric, filter"
groups      the same for groups that the harness averages over
asked       {tasks, shots, limit, batch_size}: the request; null is the default
versions    {lm_eval, factorization_memory, torch}
seconds     time of the evaluation, excluding loading the data

The command line adds `checkpoint`, `device` and `precision`.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory._version import __version__
from factorization_memory.config import ConfigError
from factorization_memory.evaluation.harness import FactorizationMemoryLM
from factorization_memory.evaluation.harness_data import HarnessDataError, needed_splits, read_from_files, task_splits
from factorization_memory.evaluation.harness_index import GROUPS, leaves_of, task_manager

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel

BOOTSTRAPS = 1000
"""Bootstrap resamples for the standard error of metrics without a closed form."""


@dataclass(frozen=True)
class ChosenTasks:
    """Tasks known to exist, and the sources of their data."""

    asked: tuple[str, ...]
    """The names as given."""
    names: tuple[str, ...]
    """Names in the harness."""
    manager: Any
    """`TaskManager` that knows them."""
    leaves: dict[str, dict[str, Any]]
    """The individual tasks in them, with their configurations."""
    shots: int | None
    """Few-shot examples before each question; None: the tasks' defaults."""
    local: dict[str, dict[str, str]] = field(default_factory=dict)
    """Tasks whose data are read from local files, with the file of each split."""


@contextmanager
def choose_tasks(
    names: Iterable[str], *, data: Path | None = None, own_tasks: Path | None = None, shots: int | None = None
) -> Iterator[ChosenTasks]:
    """Look up tasks and point them to their files in `data`, if any; no data are read yet.

    Args:
        names: tasks and groups of the harness, or `GROUPS`.
        data: folder with `TASK/SPLIT.jsonl` (or .json, .parquet), rows as in the task's data set on the hub; tasks not in it
            use the hub.
        own_tasks: folder with YAML task files, which take precedence over those of the harness.
        shots: few-shot examples before each question; None: the tasks' defaults.

    Raises:
        ConfigError: a name does not exist (similar ones are suggested), or is defined twice; a folder does not exist.
        HarnessDataError: a task's folder lacks a file that the task needs.
    """
    asked = tuple(dict.fromkeys(names))
    expanded = tuple(dict.fromkeys(name for one in asked for name in GROUPS.get(one, (one,))))
    for what, folder in (("data", data), ("own tasks", own_tasks)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder for the harness's {what}; give an existing one")
    manager = task_manager(expanded, own_tasks)
    leaves: dict[str, dict[str, Any]] = {}
    owner: dict[str, str] = {}
    for name in expanded:
        for leaf in leaves_of(manager.task_index, name):
            if leaf in owner:
                raise ConfigError(f"task {leaf!r} is in {owner[leaf]!r} and in {name!r}; drop one of them")
            owner[leaf] = name
            leaves[leaf] = manager.task_index[leaf].cfg or {}
    with tempfile.TemporaryDirectory() as workspace:
        local: dict[str, dict[str, str]] = {}
        for name, config in leaves.items():
            if data is not None and (data / name).is_dir():
                change, local[name] = read_from_files(name, config, data / name, shots)
                inherited = {"include": str(manager.task_index[name].yaml_path), "task": name, **change}
                # JSON is YAML. Functions of a task are still resolved relative to the included file's folder.
                (Path(workspace) / f"{len(local)}.yaml").write_text(json.dumps(inherited), encoding="utf-8")
        if local:
            from lm_eval.tasks import TaskManager

            changed = TaskManager(include_path=workspace, include_defaults=False).task_index
            # Not its tags: they list only these tasks.
            manager.task_index.update({name: changed[name] for name in local})
        yield ChosenTasks(asked, expanded, manager, leaves, shots, local)


def run_tasks(
    chosen: ChosenTasks, model: LanguageModel, tokenizer: Tokenizer, *, limit: int | None = None, batch_size: int = 64
) -> dict[str, Any]:
    """Evaluate a model on the tasks, under the caller's autocast.

    Args:
        limit: evaluate only the first `limit` examples of each task.
        batch_size: of `FactorizationMemoryLM`.

    Returns the record described in the module docstring. Raises `HarnessDataError` if a task's data cannot be loaded.
    """
    from lm_eval import simple_evaluate

    adapter = FactorizationMemoryLM(model, tokenizer, batch_size)
    objects = _load(chosen)
    start = time.perf_counter()
    try:
        results = simple_evaluate(
            adapter,
            tasks=objects,
            task_manager=chosen.manager,
            num_fewshot=chosen.shots,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    except Exception as error:  # its type depends on what is wrong with the row
        better = _in_rows(chosen, limit)
        if better is None:
            raise
        raise better from error
    record: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name, row in results["results"].items():
        is_task = name in chosen.leaves
        metrics = _metrics(row, results["higher_is_better"].get(name, {}))
        if not metrics:
            continue
        entry: dict[str, Any] = {"metrics": metrics}
        if is_task:
            entry |= {
                "shots": results["n-shot"].get(name),
                "examples": results["n-samples"][name]["effective"],
                "version": results["versions"].get(name),
                "local_data": name in chosen.local,
            }
        record["tasks" if is_task else "groups"][name] = entry
    asked = {"tasks": list(chosen.asked), "shots": chosen.shots, "limit": limit, "batch_size": batch_size}
    versions = {"lm_eval": version("lm_eval"), "factorization_memory": __version__, "torch": version("torch")}
    return {**record, "asked": asked, "versions": versions, "seconds": time.perf_counter() - start}


def _metrics(row: dict[str, Any], higher_is_better: dict[str, bool | None]) -> dict[str, dict[str, Any]]:
    """The metrics of a row of results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    found = [key.partition(",") for key in row if "," in key and not key.partition(",")[0].endswith("_stderr")]
    names = [name for name, _, _ in found]
    metrics = {}
    for name, _, kept in found:
        value = _number(row[f"{name},{kept}"])
        if value is not None:
            metrics[name if names.count(name) == 1 else f"{name}, {kept}"] = {
                "value": value,
                "stderr": _number(row.get(f"{name}_stderr,{kept}")),
                "filter": kept,
                "higher_is_better": higher_is_better.get(name),
            }
    return metrics


def _number(value: Any) -> float | None:
    """The value as a float; None if it is not a number, such as the harness's "N/A"."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _load(chosen: ChosenTasks) -> list[Any]:
    """The tasks and groups with their data."""
    objects: list[Any] = []
    for name in chosen.names:
        try:
            loaded = chosen.manager.load([name])
        except Exception as error:  # its type depends on the library, the cache and the network
            task, cause = _culprit(chosen, name, error)
            raise HarnessDataError(_complaint(chosen, task, cause)) from cause
        group = loaded.get("groups", {}).get(name)
        objects += loaded["tasks"].values() if group is None else [group]
    return objects


def _culprit(chosen: ChosenTasks, name: str, error: Exception) -> tuple[str, Exception]:
    """The first individual task of `name` that cannot be loaded, and why."""
    leaves = leaves_of(chosen.manager.task_index, name)
    for leaf in leaves if len(leaves) > 1 else ():
        try:
            chosen.manager.load([leaf])
        except Exception as cause:
            return leaf, cause
    return next(iter(leaves), name), error


def _in_rows(chosen: ChosenTasks, limit: int | None) -> HarnessDataError | None:
    """The error for the first task whose questions cannot be built, with the reason; None if all can."""
    for leaf in chosen.leaves:
        try:
            task = chosen.manager.load([leaf])["tasks"][leaf]
            if chosen.shots is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=chosen.shots)
            task.build_all_requests(limit=limit, rank=0, world_size=1)
        except Exception as cause:
            _, examples = task_splits(chosen.leaves[leaf], chosen.shots)
            of = f", or use fewer examples of {examples!r} with --harness-shots" if examples else ""
            return HarnessDataError(
                f"task {leaf}: cannot make its questions from its data ({_reason(cause)}); fix the rows{of}"
            )
    return None


def _reason(error: BaseException) -> str:
    """What went wrong, in one line, with the cause if the error itself does not mention it."""
    parts = [f"{type(error).__name__}: {error}"]
    while error.__cause__ is not None and len(parts) < 3:
        error = error.__cause__
        parts.append(f"{type(error).__name__}: {error}")
    return " ".join(": ".join(parts).split())[:300]


def _complaint(chosen: ChosenTasks, task: str, error: Exception) -> str:
    """The message for a task that cannot be loaded."""
    reason = _reason(error)
    if isinstance(error, ImportError):
        return f"task {task}: {error}; install what is missing, or leave the task out"
    if task in chosen.local:
        files = ", ".join(chosen.local[task].values())
        return f"task {task}: its data files do not fit it ({reason}); give rows in the format of its own data set in {files}"
    config = chosen.leaves.get(task, {})
    data_set = " ".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key)) or "its data set"
    files = " and ".join(f"DIR/{task}/{split}.jsonl" for split in needed_splits(config, chosen.shots))
    others = [leaf for leaf in chosen.leaves if leaf not in chosen.local and leaf != task]
    more = f"; also without files: {', '.join(others[:5])}{f' and {len(others) - 5} more' if len(others) > 5 else ''}"
    return (
        f"task {task}: {data_set} cannot be loaded from the hub ({reason}); without network access give its files, {files} "
        f"(or .json, .parquet), with --harness-data DIR{more if others else ''}"
    )
