"""Contenders read from text, processes side by side, and the figures of a comparison."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from factorization_memory.config import ConfigError, RunConfig, to_dict
from factorization_memory.experiments.compare import first_difference, with_defaults
from factorization_memory.experiments.contenders import override, read_contender, split_overrides
from factorization_memory.experiments.processes import Job, Watcher, run_jobs
from factorization_memory.experiments.record import mean_and_spread
from factorization_memory.presets import PRESETS
from factorization_memory.reports.comparison_table import change, differing
from factorization_memory.runs.names import FAILURE_NAME, JOB_NAME, LOG_NAME


def test_flags_of_a_run_are_told_from_others() -> None:
    rest, overrides = split_overrides(
        [
            "a", "--seeds", "0", "1", "--model.top-k", "none", "--model.mixers", "memory", "attention", "--out", "o",
            "--model.no-output-gate", "--data.document-boundary=continue", "--training.carry-state", "b",
            "--model.attention.sliding-window", "8",
            "--model.update-rate-init", "0.1", "0.9", "--data.weights", "en", "1", "ja", "2",
        ]
    )  # fmt: skip
    assert rest == ["a", "--seeds", "0", "1", "--out", "o", "b"]
    config = override(RunConfig(), overrides)
    assert config.model.top_k is None
    assert config.model.mixers == ("memory", "attention")
    assert not config.model.output_gate
    assert config.training.carry_state
    assert config.model.update_rate_init == (0.1, 0.9)
    assert (config.data.document_boundary, config.data.weights) == ("continue", {"en": 1.0, "ja": 2.0})


def test_contenders(tmp_path: Path) -> None:
    plain = read_contender("paper", {})
    assert (plain.name, plain.config) == ("paper", PRESETS["paper"]())
    text = "mix=paper-sparse:model.top-k=8,model.mixers=memory,memory,attention,optimizer.schedule=wsd"
    mixed = read_contender(text, {"model.top_k": "4", "model.num_heads": "2"})
    assert (mixed.name, mixed.text) == ("mix", text)
    assert (mixed.config.model.top_k, mixed.config.model.num_heads) == (8, 2)
    assert mixed.config.model.mixers == ("memory", "memory", "attention")
    assert mixed.config.optimizer.schedule == "wsd"
    assert read_contender("paper:model.expand=1", {}).name == "paper:model.expand=1"
    # Fields that only fit together are set together.
    assert read_contender("paper:model.top-k=100,model.num-states=128", {}).config.model.top_k == 100
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(to_dict(mixed.config)))
    read = read_contender(f"{tmp_path}/mine/config.json", {})
    assert (read.name, read.config) == ("mine", mixed.config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("papre", "'papre' is no preset; did you mean 'paper'?"),
        ("paper:model.topk=8", "contender 'paper:model.topk=8': model.topk: no such field; did you mean 'model.top_k'?"),
        ("paper:model.top-k=many", "model.top_k='many': expected int"),
        ("paper:model.top-k=65", "model.top_k=65: use 1 to num_states=64"),
        ("paper:model.output-gate=yes", "model.output_gate='yes': expected bool"),
        ("paper:model.rates=fast", "model.rates='fast': use one of"),
        ("paper:model.update-rate-init=0.5", "model.update_rate_init=[0.5]: expected 2 values"),
        (
            "paper:model.attention=2",
            "model.attention: a section, not a field; set one of its fields, as model.attention.num_heads",
        ),
        ("paper:top", "'top' is no setting; write field=value"),
        ("paper:data.context-length=8", "contenders differ in model and optimizer alone"),
        ("paper:training.steps=8", "give --training.steps to all"),
        ("nowhere/config.json", "nowhere/config.json: cannot be read"),
    ],
)
def test_contenders_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_contender(text, {})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.topk", "8"], "model.topk: no such field; did you mean 'model.top_k'?"),
        (["--model.top-k"], "--model.top-k: a value is missing"),
        (["--model.no-top-k"], "--model.no-top-k: no such field"),
        (["--training.steps", "--json"], "--training.steps: a value is missing"),
    ],
)
def test_flags_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        split_overrides(words)
    assert message in str(error.value)


# What a job's process does, from its folder's name: numbers sleep so many tenths of a second.
WORKER = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]).parent
metrics = open(folder / "metrics.jsonl", "a")
metrics.write(json.dumps({"kind": "train", "step": 1, "loss": 2.0, "tokens_per_second": 1.0}) + "\\n")
metrics.flush()
(folder / "from").write_text(str(time.time()))
name = folder.name
if name == "bad":
    print("no more memory")
    sys.exit(3)
if name == "diverges":
    (folder / "failure.json").write_text(json.dumps({"message": "the loss is nan", "diverged": True, "stopped": False}))
    sys.exit(1)
if name == "endless":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (folder / "ready").write_text("")
    time.sleep(60)
time.sleep(float(name.split("-")[0]) / 10)
(folder / "result.json").write_text(json.dumps({"stopped": "finished"}))
(folder / "until").write_text(str(time.time()))
"""


