"""The display may go away at any time; the run must not go with it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from factorization_memory._streams import BestEffortStream, ClosedStream, lacks
from factorization_memory.cli import dispatch
from factorization_memory.training.progress import RichProgress, ShieldedObserver, TrainingObserver

TINY = [
    "--model.hidden-size", "16", "--model.num-layers", "1", "--model.num-states", "8", "--data.context-length", "32",
    "--training.tokens-per-step", "128", "--training.evaluate-every", "0", "--training.evaluation-tokens", "256",
    "--training.checkpoint-every", "0", "--training.device", "cpu",
]  # fmt: skip


class Broken(io.StringIO):
    """A stream whose reader has left."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), OSError(5, "I/O error")])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_lost_console_ends_nothing(error: Exception, terminal: bool) -> None:
    progress = RichProgress(Console(file=Broken(error), force_terminal=terminal))
    progress.on_start(10, 1000, 0)
    for step in range(1, 11):
        progress.on_step({"step": step, "loss": 1.0, "bits_per_byte": 2.0, "tokens_per_second": 1.0})
    progress.on_sample({"step": 10, "samples": [{"prompt": "a", "text": "b"}]})
    progress.on_end()


def test_an_observer_that_loses_its_output_is_passed_over() -> None:
    told: list[str] = []

    class Lost(TrainingObserver):
        def on_message(self, message: str) -> None:
            told.append(message)
            raise BrokenPipeError(32, "Broken pipe")

        def on_step(self, metrics: dict[str, Any]) -> None:
            raise RuntimeError("a fault of its own")

    shielded = ShieldedObserver(Lost())
    shielded.on_message("first")
    shielded.on_message("second")
    assert told == ["first", "second"]
    with pytest.raises(RuntimeError, match="a fault of its own"):
        shielded.on_step({})


def test_characters_that_a_stream_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    BestEffortStream(stream).write("夏 [a]\n")
    stream.flush()
    assert raw.getvalue() == b"\\u590f [a]\n"
    assert lacks(stream, "夏")
    assert not lacks(stream, "a")


def test_a_stream_closed_here_or_before_the_start_takes_everything() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (BestEffortStream(None), BestEffortStream(closed)):
        assert stream.write("text") == 4
        stream.flush()
        assert not stream.isatty()
    with pytest.raises(OSError, match=r"closed before.*stdout"):
        ClosedStream("stdout").write("a result")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("streams")
    (folder / "text.txt").write_text("".join(f"It was {i} times {i}. それは{i}。\n" for i in range(900)), encoding="utf-8")
    assert dispatch(["data", "pack", str(folder / "text.txt"), "--output", str(folder / "packed"), "--holdout", "tail"]) == 0
    return str(folder / "packed")


def train(packed: str, folder: Path, steps: int) -> list[str]:
    command = [sys.executable, "-m", "factorization_memory.cli", "train", "demo", *TINY, "--data.corpus", packed]
    return [*command, "--run-dir", str(folder), "--training.steps", str(steps)]


def outcome(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))


def wait_until_under_way(folder: Path, look: Callable[[], None]) -> None:
    """Until a run has taken its first step; `look` is called again and again."""
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 0):
        assert time.monotonic() < deadline, "no step in two minutes"
        look()
        time.sleep(0.05)


def test_a_full_disk_under_the_log_ends_nothing(packed: str, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(train(packed, tmp_path / "run", 3), stderr=full, timeout=120)
    assert done.returncode == 0
    assert outcome(tmp_path / "run")["stopped"] == "finished"


def test_a_stderr_closed_before_the_start_gets_into_no_file(packed: str, tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *train(packed, tmp_path / "run", 3)]
    assert subprocess.run(command, timeout=120).returncode == 0
    assert outcome(tmp_path / "run")["stopped"] == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_reader_of_the_log_leaves_and_a_signal_follows(number: signal.Signals, packed: str, tmp_path: Path) -> None:
    running = subprocess.Popen(train(packed, tmp_path / "run", 100_000), stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None

    def look() -> None:
        assert running.poll() is None, f"ended before its first step: {running.stderr and running.stderr.read()}"

    wait_until_under_way(tmp_path / "run", look)
    running.stderr.close()
    running.send_signal(number)
    assert running.wait(timeout=120) == 128 + number
    stopped = outcome(tmp_path / "run")
    assert (stopped["stopped"], stopped["signal"]) == ("interrupted", number.name)
    assert (tmp_path / "run" / stopped["checkpoints"]["last"] / "state.json").exists()


def test_a_closed_terminal_leaves_a_checkpoint(packed: str, tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        command = train(packed, tmp_path / "run", 100_000)
        os.execvp(command[0], command)

    def look() -> None:
        os.set_blocking(terminal, False)
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 4096)

    wait_until_under_way(tmp_path / "run", look)
    os.close(terminal)  # the terminal hangs up: SIGHUP, and no more writing to it
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert outcome(tmp_path / "run")["signal"] == "SIGHUP"


def test_results_go_to_a_stdout_of_any_encoding(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "factorization_memory.cli", "generate", "--prompt", "夏目漱石😀", "--max-tokens", "4"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    said = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(b"\\u590f\\u76ee\\u6f31\\u77f3\\U0001f600")
    assert b"PYTHONIOENCODING=utf-8" in said.stderr
    told = subprocess.run([*command, "--json"], env=environment, capture_output=True, timeout=120)
    assert json.loads(told.stdout)[0]["prompt"] == "夏目漱石😀"


@pytest.mark.parametrize("where", ["1>&-", "1>/dev/full"])
def test_a_stdout_that_takes_no_result_is_told(where: str) -> None:
    command = ["sh", "-c", f'exec "$@" {where}', "sh", sys.executable, "-m", "factorization_memory.cli"]
    command += ["generate", "--prompt", "It was", "--max-tokens", "4", "--json"]
    said = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert said.returncode == 1
    assert "fmem: stdout: " in said.stderr
    assert "Traceback" not in said.stderr
