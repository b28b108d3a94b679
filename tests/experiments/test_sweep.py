"""A sweep from a Python function: planned, run, killed, resumed, read."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from factorization_memory.cli import dispatch
from factorization_memory.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig
from factorization_memory.data.shards import PackedCorpus
from factorization_memory.experiments import sweep as sweeps
from factorization_memory.experiments.sweep import Sweep, SweepRun, load_sweep
from factorization_memory.experiments.sweep_folder import planned_tokens, seconds_left, sweep_status
from factorization_memory.runs.names import FAILURE_NAME, RESULT_NAME
from factorization_memory.runs.points import read_points


def small(corpus: Path, seed: int = 0, steps: int = 4) -> RunConfig:
    return RunConfig(
        model=ModelConfig(hidden_size=8, num_layers=1, num_states=4, top_k=2),
        data=DataConfig(corpus=str(corpus), context_length=16),
        training=TrainingConfig(
            steps=steps, tokens_per_step=32, seed=seed, device="cpu", log_every=1, evaluate_every=0, evaluation_tokens=64,
            checkpoint_every=2,
        ),
    )  # fmt: skip


FUNCTION = """
from pathlib import Path
from factorization_memory.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from factorization_memory.experiments.sweep import SweepRun

def seeds(steps=4):
    for seed in (0, 1):
        config = RunConfig(
            model=ModelConfig(hidden_size=8, num_layers=1, num_states=4, top_k=2),
            data=DataConfig(corpus={corpus!r}, context_length=16),
            training=TrainingConfig(steps=steps, tokens_per_step=32, seed=seed, device="cpu", log_every=1, evaluate_every=0,
                                    evaluation_tokens=64, checkpoint_every=2),
        )
        yield SweepRun(config, labels={{"seed": seed}}, evaluation={{"max_position": 16, "max_tokens": 64, "stretches": 1}})

def long():
    yield from seeds(100_000)
"""


@pytest.fixture
def packed(corpus: PackedCorpus) -> Path:
    return corpus.folder


@pytest.fixture
def function(tmp_path: Path, packed: Path) -> Path:
    path = tmp_path / "grid.py"
    path.write_text(FUNCTION.format(corpus=str(packed)), encoding="utf-8")
    return path


def test_plan_run_and_status(function: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, out = f"{function}:seeds", tmp_path / "sweep"
    assert dispatch(["sweep", "plan", spec, "--out", str(out), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["runs"], plan["done"], plan["tokens"]) == (2, 0, 2 * 4 * 32)
    assert plan["train_flops"] > 0
    assert plan["disk_bytes"] > 0
    assert not out.exists()
    assert dispatch(["sweep", "run", spec, "--out", str(out), "--parallel", "2", "--json"]) == 0
    states = json.loads(capsys.readouterr().out)
    assert [(run["title"], run["state"], run["step"]) for run in states] == [("seed=0", "done", 4), ("seed=1", "done", 4)]
    folders = sorted(path.name for path in (out / "runs").iterdir())
    assert folders == sorted(run["id"] for run in states)
    before = {name: (out / "runs" / name / RESULT_NAME).stat().st_mtime_ns for name in folders}
    # Finished runs are skipped, and the folder alone says where they stand.
    assert dispatch(["sweep", "run", spec, "--out", str(out)]) == 0
    assert before == {name: (out / "runs" / name / RESULT_NAME).stat().st_mtime_ns for name in folders}
    assert dispatch(["sweep", "status", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == states
    assert "2 done" in captured.err
    # What laws and figures are made of.
    points = read_points([out])
    assert points == read_points([out / "record.json"])
    assert [(point["title"], point["architecture"], point["tokens"]) for point in points] == [
        ("seed=0", "paper", 128),
        ("seed=1", "paper", 128),
    ]
    assert points[0]["labels"] == {"seed": 0}
    assert points[1]["figures"]["seed"] == 1
    assert points[0]["figures"]["context"]["all"]["tokens"] == 64
    assert sum(points[0]["parameters"][part] for part in ("embedding", "non_embedding")) == points[0]["parameters"]["total"]
    assert points[0]["train_flops"] == plan["train_flops"] / 2
    assert dispatch(["sweep", "plan", spec, "--out", str(out)]) == 0
    assert "2 runs, all of them done" in capsys.readouterr().err


def test_killed_and_resumed(function: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep that is killed loses no run; its status says that they are interrupted, and the same command would go on."""
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "factorization_memory.cli", "sweep", "run", f"{function}:long", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not any(run["step"] >= 2 for run in (sweep_status(out) if (out / "sweep.json").exists() else [])):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        states = sweep_status(out)
        assert [run["state"] for run in states] == ["running", "waiting"]
        assert states[0]["loss"] > 0
        tokens = planned_tokens(out)
        assert seconds_left(states, tokens) == pytest.approx(
            sum(tokens.values()) * (1 - states[0]["step"] / 200_000) / states[0]["tokens_per_second"], rel=1e-3
        )
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [run["state"] for run in sweep_status(out)] == ["interrupted", "waiting"]
    assert dispatch(["sweep", "status", str(out), "--every", "0.1"]) == 0
    assert "1 interrupted, 1 waiting" in capsys.readouterr().err


