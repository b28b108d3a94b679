"""The gate: green for right backends, red for wrong ones, for those that cannot run and for those that give NaN."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from factorization_memory.benchmarks.correctness import TOLERANCES, Problem, Shape, check, check_backend
from factorization_memory.ops import chunked

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
