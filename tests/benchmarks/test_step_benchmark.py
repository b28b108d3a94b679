"""The benchmark of one step and of steps taken back."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from factorization_memory.benchmarks import step, step_contenders, step_correctness, timing
from factorization_memory.benchmarks.correctness import IncorrectBackendError
from factorization_memory.benchmarks.floor import Rates
from factorization_memory.benchmarks.settings import Shape
from factorization_memory.benchmarks.step import StepBenchmark
from factorization_memory.benchmarks.step_contenders import Contender, Tokens
from factorization_memory.config import ConfigError

CPU = torch.device("cpu")
SMALL = StepBenchmark(batches=(1,), num_states=(8,), top_k=(0, 3), value_size=4, rollbacks=(2,), repeats=2)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 1e-9)
    monkeypatch.setattr(step_contenders, "FLUSH_BYTES", 1000)
    monkeypatch.setattr(step, "measure_rates", lambda device: Rates(1e9, 1e12, "none"))


def test_every_size_is_measured() -> None:
    benchmark = StepBenchmark((3, 1), (8, 4), (3, 0, 6, 3), value_size=5, heads=2, rollbacks=(4, 1), repeats=2)
    shown: list[tuple[str, int]] = []
    result = step.run(benchmark, CPU, show=lambda section, records: shown.append((section, len(records))))
    assert json.loads(json.dumps(result)) == result
    assert shown == [("checks", 10)] + 2 * [("steps", 2), ("rollbacks", 2), ("steps", 3), ("rollbacks", 4)]
    sizes = [(r["batch"], r["num_states"], r["top_k"]) for r in result["steps"]]
    assert sizes == [(b, m, k) for b in (1, 3) for m, some in ((4, (None, 3)), (8, (None, 6, 3))) for k in some]
    for record in result["steps"]:
        assert record["error"] is None
        assert record["state"] == "float32"
        rows = record["batch"] * 2 * (record["top_k"] or record["num_states"]) * 5 * 4
        assert record["step_bytes"] == 2 * rows
        assert record["touched_bytes"] == record["steps"] * rows >= 1000
        assert record["bytes_per_second"] == pytest.approx(2 * rows / record["seconds"]["median"])
        assert record["copy_share"] == pytest.approx(record["bytes_per_second"] / 1e9)
        assert record["speedup"] == 1 if record["top_k"] is None else record["speedup"] > 0
    taken_back = [(r["batch"], r["num_states"], r["top_k"], r["count"]) for r in result["rollbacks"]]
    assert taken_back == [(*size, count) for size in sizes if size[2] for count in (1, 4)]
    for record in result["rollbacks"]:
        assert record["error"] is None
        assert record["copy_over_rollback"] > 0
        assert record["seconds"]["min"] > 0
        assert record["copy_seconds"]["min"] > 0


def test_without_the_dense_form_nothing_is_compared_with_it() -> None:
    (record,) = step.run(StepBenchmark((1,), (8,), (3,), 4, rollbacks=(), repeats=1), CPU)["steps"]
    assert record["seconds"] is not None
    assert record["speedup"] is None


def test_steps_go_round_over_as_many_rows_as_do_not_fit_a_cache() -> None:
    contender = Contender(Shape(2, 1, 3, 8, 5, 3), torch.float32, least=1)  # 360 bytes a step
    assert (contender.steps, contender.steps_of_a_memory, contender.memories) == (3, 2, 2)
    assert [contender.memory_of(number) for number in range(3)] == [0, 0, 1]
    indices = Tokens.random(contender.shape, 5, torch.float32, CPU).indices
    assert indices is not None
    assert indices.shape == (5, 2, 3, 3)
    for first in (0, 2):  # the two steps of one memory share no row
        together = torch.cat([indices[first], indices[first + 1]], -1).sort(-1).values
        assert (together.diff(dim=-1) > 0).all()
    assert indices.min() >= 0
    assert indices.max() < 8
    assert Contender(contender.shape, torch.float32, least=9).steps == 9
    assert Contender(Shape(2, 1, 3, 8, 5), torch.bfloat16, least=1).steps == 3


def test_what_is_timed_takes_steps_back() -> None:
    contender = Contender(Shape(2, 1, 1, 6, 4, 2), torch.float32, least=4)
    tokens = Tokens.random(contender.shape, contender.steps, torch.float32, CPU)
    memories = torch.randn(contender.memories, 2, 1, 6, 4)
    before = memories.clone()
    aside = torch.empty(contender.steps, 2, 1, 2, 4)
    assert tokens.indices is not None
    for number in range(contender.steps):
        rows = tokens.indices[number, ..., None].expand(-1, -1, -1, 4)
        aside[number] = memories[contender.memory_of(number)].gather(2, rows)
    step._stepping(contender, tokens, memories, CPU)()
    assert not torch.equal(memories, before)
    step._taking_back(contender, tokens, memories, aside, 1)()
    assert torch.equal(memories, before)


@pytest.mark.parametrize("fault", ["output", "change", "not finite", "not back", "raises"])
def test_a_wrong_step_is_not_timed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, back = step_contenders.recurrence_step, step_correctness.recurrence_undo

    def wrong(update: Any, merge: Any, value: Any, state: Any, *rest: Any, **named: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("no such kernel")
        y = right(update, merge, value, state, *rest, **named)
        if fault == "change":
            state.mul_(1.001)
        return {"output": y * 1.001, "not finite": y / 0}.get(fault, y)

    def not_back(state: Any, *rest: Any) -> None:
        back(state, *rest)
        state[0, 0, 0, 0] += fault == "not back"

    def timed(*arguments: Any) -> Any:
        raise AssertionError("timed")

    monkeypatch.setattr(step_contenders, "recurrence_step", wrong)
    monkeypatch.setattr(step_correctness, "recurrence_undo", not_back)
    monkeypatch.setattr(step, "_measure", timed)
    wanted = {"raises": "RuntimeError: no such kernel", "not back": "does not restore"}.get(fault, fault)
    with pytest.raises(IncorrectBackendError, match=rf"gate failed.* at 1x1x1x8x4.*{wanted}"):
        step.run(SMALL, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gate_is_green(dtype: torch.dtype) -> None:
    found = step.check(Contender(Shape(4, 1, 2, 8, 33, 3), torch.float32, 1), dtype, CPU)
    assert found["passed"], found


def test_a_size_that_fails_is_told_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = step._calls

    def failing(group: list[Contender], *rest: Any) -> Any:
        if group[0].shape.batch == 2:
            raise RuntimeError("no room")
        made = calls(group, *rest)

        def broken() -> None:
            raise RuntimeError("not this one")

        return made | {step.COPY: (broken, 1)}

    monkeypatch.setattr(step, "_calls", failing)
    result = step.run(StepBenchmark((1, 2), (8,), (0, 3), 4, rollbacks=(1,), repeats=1), CPU)
    assert [record["error"] for record in result["steps"]] == [None, None, *2 * ["RuntimeError: no room"]]
    assert [r["error"] for r in result["rollbacks"]] == ["RuntimeError: not this one", "RuntimeError: no room"]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_bfloat16_memory_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not step.rounds_at_random(torch.float32, CPU)
    monkeypatch.setattr(step, "rounds_at_random", lambda dtype, device: True)
    monkeypatch.setattr(step_contenders, "FLUSH_BYTES", 1)
    result = step.run(SMALL, CPU)
    kinds = [(r["top_k"], r["state"], r["step_bytes"]) for r in result["steps"]]
    assert kinds == [(k, *kind) for k, kind in (
        (None, ("float32", 256)), (None, ("bfloat16", 128)), (3, ("float32", 96)), (3, ("bfloat16", 48)),
    )]  # fmt: skip
    assert all(record["error"] is None and record["speedup"] > 0 for record in result["steps"])
    assert len(result["rollbacks"]) == 1
    assert [check["tolerance"] for check in result["checks"]] == [1e-5, step_correctness.ROUNDED_TOLERANCE] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": ()}, r"batches=\(\): use one or more numbers"),
        ({"batches": (1, 0)}, r"batches=\(1, 0\): use one or more numbers, each 1 or more"),
        ({"num_states": (0,)}, r"num_states=\(0,\)"),
        ({"rollbacks": (0,)}, r"rollbacks=\(0,\)"),
        ({"top_k": ()}, r"top_k=\(\)"),
        ({"top_k": (-1, 3)}, r"top_k=\(-1, 3\)"),
        ({"top_k": (9,), "num_states": (8, 4)}, r"top_k=\(9,\): exceeds every num_states=\(8, 4\)"),
        ({"value_size": 0}, "value_size=0: use 1 or more"),
        ({"heads": 0}, "heads=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"dtype": "float64"}, "dtype='float64': use one of auto, float32, bfloat16, float16"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepBenchmark(**settings)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu(dtype: str) -> None:
    benchmark = StepBenchmark((1, 5), (100,), (0, 7), value_size=193, heads=2, dtype=dtype, rollbacks=(1, 3), repeats=2)
    result = step.run(benchmark, torch.device("cuda"))
    assert {record["state"] for record in result["steps"]} <= {"float32", "bfloat16"}
    assert [r["error"] for r in (*result["steps"], *result["rollbacks"])] == [None] * (len(result["steps"]) + 4)