def test_failed_runs_are_started_again_a_bounded_number_of_times(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails always, one that fails once, one that diverges."""
    worker = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1]).parent
seed = json.loads(pathlib.Path(sys.argv[1]).read_text())["config"]["training"]["seed"]
starts = folder / "starts"
count = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (count + 1))
if seed == 2:
    (folder / "failure.json").write_text(json.dumps({"message": "the loss is nan", "diverged": True, "stopped": False}))
    sys.exit(1)
if seed == 0 or not count:
    print("no room")
    sys.exit(3)
(folder / "result.json").write_text(json.dumps({"stopped": "finished", "evaluation": {"bits_per_byte": 1.5}}))
"""
    monkeypatch.setattr(sweeps, "command", lambda path: [sys.executable, "-S", "-c", worker, str(path)])
    made = Sweep([SweepRun(small(packed, seed), {"seed": seed}) for seed in range(3)], tmp_path / "sweep")
    states, stopped = made.run(retries=2)
    assert stopped is None
    assert [run["state"] for run in states] == ["failed", "done", "diverged"]
    assert states[0]["message"] == "exit status 3; no room"
    assert states[1]["bits_per_byte"] == 1.5
    starts = [len((tmp_path / "sweep" / "runs" / run["id"] / "starts").read_text()) for run in states]
    assert starts == [3, 2, 1]
    assert (tmp_path / "sweep" / "runs" / states[0]["id"] / FAILURE_NAME).exists()


def test_ids_follow_the_configuration_not_the_place(packed: Path, tmp_path: Path) -> None:
    def ids(*runs: SweepRun | RunConfig) -> list[str]:
        return list(Sweep([run if isinstance(run, SweepRun) else SweepRun(run) for run in runs], tmp_path / "sweep").runs)

    moved = tmp_path / "moved"
    moved.symlink_to(packed)
    one = ids(small(packed))
    assert ids(SweepRun(small(moved), {"label": 1})) == one
    assert ids(small(packed, seed=1)) != one
    assert ids(SweepRun(small(packed), evaluation={"max_position": 16})) != one
    with pytest.raises(ConfigError, match="sweep: a=1 and b=2 have the same configuration; drop one"):
        ids(SweepRun(small(packed), {"a": 1}), SweepRun(small(packed), {"b": 2}))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("grid.py", r"sweep='grid.py': write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"),
        ("nowhere.py:f", r"sweep='nowhere.py:f': cannot be imported \(nowhere.py: no such file\)"),
        ("no.module:f", r"sweep='no.module:f': cannot be imported \(No module named 'no'\)"),
        ("json:nothing", r"sweep='json:nothing': json has no function nothing"),
        ("platform:node", r"sweep='platform:node': yields a str; yield a RunConfig or a SweepRun"),
    ],
)
def test_what_is_no_sweep(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep(spec)


def test_bad_usage(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="sweep: its function yields no run"):
        Sweep([], tmp_path / "sweep")
    one: dict[str, Any] = {"runs": [SweepRun(small(packed))], "folder": tmp_path / "sweep"}
    for options, message in (({"parallel": 0}, "parallel=0: use 1 or more"), ({"retries": -1}, "retries=-1: use 0 or more")):
        with pytest.raises(ConfigError, match=message):
            Sweep(**one).run(**options)
    assert not (tmp_path / "sweep").exists()
    assert dispatch(["sweep", "status", str(tmp_path)]) == 2
    assert f"--folder={tmp_path}: has no sweep; start one with `fmem sweep run`" in capsys.readouterr().err
    assert dispatch(["sweep", "status", str(tmp_path), "--every", "0"]) == 2
    assert "--every=0.0: use a number of seconds above 0" in capsys.readouterr().err
    assert dataclasses.asdict(SweepRun(small(packed)))["labels"] == {}
