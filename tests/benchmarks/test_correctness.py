"""The gate: green for right backends, red for wrong ones, for those that cannot run and for those that give NaN."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from factorization_memory.benchmarks import correctness
from factorization_memory.benchmarks.correctness import TOLERANCES, Problem, Shape, check, check_backend
from factorization_memory.config import ConfigError
from factorization_memory.ops.memory import chunked

SMALL = Shape(batch=2, length=70, heads=2, num_states=5, value_size=4)
forward = chunked.forward


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_right_backends_pass_every_case(backend: str) -> None:
    results = check_backend(backend, "cpu")
    assert all(result["passed"] for result in results), results
    assert {"dense", "sparse", "packed, sparse"} <= {result["case"] for result in results}
    assert {"float32", "bfloat16"} == {result["dtype"] for result in results}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_dtype_has_a_tolerance_that_holds(dtype: torch.dtype) -> None:
    assert check("chunked", Problem.random(SMALL, dtype, initial_state=True))["passed"]


def test_a_wrong_output_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(update: Any, merge: Any, *rest: Any) -> Any:
        return forward(update, merge * 1.001, *rest)

    monkeypatch.setattr(chunked, "forward", wrong)
    result = check("chunked", Problem.random(SMALL))
    assert not result["passed"]
    assert result["worst"] == "output"
    assert result["error"] == pytest.approx(1e-3, rel=0.01)
    assert not any(result["passed"] for result in check_backend("chunked", "cpu") if result["dtype"] == "float32")


def test_a_wrong_gradient_alone_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(update: Any, *rest: Any) -> Any:
        return forward(update + 0.01 * (update - update.detach()), *rest)

    monkeypatch.setattr(chunked, "forward", wrong)
    result = check("chunked", Problem.random(SMALL))
    assert not result["passed"]
    assert result["worst"] == "d_update"


def test_a_backend_that_cannot_run_is_red_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no such chip")

    monkeypatch.setattr(chunked, "forward", broken)
    result = check("chunked", Problem.random(SMALL))
    assert not result["passed"]
    assert result["reason"] == "RuntimeError: no such chip"


def test_not_a_number_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfinite(*arguments: Any) -> Any:
        output, final = forward(*arguments)
        return output * float("nan"), final

    monkeypatch.setattr(chunked, "forward", unfinite)
    result = check("chunked", Problem.random(SMALL))
    assert not result["passed"]
    assert "not finite" in str(result["reason"])


def test_a_problem_is_the_same_on_each_call_and_looks_like_a_layers() -> None:
    shape = dataclasses.replace(SMALL, top_k=3)
    one, two = (Problem.random(shape, torch.bfloat16, initial_state=True) for _ in range(2))
    assert torch.equal(one.value, two.value)
    assert one.value.dtype == torch.bfloat16
    assert one.update.dtype == one.initial_state.dtype == torch.float32
    assert one.update.shape == one.indices.shape == (2, 70, 2, 3)
    assert 0 < float(one.update.min()) <= float(one.update.max()) < 1
    assert one.to(torch.float64).indices.dtype == torch.int64


def test_truth_does_not_depend_on_its_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in (SMALL, dataclasses.replace(SMALL, top_k=3)):
        problem = Problem.random(shape, initial_state=True)
        whole = problem.to(torch.float64).solve("reference")
        monkeypatch.setattr(correctness, "TRUTH_BYTES", 3 * 70 * 2 * 2 * 5 * 8 * correctness.TRUTH_COPIES)  # 3 of 4 columns
        blocks = correctness.truth(problem)
        assert blocks.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(blocks[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", ["16x2048x1x64x2048", "1x7x2x64x8x4"])
def test_shapes_are_written_as_they_are_read(text: str) -> None:
    shape = Shape.parse(text)
    assert str(shape) == text
    assert shape.top_k == (4 if text.endswith("x4") else None)
    assert shape.num_states == 64


@pytest.mark.parametrize(
    "text", ["", "16x2048", "1x2x3x4x0", "1x2x3x4x5x6x7", "1x2x3xax5", "1x2x3x-4x5", "1x2x3x4x5x6", "1x2x3x٤x5"]
)
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(ConfigError, match="shapes="):
        Shape.parse(text)
