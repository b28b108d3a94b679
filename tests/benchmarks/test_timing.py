"""Clocks and allocation peaks."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


class Clock:
    """A device whose queue is worked off at once: time passes by what is asked of it, in milliseconds."""

    now = 0.0
    log: tuple[str, ...] = ()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

        def wait_stream(self, other: Stream) -> None:
            clock.log += ("wait",)

    class Graph:
        def replay(self) -> None:
            clock.now += 2
            clock.log += ("replay",)

        def reset(self) -> None:
            clock.log += ("reset",)

    @contextmanager
    def block(thing: object) -> Iterator[None]:
        clock.log += (f"in {type(thing).__name__}",)
        yield
        clock.log += ("out",)

    monkeypatch.setattr(timing, "FLUSH_BYTES", 16)
    monkeypatch.setattr(timing, "synchronise", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", block)
    monkeypatch.setattr(torch.cuda, "graph", block)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(clock, "log", (*clock.log, mode)))
    return clock


def test_a_devices_clock_times_calls_alone(clock: Clock) -> None:
    def call() -> None:
        clock.now += 3

    seconds = timing.device_clock(CPU)
    assert seconds(call, 4, CPU) == pytest.approx(0.003)


def test_a_graph_is_captured_after_a_trial_and_replayed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(contenders: Any, repeats: int, device: torch.device, cold: bool) -> dict[str, list[float]]:
        assert cold
        seconds = timing.device_clock(device)
        return {name: [seconds(call, 1, device) for _ in range(repeats)] for name, call in contenders.items()}

    monkeypatch.setattr(timing, "interleaved_seconds", interleaved)

    def call() -> None:
        clock.log += ("call",)

    assert timing.graph_seconds(call, 2, CPU) == pytest.approx([0.002, 0.002])
    assert clock.log == (
        "wait", "in Stream", "call", "error", "call", "default", "out", "wait",
        "in Graph", "call", "out", "replay", "replay", "reset",
    )  # fmt: skip


def test_what_waits_for_the_device_is_not_captured(clock: Clock) -> None:
    def call() -> None:
        if clock.log[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        timing.graph_seconds(call, 2, CPU)
    assert clock.log[-1] == "default"
    assert "in Graph" not in clock.log


def test_a_contender_that_fails_drops_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 1e-9)
    calls = 0

    def late() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise ValueError("worn out\nat last")

    def never() -> None:
        raise RuntimeError

    contenders = {"never": never, "late": late, "fine": lambda: None}
    failures: dict[str, str] = {}
    seconds = interleaved_seconds(contenders, 3, CPU, failures=failures)
    assert failures == {"never": "RuntimeError: no message", "late": "ValueError: worn out"}
    assert list(seconds) == ["fine"]
    assert len(seconds["fine"]) == 3
    assert gc.get_freeze_count() == 0
    with pytest.raises(RuntimeError):
        interleaved_seconds({"never": never}, 1, CPU)


def test_machine_names_what_figures_depend_on() -> None:
    where = timing.machine(CPU)
    assert where["torch"] == torch.__version__
    assert set(where["packages"]) <= set(timing.PACKAGES)
