from __future__ import annotations

from typing import Any

from factorization_memory.reports.comparison_table import change, differing


def test_what_contenders_differ_in() -> None:
    one: dict[str, Any] = {
        "optimizer": {"learning_rate": 1.0, "warmup_steps": 2, "schedule": "wsd"},
        "training": {"micro_batch_size": 0, "steps": 9},
    }
    other = {"optimizer": {**one["optimizer"], "learning_rate": 2.0}, "training": {**one["training"], "steps": 8}}
    assert differing({"a": one, "b": other}) == []
    other["optimizer"]["warmup_steps"], other["training"]["micro_batch_size"] = 3, 4
    said = "Contenders differ in optimizer.warmup_steps (a 2, b 3), training.micro_batch_size (a 0, b 4)."
    assert differing({"a": one, "b": other}) == [said]


def test_a_large_change_is_said_with_its_factor() -> None:
    assert change("model.intermediate_size", 1024, 512) == "model.intermediate_size from 1024 to 512"
    assert change("model.intermediate_size", 1024, 416) == "model.intermediate_size from 1024 to 416 (a factor of 2.46)"
