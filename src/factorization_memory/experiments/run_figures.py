"""The figures of one finished training, read from its run folder: the entry of a comparison or of a sweep."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factorization_memory._files import read_json_or_none
from factorization_memory.evaluation.position import beyond_context
from factorization_memory.evaluation.recall_suite import headline
from factorization_memory.experiments.processes import Job
from factorization_memory.runs.comparison_record import PartLoss, RangeLoss, SeedRecord
from factorization_memory.runs.evaluation_record import EvaluationRecord
from factorization_memory.runs.names import EVALUATION_NAME, MEMORY_NAME
from factorization_memory.runs.recall_names import KINDS, distance_name

UNITS = ("loss", "bits_per_byte")


def seed_record(job: Job, root: Path, multiples: Sequence[int]) -> SeedRecord:
    """The figures of a training that has finished and was evaluated.

    Args:
        job: the training.
        root: folder that its own folder is named relative to.
        multiples: of the training context, up to which to report the loss (powers of two).
    """
    evaluation: EvaluationRecord = read_json_or_none(job.folder / EVALUATION_NAME)
    result = job.result()
    assert result is not None
    context = {**evaluation["sources"], "all": evaluation["total"]}
    recall = evaluation.get("recall", {})
    distance: dict[str, dict[str, PartLoss]] = {}
    for source, parts in recall.items():
        for each in parts["repeated"].get("by_distance", []) if "repeated" in parts else ():
            distance.setdefault(distance_name(each["start"], each["end"]), {})[source] = picked(each, "tokens", *UNITS)
    tasks = evaluation.get("recall_tasks")
    positions: dict[str, dict[str, RangeLoss]] = {}
    by_position: dict[str, list[RangeLoss]] = {}
    for source, read in evaluation.get("position", {}).items():
        for multiple in multiples:
            part = beyond_context(read, multiple)
            if part is not None:
                positions.setdefault(str(multiple), {})[source] = picked(part, "start", "end", "tokens", *UNITS)
        by_position[source] = [picked(each, "start", "end", "tokens", *UNITS) for each in read["bins"]]
    return {
        "seed": job.config.training.seed,
        "folder": job.folder.relative_to(root).as_posix(),
        "context": {source: picked(part, "tokens", *UNITS) for source, part in context.items()},
        "positions": positions,
        "recall": {
            kind: {source: picked(parts[kind], "tokens", *UNITS) for source, parts in recall.items() if kind in parts}
            for kind in KINDS
            if recall
        },
        "distance": distance,
        "tasks": {
            task: {source: {"accuracy": share} for source, share in shares.items()}
            for task, shares in ({} if tasks is None else headline(tasks)).items()
        },
        "by_position": by_position,
        "tokens_per_second": tokens_per_second(job),
        "seconds": result["seconds"],
        "memory": read_json_or_none(job.folder / MEMORY_NAME),
        "parallel": job.parallel(),
    }


def is_finite(job: Job) -> bool:
    """Whether all figures of a finished training's evaluation are numbers; those that are not finite are written as null. So
    are errors over stretches where only one stretch reaches, which are none of these."""
    evaluation: EvaluationRecord = read_json_or_none(job.folder / EVALUATION_NAME)
    parts: list[Mapping[str, Any]] = [picked(part, *UNITS) for part in (*evaluation["sources"].values(), evaluation["total"])]
    parts += [each for read in evaluation.get("position", {}).values() for each in read["bins"]]
    return all(value is not None for part in parts for name, value in part.items() if name != "gain_stretch_error")


def tokens_per_second(job: Job) -> float | None:
    """Median over the intervals of the log, without the first (unless it is the only one): it includes one-time costs."""
    rates = [line["tokens_per_second"] for line in job.metrics()]
    return statistics.median(rates[1:] or rates) if rates else None


def picked(part: Mapping[str, Any], *names: str) -> Any:
    """Some entries of a record, as another."""
    return {name: part[name] for name in names}
