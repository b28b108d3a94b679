"""`fmem bench`."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from factorization_memory.benchmarks import timing
from factorization_memory.cli import dispatch
from factorization_memory.ops import chunked

OP = (
    "bench op --device cpu --batch 1 --length 70 --num-states 4 --value-size 8 --lengths 64 --memory-length 64 --repeats 1 "
    "--json"
)
TRAINING = (
    "bench training --device cpu --batch 1 --lengths 16 --repeats 1 --json --model.vocab-size 20 --model.hidden-size 16 "
    "--model.num-layers 1 --model.num-states 4"
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 1e-9)


def test_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(OP.split()) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    result = json.loads(shown.out)
    assert result["benchmark"] == "op"
    assert [record["backend"] for record in result["comparison"]] == ["reference", "chunked"]
    for heading in ("correctness gate green", "speed-up", "over inputs + outputs"):
        assert heading in shown.err


def test_a_red_gate_prints_no_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forward = chunked.forward

    def wrong(update: Any, *rest: Any) -> Any:
        return forward(update * 0.99, *rest)

    monkeypatch.setattr(chunked, "forward", wrong)
    assert dispatch(OP.split()) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "gate is red" in shown.err
    assert "ns/token" not in shown.err


def test_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert dispatch(TRAINING.split()) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["benchmark"] == "training"
    assert result["model"]["hidden_size"] == 16
    assert len(result["records"]) == 1
    assert "pip install transformers" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("op --backends chunky", "did you mean 'chunked'"),
        ("op --batch 0", "batch=0"),
        ("op --top-k 65", "top_k=65"),
        ("op --lengths 0", "lengths=(0,)"),
        ("op --device gpu", "'gpu'"),
        ("training --model.vocab-size 0", "vocab_size=0"),
    ],
)
def test_bad_usage(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["bench", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
