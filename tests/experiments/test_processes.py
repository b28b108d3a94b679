"""Processes side by side."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from factorization_memory.config import RunConfig, to_dict
from factorization_memory.experiments.processes import Job, Watcher, run_jobs
from factorization_memory.runs.names import FAILURE_NAME, JOB_NAME, LOG_NAME

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