def job(folder: Path) -> Job:
    return Job("a", "seed", folder.name, folder, RunConfig())


def work(jobs: list[Job], **options: Any) -> int:
    def command(path: Path) -> list[str]:
        return [sys.executable, "-S", "-c", WORKER, str(path)]

    return run_jobs(jobs, command, **{"parallel": 2, "threads": 1, **options})


class Notes(Watcher):
    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []

    def on_start(self, job: Job) -> None:
        self.notes.append(("start", job.label))

    def on_progress(self, job: Job, metrics: dict[str, Any]) -> None:
        self.notes.append(("progress", job.label))

    def on_end(self, job: Job, failure: dict[str, Any] | None) -> None:
        self.notes.append(("end", job.label) if failure is None else ("failed", job.label))


def test_jobs_run_side_by_side_and_go_on_to_what_follows(tmp_path: Path) -> None:
    first = [job(tmp_path / name) for name in ("1-a", "1-b", "1-c")]
    last = job(tmp_path / "0-last")
    watcher = Notes()
    assert work(first, then=lambda _: [last] if all(each.done for each in first) else [], watcher=watcher) == 4
    assert last.done
    assert sorted(watcher.notes)[:4] == [("end", name) for name in ("0-last", "1-a", "1-b", "1-c")]
    times = [(float((each.folder / "from").read_text()), float((each.folder / "until").read_text())) for each in first]
    most = max(sum(begin <= moment < end for begin, end in times) for moment, _ in times)
    assert most <= 2
    order = json.loads((last.folder / JOB_NAME).read_text())
    assert (order["config"], order["threads"]) == (json.loads(json.dumps(to_dict(RunConfig()))), 1)
    assert last.parallel() == [2]
    # Nothing is left to do.
    assert work(first, then=lambda _: [last]) == 0


def test_jobs_are_shared_out_over_gpus(tmp_path: Path) -> None:
    def command(path: Path) -> list[str]:
        write = "import os, sys; open(os.path.dirname(sys.argv[1]) + '/gpu', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
        return [sys.executable, "-S", "-c", f"{write}; import time; time.sleep(0.5)", str(path)]

    jobs = [job(tmp_path / str(n)) for n in range(4)]
    run_jobs(jobs, command, parallel=4, threads=1, gpus=("3", "GPU-a"))
    assert sorted((each.folder / "gpu").read_text() for each in jobs) == ["3", "3", "GPU-a", "GPU-a"]


