from __future__ import annotations

import json

import pytest
import torch

from factorization_memory.evaluation.recall_demo import recall_demo
from factorization_memory.evaluation.recall_learning import RecallProgress


def test_the_record_of_a_few_steps() -> None:
    told: list[dict[str, RecallProgress]] = []
    threads = torch.get_num_threads()
    record = recall_demo(3, pairs=2, every=2, progress=told.append)
    assert torch.get_num_threads() == threads
    json.dumps(record, allow_nan=False)
    assert [{name: each.step for name, each in both.items()} for both in told] == [
        {"associative form": 2, "paper's form": 2},
        {"associative form": 3, "paper's form": 3},
    ]
    assert record["tokens"][:4] == ["A", "a", "B", "b"]
    assert [record["tokens"][place] for place in record["asked"]] == ["A", "B"]
    assert min(record["asked"]) >= 4
    one, other = record["models"]
    assert (one["update_lag"], other["update_lag"]) == (1, 0)
    assert {**one["config"], "update_lag": 0} == other["config"]
    assert one["parameters"] == other["parameters"]
    for model in record["models"]:
        assert model["step"] == [2, 3]
        assert model["accuracy"] == [each[model["name"]].accuracy for each in told]
        assert len(model["answers"]) == 2
        for place, row in zip(record["asked"], model["reads"], strict=True):
            assert len(row) == len(record["tokens"]) == 12
            assert sum(row) == pytest.approx(1, abs=1e-3)
            assert not any(row[place + 1 :])


def test_the_associative_form_recalls_and_reads_where_the_value_was_written() -> None:
    record = recall_demo(40, every=40)
    associative, paper = record["models"]
    assert associative["accuracy"][-1] > 0.9 > 0.5 > paper["accuracy"][-1]
    assert [row.index(max(row)) for row in associative["reads"]] == [1, 3, 5, 7]
    assert associative["answers"] == ["a", "b", "c", "d"]
