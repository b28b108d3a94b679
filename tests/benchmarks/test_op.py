"""The benchmark of the recurrence: a red gate measures nothing; records hold what they say."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from factorization_memory.benchmarks import op, op_measuring, peers, timing
from factorization_memory.benchmarks.floor import Rates
from factorization_memory.benchmarks.op_settings import OpPeer
from factorization_memory.benchmarks.settings import Shape
from factorization_memory.config import ConfigError
from factorization_memory.ops.memory import chunked

CPU = torch.device("cpu")
SHAPE = Shape(2, 130, 1, 8, 16)
SMALL = op.OpBenchmark(("chunked",), (), (str(SHAPE),), lengths=(64, 128), length_tokens=256, memory_length=256, repeats=1)
RATES = Rates(1e9, 1e9, "made up")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 1e-9)
    monkeypatch.setattr(op, "measure_rates", lambda device: RATES)


def test_records() -> None:
    told: list[str] = []
    shown: list[tuple[str, int]] = []
    result = op.run(SMALL, CPU, told.append, lambda section, records: shown.append((section, len(records))))
    assert json.loads(json.dumps(result)) == result
    reference, ours = result["comparison"]
    assert reference["contender"] == result["baseline"] == "reference"
    assert reference["forward"]["speedup"] == 1.0
    both = ours["forward_backward"]
    assert both["ns_per_token"] == pytest.approx(both["seconds"]["median"] / 260 * 1e9)
    least = result["floors"]["2x130x1x8x16"]["forward_backward"]
    assert both["ratio_to_floor"] == pytest.approx(both["ns_per_token"] / least["ns_per_token"])
    assert both["gigabytes_per_second"] == pytest.approx(least["bytes_per_token"] / both["ns_per_token"])
    assert both["teraflops_per_second"] == pytest.approx(least["flops_per_token"] / both["ns_per_token"] / 1000)
    assert both["graph_ns_per_token"] is None  # there are no graphs on a CPU
    sweeps = [(record["sweep"], record["batch"], record["length"]) for record in result["lengths"]]
    assert sweeps == [
        ("one sequence", 1, 64), ("one sequence", 1, 128), ("constant tokens", 4, 64), ("constant tokens", 2, 128)
    ]  # fmt: skip
    times = [record["forward"]["ns_per_token"] for record in result["lengths"][:2]]
    assert result["length_spread"][0]["forward"] == pytest.approx(max(times) / min(times))
    assert told[0] == "correctness gate"
    assert shown == [("checks", 2), ("comparison", 2), ("lengths", 4), ("memory", 1)]


def test_every_shape_is_gated_and_compared_and_the_longest_at_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "GATE_TOKENS", 20)
    monkeypatch.setattr(op, "GATE_LONG", 40)
    shapes = (Shape(3, 30, 1, 4, 8), Shape(1, 60, 2, 5, 4, 2), Shape(1, 25, 1, 4, 8))
    benchmark = op.OpBenchmark(peers=(), shapes=tuple(map(str, shapes)), lengths=(), memory_length=0, repeats=1)
    checked = [(check["backend"], check["shape"]) for check in op.gate(benchmark, CPU)]
    assert checked == [
        ("reference", "1x20x1x4x8"),  # the same widths are checked once
        ("chunked", "1x20x1x4x8"),
        ("reference", "1x20x2x5x4x2"),
        ("chunked", "1x20x2x5x4x2"),
        ("chunked", "1x40x2x5x4x2"),
    ]
    compared = [record["shape"] for record in op.run(benchmark, CPU)["comparison"]]
    assert compared == [str(shape) for shape in shapes for _ in range(2)]


def test_peers_stand_beside_and_their_trouble_stays_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: Any) -> Any:
        raise ValueError("no such size")

    def dying(problem: Any) -> peers.Contender:
        def function(*leaves: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("no memory\nand a long story")

        return peers.Contender("dying", function, problem.leaves(), problem.d_output, peer=True)

    monkeypatch.setattr(peers, "BUILDERS", peers.BUILDERS | {"broken": broken, "dying": dying})
    missing: dict[str, str] = {}
    names = ("gla", "attention", "broken", "dying")
    records = op.measure(SHAPE, ("chunked",), torch.float32, CPU, 1, RATES, names, missing)
    assert list(missing) == ["gla"]
    found = {record["contender"]: record for record in records}
    assert set(found) == {"chunked", "attention", "broken", "dying"}
    assert found["broken"]["error"] == "ValueError: no such size"
    assert found["dying"]["error"] == "forward: OutOfMemoryError: no memory"
    assert found["dying"]["forward"] is found["dying"]["forward_backward"] is None
    ours, attention = found["chunked"], found["attention"]
    assert ours["error"] is attention["error"] is None
    assert ours["forward"]["time_over_first"] == 1.0  # without the reference ratios are to the first backend
    assert attention["forward"]["time_over_first"] > 0
    assert attention["forward"]["ratio_to_floor"] is None  # other maths
    assert ours["extra_bytes"] > 0
    assert ours["extra_ratio"] == pytest.approx(ours["extra_bytes"] / (2 * 4 * 260 * 16))


def test_a_backend_that_fails_after_the_gate_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(chunked, "forward", failing)
    first, second = op.measure(SHAPE, ("chunked", "reference"), torch.float32, CPU, 1, RATES)
    assert first["error"] == "forward: OutOfMemoryError: too large"
    assert second["error"] is None
    assert second["forward"]["time_over_first"] is None
    assert op.measure_memory(SHAPE, "chunked", torch.float32, CPU)["error"] == "OutOfMemoryError: too large"


def test_memory_counts_inputs_outputs_and_gradients() -> None:
    record = op.measure_memory(Shape(1, 256, 1, 8, 16), "chunked", torch.float32, CPU)
    assert record["input_output_bytes"] == record["gradient_bytes"] == 4 * 256 * (8 + 8 + 16 + 16)
    assert record["peak_bytes"] >= record["input_output_bytes"] + record["gradient_bytes"]
    assert record["ratio"] == pytest.approx(2 * record["ratio_with_gradients"])
    # Standing before: inputs and the output's gradient. Made by the call: output, gradients, and what is extra.
    assert record["peak_bytes"] == 2 * record["input_output_bytes"] + record["extra_bytes"]


def test_chunked_memory_stays_near_its_inputs_and_outputs() -> None:
    record = op.measure_memory(Shape(1, 16384, 1, 16, 128), "chunked", torch.float32, CPU)
    assert record["ratio"] <= 3


def test_a_wrong_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = chunked.forward

    def wrong(update: Any, *rest: Any) -> Any:
        return forward(update * 0.99, *rest)

    monkeypatch.setattr(chunked, "forward", wrong)
    monkeypatch.setattr(op, "measure", lambda *arguments: pytest.fail("a wrong backend was timed"))
    monkeypatch.setattr(op, "measure_rates", lambda device: pytest.fail("rates were measured before the gate"))
    with pytest.raises(op.IncorrectBackendError, match=r"gate failed.*chunked at 2x130x1x8x16 \(relative error") as caught:
        op.run(SMALL, CPU)
    assert [result["passed"] for result in caught.value.checks] == [True, False]


def test_defaults_by_device() -> None:
    assert op.OpBenchmark().backends_on("cpu") == ("chunked",)
    assert op.OpBenchmark(("reference", "chunked", "reference")).backends_on("cpu") == ("reference", "chunked")
    pytest.importorskip("triton")
    assert op.OpBenchmark().backends_on("cuda") == ("triton", "chunked")


def test_bad_benchmarks() -> None:
    with pytest.raises(ConfigError, match="reference is not timed on GPUs"):
        op.run(op.OpBenchmark(backends=("triton", "reference")), torch.device("cuda", 0))
    for arguments, message in (
        ({"peers": ("flash",)}, "flash"),
        ({"backends": ("chonked",)}, r"unknown backend 'chonked'; .*chunked"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"shapes": ("2x3",)}, "write BxTxHxMxD"),
        ({"shapes": ("2x3x1x4x5",), "batch": 3}, "batch=3: cannot be combined with shapes"),
        ({"top_k": 65}, "use 1 to num_states=64"),
        ({"memory_length": -1}, "memory_length=-1: use 0"),
        ({"lengths": (0,)}, "lengths of 1 or more"),
        ({"repeats": 0}, "repeats=0"),
        ({"heads": 0}, "heads=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            op.OpBenchmark(**arguments)  # type: ignore[arg-type]


def test_sizes() -> None:
    assert set(get_args(OpPeer)) == set(peers.PEERS)
    assert op.OpBenchmark(shapes=("2x3x1x4x5x2", "1x2x3x4x5")).sizes == (Shape(2, 3, 1, 4, 5, 2), Shape(1, 2, 3, 4, 5))
    assert op.OpBenchmark(batch=2, top_k=3).sizes == (Shape(batch=2, top_k=3),)


def test_on_a_gpu_ratios_are_to_the_first_backend_and_graphs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches for GPUs, on a CPU that is taken for one."""
    gpu: Any = SimpleNamespace(type="cuda")
    random = op.Problem.random

    def on_cpu(shape: Shape, dtype: torch.dtype, device: Any, **options: Any) -> op.Problem:
        return random(shape, dtype, CPU, **{name: x for name, x in options.items() if name != "drawn_on"})

    def replayed(call: Any, repeats: int, device: Any) -> list[float]:
        if "forward_backward" in str(call):
            raise RuntimeError("called a synchronizing operation\nsomewhere")
        return [260e-9] * repeats

    monkeypatch.setattr(op.Problem, "random", on_cpu)
    monkeypatch.setattr(op, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(op, "machine", lambda device: {"name": "made up"})
    for module in (op, op_measuring, timing):
        monkeypatch.setattr(module, "release", lambda device: None)
    monkeypatch.setattr(timing, "device_clock", lambda device: lambda call, calls, device: timing._seconds(call, calls, CPU))
    monkeypatch.setattr(op_measuring, "graph_seconds", replayed)
    monkeypatch.setattr(op_measuring, "peak_bytes", lambda call, device: timing.peak_bytes(call, CPU))
    result = op.run(dataclasses.replace(SMALL, peers=("gla", "attention")), gpu)
    assert result["baseline"] == "chunked"
    assert [check["backend"] for check in result["checks"]] == ["chunked"]
    ours, attention = result["comparison"]
    assert ours["forward"]["time_over_first"] == 1.0
    assert "speedup" not in ours["forward"]
    assert attention["contender"] == "attention"
    assert ours["forward"]["graph_ns_per_token"] == pytest.approx(1.0)
    assert ours["forward_backward"]["graph_ns_per_token"] is None
    assert ours["forward_backward"]["graph_error"] == "RuntimeError: called a synchronizing operation"
    assert result["length_spread"][0]["graph_forward"] == pytest.approx(2.0)  # the same time for 64 and 128 tokens
    assert result["length_spread"][0]["graph_forward_backward"] is None
