"""Finished trainings, one a point, for laws and figures: read from the record of a sweep or of a comparison.

record.json    of a sweep (experiments/sweep_record.py)
compare.json   of a comparison; each seed of each contender is a point
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from factorization_memory._files import read_json
from factorization_memory.config import ConfigError, ModelConfig, RunConfig, from_dict
from factorization_memory.models.counting import count
from factorization_memory.runs.comparison_record import ComparisonRecord, Parameters, SeedRecord

if TYPE_CHECKING:
    from factorization_memory.runs.environment import EnvironmentRecord

POINTS_VERSION = 1
"""Schema of record.json."""
RECORD_NAME, COMPARISON_NAME = "record.json", "compare.json"
ASSOCIATIVE, PAPER, HYBRID = "associative", "paper", "hybrid"
"""Architectures that are not the name of a mixer: memory that writes under the affinity of the token before, memory as in the
paper, and mixers in turns."""


class Point(TypedDict):
    """One finished training."""

    id: str
    title: str
    labels: dict[str, str | int | float]
    """What the sweep's function calls it; for a contender of a comparison its `contender`."""
    architecture: str
    """See `architecture_of`."""
    config: dict[str, Any]
    """A `RunConfig` as JSON."""
    parameters: Parameters
    tokens: int
    train_flops: int
    figures: SeedRecord
    """Losses by source and position, recall, speed, memory."""


class SweepRecord(TypedDict):
    """`record.json` of a sweep."""

    schema_version: int
    environment: EnvironmentRecord
    """Where the record was made, which is where the runs are."""
    points: list[Point]
    diverged: list[str]
    """Titles of runs that diverged."""
    missing: list[str]
    """Titles of runs that are not done, or not evaluated."""


def architecture_of(model: ModelConfig) -> str:
    """What a model is built of: `ASSOCIATIVE` or `PAPER` for memory, another mixer's name, `HYBRID` for several."""
    mixers = set(model.layer_mixers)
    if len(mixers) > 1:
        return HYBRID
    (mixer,) = mixers
    if mixer != "memory":
        return mixer
    return ASSOCIATIVE if model.update_lag else PAPER


def make_point(title: str, run_id: str, labels: dict[str, Any], config: dict[str, Any], figures: SeedRecord) -> Point:
    """A point of a run's complete configuration, as JSON, and its figures. Raises ConfigError for one of another version."""
    run = from_dict(RunConfig, config)
    counts = count(run.model, run.data.context_length)
    tokens = run.training.steps * run.training.tokens_per_step
    return {
        "id": run_id,
        "title": title,
        "labels": labels,
        "architecture": architecture_of(run.model),
        "config": config,
        "parameters": {
            "total": counts.parameters,
            "embedding": counts.embedding_parameters,
            "non_embedding": counts.non_embedding_parameters,
        },
        "tokens": tokens,
        "train_flops": counts.train_flops * tokens,
        "figures": figures,
    }


def read_points(paths: Iterable[Path | str]) -> list[Point]:
    """The points of all records.

    Args:
        paths: record.json or compare.json, or folders that hold one.

    Raises ConfigError if there is none, or one is of another schema; JSONError if it is damaged.
    """
    points: list[Point] = []
    for given in paths:
        path = _record_in(Path(given))
        record = read_json(path)
        if isinstance(record, dict) and "contenders" in record:
            points += _of_comparison(cast("ComparisonRecord", record))
        elif isinstance(record, dict) and record.get("schema_version") == POINTS_VERSION and "points" in record:
            points += record["points"]
        else:
            raise ConfigError(f"records={path}: is not a record of a sweep or a comparison that this version reads")
    return points


def _record_in(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in (RECORD_NAME, COMPARISON_NAME) if (path / name).is_file()]
        if not found:
            raise ConfigError(f"records={path}: has no {RECORD_NAME} or {COMPARISON_NAME}; make one with `fmem sweep run`")
        return found[0]
    if not path.is_file():
        raise ConfigError(f"records={path}: no such file or folder; give the record of a sweep or of a comparison")
    return path


def _of_comparison(record: ComparisonRecord) -> list[Point]:
    points = []
    for contender in record["contenders"]:
        config = contender["config"]
        for seed in contender["seeds"]:
            own = config | {"training": config["training"] | {"seed": seed["seed"]}}
            labels = {"contender": contender["name"], "seed": seed["seed"]}
            title = f"{contender['name']}, seed {seed['seed']}"
            points.append(make_point(title, seed["folder"], labels, own, seed))
    return points
