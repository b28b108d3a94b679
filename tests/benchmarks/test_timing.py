"""Clocks and allocation peaks."""

from __future__ import annotations

import time

import pytest
import torch

from factorization_memory.benchmarks import timing
from factorization_memory.benchmarks.timing import interleaved_seconds, paired_ratio, peak_bytes, summary

CPU = torch.device("cpu")


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 1e-9)
    calls = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU)
    assert "".join(calls[-6:]) == "ababab"
    assert [len(measured) for measured in seconds.values()] == [3, 3]


def test_seconds_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 0.02)
    count = 0

    def nap() -> None:
        nonlocal count
        count += 1
        time.sleep(0.004)

    seconds = interleaved_seconds({"nap": nap}, 1, CPU)["nap"]
    assert count >= 4  # short calls are repeated within a measurement
    assert 0.004 <= seconds[0] < 0.02


def test_statistics() -> None:
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    # The second round ran on a machine ten times slower: the ratio does not see it.
    assert paired_ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == 2.0


def test_peak_counts_what_lives_together() -> None:
    given = torch.ones(1000)

    def call() -> torch.Tensor:
        a = given + 1  # 4000 bytes
        b = a * 2  # 8000
        del a  # 4000
        c = torch.cat((b, b))  # 12000
        del b
        return c.view(2, 1000)[1].add_(1)  # views and in-place results are no new memory

    assert peak_bytes(call, CPU) == 12000
    assert peak_bytes(lambda: given.mul_(2), CPU) == 0


def test_peak_sees_the_backward_pass() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert peak_bytes(lambda: x.exp(), CPU) == 4000
    assert peak_bytes(lambda: torch.autograd.grad(x.exp().sum(), x), CPU) >= 8000
