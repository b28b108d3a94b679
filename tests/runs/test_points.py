"""Finished trainings as points: which architecture a model is, and the records they are read from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factorization_memory.config import ConfigError, ModelConfig
from factorization_memory.runs.points import architecture_of, read_points

COMPARISON = Path(__file__).parents[2] / "results" / "associative" / "compare.json"


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({}, "paper"),
        ({"update_lag": 1}, "associative"),
        ({"mixers": ("attention",)}, "attention"),
        ({"mixers": ("mamba2",)}, "mamba2"),
        ({"mixers": ("gated_deltanet",)}, "gated_deltanet"),
        ({"mixers": ("memory", "memory", "attention"), "num_layers": 3}, "hybrid"),
        ({"mixers": ("memory", "memory", "attention"), "num_layers": 2}, "paper"),  # the pattern ends before attention
    ],
)
def test_architecture(fields: dict[str, object], architecture: str) -> None:
    assert architecture_of(ModelConfig(**({"hidden_size": 64, "num_layers": 2} | fields))) == architecture


def test_comparison() -> None:
    """Each seed of each contender, with its own seed in its configuration, as large and as costly as the comparison says."""
    record = json.loads(COMPARISON.read_text(encoding="utf-8"))
    points = read_points([COMPARISON.parent])
    assert len(points) == sum(len(contender["seeds"]) for contender in record["contenders"])
    assert {point["architecture"] for point in points} == {"associative", "gated_deltanet", "mamba2", "attention", "paper"}
    first, second = points[0], points[1]
    assert first["parameters"] == record["contenders"][0]["parameters"]
    assert first["tokens"] == record["shared"]["tokens"]
    assert first["labels"]["contender"] == record["contenders"][0]["name"]
    assert (second["config"]["training"]["seed"], second["figures"]["seed"]) == (1, 1)
    assert first["train_flops"] > 3 * 2 * first["parameters"]["non_embedding"] * first["tokens"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ({"schema_version": 7, "points": []}, "is not a record"),
        ([], "is not a record"),
    ],
)
def test_bad_records(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    if content is not None:
        path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_points([path])


def test_folder_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no record.json or compare.json; make one with `fmem sweep run`"):
        read_points([tmp_path])
