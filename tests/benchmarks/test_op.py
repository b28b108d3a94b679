"""The benchmark of the recurrence: a red gate measures nothing; records hold what they say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from factorization_memory.benchmarks import op, timing
from factorization_memory.benchmarks.correctness import Shape
from factorization_memory.ops import chunked

CPU = torch.device("cpu")
SMALL = op.OpBenchmark(Shape(2, 130, 1, 8, 16), lengths=(64, 128), memory_length=256, repeats=1)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 1e-9)


def test_records() -> None:
    told: list[str] = []
    result = op.run(SMALL, CPU, told.append)
    assert json.loads(json.dumps(result)) == result
    reference, ours = result["comparison"]
    assert reference["backend"] == "reference"
    assert reference["forward"]["speedup"] == 1.0
    assert ours["forward_backward"]["ns_per_token"] == pytest.approx(ours["forward_backward"]["seconds"]["median"] / 260 * 1e9)
    assert [record["length"] for record in result["lengths"]] == [64, 128]
    assert told[0] == "correctness gate"


def test_memory_counts_inputs_outputs_and_gradients() -> None:
    record = op.measure_memory(Shape(1, 256, 1, 8, 16), "chunked", torch.float32, CPU)
    assert record["input_output_bytes"] == record["gradient_bytes"] == 4 * 256 * (8 + 8 + 16 + 16)
    assert record["peak_bytes"] >= record["input_output_bytes"] + record["gradient_bytes"]
    assert record["ratio"] == pytest.approx(2 * record["ratio_with_gradients"])


def test_chunked_memory_stays_near_its_inputs_and_outputs() -> None:
    record = op.measure_memory(Shape(1, 16384, 1, 16, 128), "chunked", torch.float32, CPU)
    assert record["ratio"] <= 3


def test_a_wrong_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = chunked.forward

    def wrong(update: Any, *rest: Any) -> Any:
        return forward(update * 0.99, *rest)

    monkeypatch.setattr(chunked, "forward", wrong)
    monkeypatch.setattr(op, "measure", lambda *arguments: pytest.fail("a wrong backend was timed"))
    with pytest.raises(op.IncorrectBackendError, match=r"gate is red.*chunked \(relative error") as caught:
        op.run(SMALL, CPU)
    assert [result["passed"] for result in caught.value.checks] == [True, False]
