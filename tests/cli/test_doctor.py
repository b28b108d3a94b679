"""`fmem doctor`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from factorization_memory.cli import dispatch
from factorization_memory.ops.memory import chunked


@pytest.fixture(autouse=True)
def as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not interpreted on the CPU, as tests otherwise have it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_findings(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["doctor", "--json"]) == 0
    shown = capsys.readouterr()
    findings = json.loads(shown.out)
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["cpu"]["cores"] >= 1
    assert {check["backend"] for check in findings["checks"]} >= {"reference", "chunked"}
    assert all(check["passed"] for check in findings["checks"])
    assert bool(findings["gpus"]) == torch.cuda.is_available() == (findings["no_gpu"] is None)
    assert "all backends that can run here are correct" in shown.err
    assert [(one["backend"], one["device"]) for one in findings["skipped"]] == [
        ("triton-dense", "cpu"),
        ("triton-sparse", "cpu"),
    ]
    assert "triton-dense not on cpu: value is on the CPU" in shown.err


def test_people_alone_get_nothing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["doctor"]) == 0
    assert capsys.readouterr().out == ""


def test_a_broken_backend_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no such chip")

    monkeypatch.setattr(chunked, "forward", broken)
    assert dispatch(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    assert not json.loads(shown.out)["passed"]
    assert "fail" in shown.err
