"""`fmem bench`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from factorization_memory.benchmarks import inference, op, step, step_contenders, timing, training
from factorization_memory.benchmarks.inference_models import RecurrentModel
from factorization_memory.benchmarks.interruption import Interruption
from factorization_memory.cli import dispatch
from factorization_memory.cli.common import wide_console
from factorization_memory.ops.memory import chunked
from factorization_memory.reports.terminal.op_benchmark import show_op_part

OP = (
    "bench op --device cpu --batch 1 --length 70 --num-states 4 --value-size 8 --lengths 64 --memory-length 64 --repeats 1 "
    "--json"
)
TRAINING = (
    "bench training --device cpu --batch 1 --lengths 16 --repeats 1 --json --model.vocab-size 20 --model.hidden-size 32 "
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
    assert [record["contender"] for record in result["comparison"]] == ["reference", "chunked", "attention"]
    assert result["command"] == f"fmem {OP}"
    assert set(result["missing"]) == {"gla", "ssd"}
    for heading in ("correctness gate passed", "speed-up", "to floor", "over inputs + outputs", "without gla"):
        assert heading in shown.err


def test_op_at_several_shapes_with_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "times.png"
    arguments = (
        f"bench op --device cpu --shapes 1x20x1x4x8 2x16x2x4x8x2 --lengths 16 --length-tokens 32 --memory-length 0 --repeats 1 "
        f"--peers --json --plot {path}"
    )
    assert dispatch(arguments.split()) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert [record["shape"] for record in result["comparison"]] == ["1x20x1x4x8"] * 2 + ["2x16x2x4x8x2"] * 2
    assert [(record["batch"], record["length"]) for record in result["lengths"]] == [(1, 16), (2, 16)]
    assert "B=2, T=16, H=2, M=4, D=8, K=2" in shown.err
    assert "constant tokens: slowest over fastest" in shown.err
    assert path.read_bytes().startswith(b"\x89PNG")


def test_results_outlive_a_plot_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert dispatch([*OP.split(), "--plot", str(tmp_path / "file" / "times.png")]) == 1
    assert json.loads(capsys.readouterr().out)["benchmark"] == "op"


def test_a_backend_that_fails_later_is_told_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = chunked.forward

    def failing(update: Any, *rest: Any) -> Any:
        if update.shape[1] == 64:
            raise RuntimeError("not at this length")
        return forward(update, *rest)

    monkeypatch.setattr(chunked, "forward", failing)
    assert dispatch(OP.split()) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["lengths"][0]["error"] == "forward: RuntimeError: not at this length"
    assert "chunked: forward: RuntimeError: not at this length" in shown.err


def test_a_red_gate_prints_no_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forward = chunked.forward

    def wrong(update: Any, *rest: Any) -> Any:
        return forward(update * 0.99, *rest)

    monkeypatch.setattr(chunked, "forward", wrong)
    assert dispatch(OP.split()) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "gate failed" in shown.err
    assert "ns/token" not in shown.err


def test_the_tables_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    def figures(graph: float | None, floor: float | None) -> dict[str, float | None]:
        rates = dict.fromkeys(("gigabytes_per_second", "teraflops_per_second"), floor and 12.3)
        times = {"ns_per_token": 4.04, "graph_ns_per_token": graph, "ratio_to_floor": floor, "time_over_first": 2.9}
        return rates | times

    shape = {"batch": 16, "length": 2048, "heads": 1, "num_states": 64, "value_size": 2048, "top_k": None}
    common = {"error": None, "peer": False, "note": "", "extra_ratio": 0.25} | shape
    records = [
        common | {"contender": "triton", "forward": figures(3.91, 2.1), "forward_backward": figures(None, 2.2)},
        common | {"contender": "gla", "peer": True, "error": "forward: too large", "forward": None, "forward_backward": None},
        common
        | {"contender": "attention", "peer": True, "note": "heads", "forward": figures(1, None), "forward_backward": None},
    ]
    show_op_part("comparison", records, wide_console())
    show_op_part("lengths", [record | {"sweep": "one sequence"} for record in records], wide_console())
    shown = capsys.readouterr().err
    assert "to triton" in shown
    (ours,) = [line for line in shown.splitlines() if line.split()[:2] == ["triton", "fwd"]]
    assert ours.split() == ["triton", "fwd", "4.04", "3.91", "12.3", "12.3", "2.10x", "2.90x"]
    assert "gla: forward: too large" in shown
    assert "attention: heads" in shown
    assert ["triton", "16", "2,048", "4.04", "3.91", "4.04"] in [line.split() for line in shown.splitlines()]


def test_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert dispatch(TRAINING.split()) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["benchmark"] == "training"
    assert result["model"]["hidden_size"] == 32
    assert len(result["records"]) == 1
    assert "pip install transformers" in shown.err
    assert "MFU" in shown.err
    assert result["command"] == f"fmem {TRAINING}"


INFERENCE = (
    "bench inference --device cpu --contexts 8 32 --batches 1 2 --top-k 0 2 --decode-tokens 3 --repeats 1 --json "
    "--model.vocab-size 20 --model.hidden-size 16 --model.num-layers 1 --model.num-states 4"
)


def test_inference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.png"
    assert dispatch([*INFERENCE.split(), "--plot", str(path)]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    result = json.loads(shown.out)
    assert result["benchmark"] == "inference"
    assert result["command"] == f"fmem {INFERENCE} --plot {path}"
    assert result["model"]["hidden_size"] == 16
    assert len(result["records"]) == 8
    for heading in ("ours dense", "ours K=2", "first token ms", "p99 ms", "to floor", "slowest over fastest"):
        assert heading in shown.err
    assert path.read_bytes().startswith(b"\x89PNG")


def test_inference_that_reads_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch([*INFERENCE.split(), "--prefill-seconds", "0"]) == 0
    assert "random numbers in place of a state" in capsys.readouterr().err


def test_a_size_of_ours_that_fails_is_told_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(self: RecurrentModel, batch: int, steps: int) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(RecurrentModel, "begin", failing)
    assert dispatch(INFERENCE.split()) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["records"][0]["error"] == "RuntimeError: no room"
    assert "ours dense at 1 x 8 tokens: RuntimeError: no room" in shown.err


STEP = "bench step --device cpu --batches 1 2 --num-states 8 --top-k 0 3 9 --value-size 4 --rollbacks 1 2 --repeats 1 --json"


def test_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(step_contenders, "MOST_STEPS", 4)
    assert dispatch(STEP.split()) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    result = json.loads(shown.out)
    assert (result["benchmark"], result["dtype"]) == ("step", "float32")
    assert result["command"] == f"fmem {STEP}"
    assert [(record["batch"], record["top_k"]) for record in result["steps"]] == [(1, None), (1, 3), (2, None), (2, 3)]
    assert len(result["rollbacks"]) == 4
    for heading in ("correctness gate passed", "B=2, H=1, M=8, D=4", "faster than dense", "steps rolled back", "copies"):
        assert heading in shown.err


def test_a_wrong_step_prints_no_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = step_contenders.recurrence_step
    monkeypatch.setattr(step_contenders, "recurrence_step", lambda update, *rest, **named: right(update * 0.99, *rest, **named))
    assert dispatch(STEP.split()) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "gate failed" in shown.err
    assert "faster than dense" not in shown.err


def test_a_step_that_fails_later_is_told_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(step, "_calls", failing)
    assert dispatch(STEP.split()) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["steps"][0]["error"] == "RuntimeError: no room"
    assert "B=1, H=1, M=8, D=4, K dense, float32: RuntimeError: no room" in shown.err
    assert "K 3, 2 back: RuntimeError: no room" in shown.err


STOPPED = [
    (f"{OP} --shapes 1x20x1x4x8 1x16x1x4x8".replace("--batch 1 --length 70 --num-states 4 --value-size 8 ", ""), op, "measure"),
    (STEP, step, "_measure"),
    (INFERENCE, inference, "_measure_batch"),
    (TRAINING.replace("--lengths 16", "--lengths 16 32"), training, "interleaved_seconds"),
    (TRAINING.replace("--lengths 16", "--lengths 16 32"), training, "peak_bytes"),
]


@pytest.fixture
def handled() -> Iterator[None]:
    """Signals that nobody handles fail the test instead of ending the tests."""

    def unhandled(number: int, frame: Any) -> None:
        raise AssertionError(f"signal {number} was not handled")

    before = {each: signal.signal(each, unhandled) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert all(signal.getsignal(each) is unhandled for each in before)
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("arguments", "module", "name"), STOPPED, ids=["op", "step", "inference", "training", "training, in a record"]
)
def test_what_was_measured_outlives_a_signal(
    arguments: str, module: Any, name: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], handled: None,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(step_contenders, "MOST_STEPS", 4)
    measure, calls = getattr(module, name), iter((False, True))

    def stopped_the_second_time(*rest: Any, **named: Any) -> Any:
        if next(calls):
            os.kill(os.getpid(), number)
        return measure(*rest, **named)

    monkeypatch.setattr(module, name, stopped_the_second_time)
    assert dispatch(arguments.split()) == 128 + number
    shown = capsys.readouterr()
    assert f"stopped by {number.name}" in shown.err
    assert "slowest over fastest" not in shown.err
    result = json.loads(shown.out)
    assert result["interrupted"] == number.name
    if module is op:
        assert {record["shape"] for record in result["comparison"]} == {"1x20x1x4x8"}
        assert "B=1, T=20" in shown.err
    elif module is step:
        assert {record["batch"] for record in result["steps"]} == {1}
        assert "B=1, H=1" in shown.err
    elif module is inference:
        stopped = f"stopped by {number.name}"
        assert [record["error"] for record in result["records"]] == [None, None, stopped, stopped]
        assert "ours dense at 2 x 8 tokens: stopped by" in shown.err
        assert "p99 ms" in shown.err
    else:
        assert [(record["length"], record["mfu"] is None) for record in result["records"]] == [(16, False)]


def test_a_stopped_sweep_shows_what_it_has_and_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], handled: None
) -> None:
    measure, calls = op.measure, iter((False, False, True))

    def stopped_the_third_time(*rest: Any, **named: Any) -> Any:
        if next(calls):
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*rest, **named)

    monkeypatch.setattr(op, "measure", stopped_the_third_time)
    arguments = OP.replace("--lengths 64", "--lengths 16 32").split()
    assert dispatch([*arguments, "--plot", str(tmp_path / "times.png")]) == 128 + signal.SIGTERM
    shown = capsys.readouterr()
    assert [record["length"] for record in json.loads(shown.out)["lengths"]] == [16]
    assert "one sequence" in shown.err
    assert "times.png: not drawn" in shown.err.replace("\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_before_anything_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], handled: None
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(training, "interleaved_seconds", lambda *rest, **named: os.kill(os.getpid(), signal.SIGTERM))
    assert dispatch(TRAINING.split()) == 128 + signal.SIGTERM
    assert json.loads(capsys.readouterr().out)["records"] == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_a_destructor_swallowed_is_not_forgotten(handled: None) -> None:
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # time for the handler, which runs between instructions
                pass

    reached = []
    with Interruption() as interruption:
        one = Dying()
        del one
        reached.append("here")
        interruption.check()
        reached.append("there")
    assert (interruption.signal, reached) == ("SIGTERM", ["here"])


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
        assert (interruption.signal, signal.getsignal(signal.SIGINT)) == (None, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGINT, before)


def test_peers_whose_heads_do_not_fit_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert dispatch(TRAINING.replace("--model.hidden-size 32", "--model.hidden-size 24").split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert [record["model"] for record in result["records"]] == ["factorization-memory", "llama"]
    assert "no mamba2: its heads need a hidden_size that is a multiple of 32" in result["missing"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("op --backends chunky", "did you mean 'chunked'"),
        ("op --batch 0", "batch=0"),
        ("op --top-k 65", "--top-k=65"),
        ("op --lengths 0", "lengths=(0,)"),
        ("op --length-tokens -1", "--length-tokens=-1"),
        ("op --shapes 16x2048", "write BxTxHxMxD"),
        ("op --shapes 1x2x1x4x8 --batch 3", "batch=3: cannot be combined with shapes"),
        ("op --plot times.pdf", "times.pdf"),
        ("op --device gpu", "'gpu'"),
        ("training --model.vocab-size 20 --llama-heads 0", "--llama-heads=0"),
        ("inference --contexts 0", "contexts=(0,)"),
        ("inference --batches 0", "batches=(0,)"),
        ("inference --top-k 65", "--top-k=(65,)"),
        ("inference --plot speed.pdf", "speed.pdf"),
        ("inference --device gpu", "'gpu'"),
        ("inference --threads -1", "threads=-1"),
        ("inference --model.vocab-size 0", "vocab_size=0"),
        ("step --batches 0", "batches=(0,)"),
        ("step --top-k 2000", "--top-k=(2000,): exceeds every num_states=(256, 1024)"),
        ("step --rollbacks 0", "rollbacks=(0,)"),
        ("step --repeats 0", "repeats=0"),
        ("step --device gpu", "'gpu'"),
        ("step --threads -1", "threads=-1"),
        ("training --model.vocab-size 0", "vocab_size=0"),
        ("training --peak-tflops nan", "--peak-tflops=nan"),
    ],
)
def test_bad_usage(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["bench", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
