"""Runs trainings as concurrent processes: starts, watches and stops them; their state is what they leave on disk.

A job is a run folder. The process that works on it reads `job.json` there, trains (or goes on), evaluates, and exits; it is
done when `result.json` says "finished" and, where an evaluation was asked for, `evaluation.json` is one as asked for. What went
wrong stands in `failure.json` and, at length, in `log.txt`. So a job that is done is never started again, whoever asks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from factorization_memory._files import JSONError, parse_json, read_json_or_none, write_atomic
from factorization_memory.config import RunConfig, to_dict
from factorization_memory.runs.names import EVALUATION_NAME, FAILURE_NAME, JOB_NAME, LOG_NAME, METRICS_NAME, RESULT_NAME
from factorization_memory.runs.training_record import RunResult, TrainLine

POLL_SECONDS = 0.1
LOOK_SECONDS = 1.0
"""Polling interval for the output of running jobs."""
_TAIL_BYTES = 1 << 16

Kind = Literal["search", "seed", "alone"]


class Failure(TypedDict):
    """`failure.json`: what went wrong with a job."""

    message: str
    diverged: bool
    """Whether the training did: it would do so again."""
    stopped: bool
    """Whether the job was told to stop; then it is in no file."""


@dataclass(frozen=True)
class Job:
    """One training, in its own process."""

    contender: str
    kind: Kind
    label: str
    """Distinguishes it from the contender's other jobs: "seed 0", "learning rate 0.001"."""
    folder: Path
    config: RunConfig
    evaluation: dict[str, Any] | None = None
    """What to evaluate of the final model: `max_position`, `max_tokens`, `stretches`; None for nothing."""

    @property
    def title(self) -> str:
        """Contender and label, for humans."""
        return f"{self.contender}, {self.label}"

    def result(self) -> RunResult | None:
        """The contents of `result.json`, if the training has finished."""
        result: RunResult | None = read_json_or_none(self.folder / RESULT_NAME)
        return result if result is not None and result["stopped"] == "finished" else None

    @property
    def done(self) -> bool:
        """Whether nothing is left to do. A training that diverged is done: it would diverge again."""
        return (self.result() is not None and is_evaluated(self.folder, self.evaluation)) or self.diverged

    @property
    def diverged(self) -> bool:
        """Whether the training diverged."""
        failure = self.failure()
        return failure is not None and bool(failure.get("diverged"))

    def failure(self) -> Failure | None:
        """`message`, and whether it `diverged`; None if nothing went wrong."""
        failure: Failure | None = read_json_or_none(self.folder / FAILURE_NAME)
        return failure

    def parallel(self) -> list[int]:
        """The values of `run_jobs`'s `parallel` under which this job has run, each once: more than one if it was resumed."""
        return list((read_json_or_none(self.folder / JOB_NAME) or {}).get("parallel", []))

    def metrics(self) -> list[TrainLine]:
        """The training lines of `metrics.jsonl`."""
        path = self.folder / METRICS_NAME
        return _training_lines(path.read_bytes()) if path.exists() else []

    def latest(self) -> TrainLine | None:
        """The last training line, reading only the end of the file."""
        try:
            with open(self.folder / METRICS_NAME, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = _training_lines(file.read())
        except FileNotFoundError:
            return None
        return lines[-1] if lines else None


class Watcher:
    """Callbacks on the progress of jobs; the default ones do nothing."""

    def on_start(self, job: Job) -> None:
        """The job's process has started."""

    def on_progress(self, job: Job, metrics: TrainLine) -> None:
        """The last line that the job's training wrote, about once a second."""

    def on_end(self, job: Job, failure: Failure | None) -> None:
        """The job's process has ended, well or with a failure, or the job was done before."""

    def on_tick(self) -> None:
        """Time passes."""


def run_jobs(
    jobs: Iterable[Job],
    command: Callable[[Path], Sequence[str]],
    *,
    parallel: int,
    threads: int,
    gpus: Sequence[str] = (),
    then: Callable[[Job], Iterable[Job]] = lambda job: (),
    stop: Callable[[], str | None] = lambda: None,
    watcher: Watcher | None = None,
) -> int:
    """Work through `jobs`, at most `parallel` at a time, and through those that `then` names when one of them has ended.

    Args:
        command: from the path of a job's `job.json`, the command line of a process that works on it.
        threads: CPU threads of each process.
        gpus: GPUs to share out, as CUDA_VISIBLE_DEVICES calls them: a process sees the one that the fewest others run on.
            Without any, all see what this process does.
        stop: asked all the time; the name of a signal ("SIGTERM") is passed on to the processes, which then write a checkpoint
            and end; no further job begins.
        watcher: told of everything.

    Returns how many processes it started: none when all was done before.
    """
    watcher = watcher if watcher is not None else Watcher()
    waiting = list(jobs)
    running: list[_Process] = []
    seen: set[Path] = set()
    started, stopping = 0, False
    try:
        while running or (waiting and not stopping):
            asked = stop()
            if asked is not None and not stopping:
                stopping = True
                for process in running:
                    process.signal(signal.Signals[asked])
            while waiting and len(running) < parallel and not stopping:
                job = waiting.pop(0)
                if job.folder in seen:
                    continue  # named by several that ended at the same time
                seen.add(job.folder)
                if job.done:
                    watcher.on_end(job, job.failure())
                    waiting = [*then(job), *waiting]
                    continue
                taken = [process.gpu for process in running]
                gpu = min(gpus, key=taken.count) if gpus else None
                running.append(_Process(job, command, parallel, threads, gpu))
                started += 1
                watcher.on_start(job)
            for process in list(running):
                if process.poll() is None:
                    process.look(watcher)
                    continue
                running.remove(process)
                watcher.on_end(process.job, process.close(stopping))
                # Before the others that wait: one contender is through before the next begins.
                waiting = [*then(process.job), *waiting]
            watcher.on_tick()
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        for process in running:
            process.kill()
    return started


class _Process:
    """The process of one job."""

    def __init__(
        self, job: Job, command: Callable[[Path], Sequence[str]], parallel: int, threads: int, gpu: str | None = None
    ) -> None:
        self.job, self.gpu = job, gpu
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / FAILURE_NAME).unlink(missing_ok=True)
        order: dict[str, Any] = {
            "config": to_dict(job.config),
            "evaluation": job.evaluation,
            "kind": job.kind,
            "threads": threads,
        }
        # All values so far: a resumed job may run next to a different number of others than before.
        order["parallel"] = sorted({*job.parallel(), parallel})
        order["parent"] = os.getpid()
        write_atomic(job.folder / JOB_NAME, json.dumps(order, ensure_ascii=False, indent=1))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "120", "NO_COLOR": "1"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self._looked = 0.0
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._log = open(os.open(job.folder / LOG_NAME, flags, 0o666), "ab")  # noqa: SIM115 - open as long as the process
        try:
            # In its own session: Ctrl-C reaches it only through us, once, and it has time for its checkpoint.
            self._process = subprocess.Popen(
                command(job.folder / JOB_NAME),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            self._log.close()
            raise

    def poll(self) -> int | None:
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def look(self, watcher: Watcher) -> None:
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            line = self.job.latest()
            if line is not None:
                watcher.on_progress(self.job, line)

    def close(self, stopping: bool) -> Failure | None:
        """After its end: what went wrong, kept in the folder; None where nothing did, or where it was told to stop."""
        status = self._process.wait()
        self._log.close()
        if status == 0:
            (self.job.folder / FAILURE_NAME).unlink(missing_ok=True)
            return None
        failure = self.job.failure()
        if failure is None:
            said = (self.job.folder / LOG_NAME).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            message = f"{how}; {said[-1] if said else 'no output'}"
            failure = {"message": message, "diverged": False, "stopped": stopping}
            if not stopping:
                write_atomic(self.job.folder / FAILURE_NAME, json.dumps(failure, ensure_ascii=False))
        return failure

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def is_evaluated(folder: Path, options: dict[str, Any] | None) -> bool:
    """Whether a run's `evaluation.json` is one with these options: somebody may have evaluated it otherwise since."""
    if options is None:
        return True
    evaluation = read_json_or_none(folder / EVALUATION_NAME)
    if not isinstance(evaluation, dict):
        return False
    evaluated = evaluation.get("evaluated", options)
    return all(evaluated.get(name) == value for name, value in options.items())


def _training_lines(text: bytes) -> list[TrainLine]:
    lines = []
    for line in text.splitlines():
        # The first line may be cut where reading started, the last may not be completely written yet.
        if line.startswith(b'{"kind": "train"'):
            try:
                lines.append(parse_json(line))
            except JSONError:
                continue
    return lines