def test_a_plan_of_before_a_field_came_is_the_same() -> None:
    config = json.loads(json.dumps(to_dict(RunConfig())))
    del config["data"]["corpus"], config["data"]["read_ahead"]
    new = {"contenders": {"a": {"learning_rates": [1e-3], **config}}, "seeds": [0]}
    old = json.loads(json.dumps(new))
    del old["contenders"]["a"]["model"]["update_lag"], old["contenders"]["a"]["model"]["attention"]["rope_theta"]
    assert first_difference(old, new) is not None
    assert first_difference(with_defaults(old), new) is None
    old["contenders"]["a"]["model"]["dropout"] = 0.0  # retired since
    assert first_difference(with_defaults(old), new) is None
    old["contenders"]["a"]["model"]["dropout"] = 0.1
    assert first_difference(with_defaults(old), new) == ("contenders.a.model.dropout", 0.1, None)
    del old["contenders"]["a"]["model"]["dropout"]
    new["contenders"]["a"]["model"]["update_lag"] = 1
    assert first_difference(with_defaults(old), new) == ("contenders.a.model.update_lag", 0, 1)
    assert with_defaults(None) is None


def test_a_failing_job_does_not_stop_the_others(tmp_path: Path) -> None:
    jobs = [job(tmp_path / name) for name in ("bad", "diverges", "0-good")]
    watcher = Notes()
    assert work(jobs, watcher=watcher) == 3
    bad, diverges, good = jobs
    assert good.done
    assert not bad.done
    assert bad.failure() == {"message": "exit status 3; no more memory", "diverged": False, "stopped": False}
    assert "no more memory" in (bad.folder / LOG_NAME).read_text()
    assert diverges.done
    assert diverges.diverged
    assert sorted(watcher.notes)[:3] == [("end", "0-good"), ("failed", "bad"), ("failed", "diverges")]
    # What diverged would do so again; what failed may not.
    assert work(jobs, parallel=3) == 1
    assert [each.parallel() for each in jobs] == [[2, 3], [2], [2]]


def test_a_stop_is_passed_on(tmp_path: Path) -> None:
    endless, never = job(tmp_path / "endless"), job(tmp_path / "0-never")

    def stop() -> str | None:
        return "SIGTERM" if (endless.folder / "ready").exists() else None

    began = time.monotonic()
    assert work([endless, never], parallel=1, stop=stop) == 1
    assert time.monotonic() - began < 30
    assert not endless.done
    assert not (endless.folder / FAILURE_NAME).exists()
    assert not never.folder.exists()


def test_the_latest_line_is_the_last_whole_one(tmp_path: Path) -> None:
    one = job(tmp_path)
    assert one.latest() is None
    lines = [{"kind": "train", "step": step} for step in range(3)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"kind": "evaluation", "step": 2}])
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "train", "st')
    assert one.latest() == lines[-1]
    assert one.metrics() == lines


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 4.0]) == pytest.approx({"mean": 7 / 3, "spread": math.sqrt(7 / 3)})
    assert mean_and_spread([1.0]) == {"mean": 1.0, "spread": None}


def test_first_difference() -> None:
    old = {"a": {"b": [1, 2], "c": None}, "d": 1}
    assert first_difference(old, json.loads(json.dumps(old))) is None
    assert first_difference(old, {"a": {"b": [1, 3], "c": None}, "d": 2}) == ("a.b", [1, 2], [1, 3])
    assert first_difference(old, {"a": {"b": [1, 2]}, "d": 1}) == ("a.c", None, None)
    assert first_difference(None, old)[0] == ""


def test_what_contenders_differ_in() -> None:
    one: dict[str, Any] = {
        "optimizer": {"learning_rate": 1.0, "warmup_steps": 2, "schedule": "wsd"},
        "training": {"micro_batch_size": 0, "steps": 9},
    }
    other = {"optimizer": {**one["optimizer"], "learning_rate": 2.0}, "training": {**one["training"], "steps": 8}}
    assert differing({"a": one, "b": other}) == []
    other["optimizer"]["warmup_steps"], other["training"]["micro_batch_size"] = 3, 4
    said = "Contenders differ in optimizer.warmup_steps (a 2, b 3), training.micro_batch_size (a 0, b 4)."
    assert differing({"a": one, "b": other}) == [said]


def test_a_large_change_is_said_with_its_factor() -> None:
    assert change("model.intermediate_size", 1024, 512) == "model.intermediate_size from 1024 to 512"
    assert change("model.intermediate_size", 1024, 416) == "model.intermediate_size from 1024 to 416 (a factor of 2.46)"
