"""Live progress of a comparison's runs on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from factorization_memory._text import clock
from factorization_memory.experiments.processes import Watcher
from factorization_memory.reports.terminal.tables import plain, table
from factorization_memory.runs.names import LOG_NAME

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from factorization_memory.experiments.processes import Failure, Job
    from factorization_memory.runs.training_record import TrainLine


class Display(Watcher):
    """All runs that are under way, live on a terminal; a line when one begins or ends, and now and then, elsewhere."""

    PLAIN_SECONDS = 30.0

    def __init__(
        self,
        people: Console,
        ended: Callable[[Job], None] = lambda job: None,
        total_steps: int | None = None,
    ) -> None:
        """`total_steps` are those of all runs together, from which the time that is left is told."""
        self._people = people
        self._ended = ended
        self._total = total_steps
        self._done_before = self._done_here = 0
        self._first_step: dict[Path, int] = {}
        self._began = time.monotonic()
        self._running: dict[Path, tuple[Job, TrainLine | None]] = {}
        self._live: Live | None = None
        self._said = time.monotonic()

    def __enter__(self) -> Display:
        if self._people.is_terminal:
            from rich.live import Live

            self._live = Live(console=self._people, get_renderable=self._table, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def on_start(self, job: Job) -> None:
        """A job has started."""
        self._running[job.folder] = (job, None)
        if (line := job.latest()) is not None:  # it resumes
            self._first_step[job.folder] = line["step"]
            self._done_before += line["step"]
        self._say(f"{job.title}: started")

    def on_progress(self, job: Job, metrics: TrainLine) -> None:
        """A job has made progress."""
        self._running[job.folder] = (job, metrics)

    def on_end(self, job: Job, failure: Failure | None) -> None:
        """A job has ended, or was done before."""
        before = self._running.pop(job.folder, None) is None
        if before:
            self._done_before += job.config.training.steps
        else:
            self._done_here += job.config.training.steps - self._first_step.get(job.folder, 0)
        if not before:
            self._ended(job)
        if failure is not None:
            said = "stopped" if failure["stopped"] else failure["message"]
            self._say(f"{job.title}: {said}" + ("" if failure["stopped"] else f" (see {job.folder / LOG_NAME})"))
            return
        result = job.result()
        evaluation = None if result is None else result.get("evaluation")
        bits = None if evaluation is None else evaluation.get("bits_per_byte")
        loss = "" if bits is None else f", held-out {bits:.4f} bits/byte"
        self._say(f"{job.title}: {'was done before' if before else 'done'}{loss}")

    def on_tick(self) -> None:
        """Without a terminal, prints the progress of the runs now and then."""
        if self._live is None and time.monotonic() - self._said >= self.PLAIN_SECONDS:
            self._said = time.monotonic()
            for job, line in self._running.values():
                self._say(f"{job.title}: " + "  ".join(_standing(job, line)))
            if (left := self.time_left()) is not None:
                self._say(left)

    def time_left(self) -> str | None:
        """Remaining time of all runs at the pace so far, excluding evaluations; None while unknown."""
        here = self._done_here + sum(
            max(0, line["step"] - self._first_step.get(folder, 0)) for folder, (_, line) in self._running.items() if line
        )
        if self._total is None or here <= 0:
            return None
        left = max(0, self._total - self._done_before - here)
        seconds = left * (time.monotonic() - self._began) / here
        return f"{left:,} of {self._total:,} steps left over all runs, about {clock(seconds)}"

    def _table(self) -> Table:
        shown = table("", "run", "step", "loss", "tokens/s")
        shown.caption = self.time_left()
        shown.caption_justify = "left"
        for job, line in self._running.values():
            shown.add_row(plain(job.title), *_standing(job, line))
        return shown

    def _say(self, line: str) -> None:
        self._people.print(line, markup=False, soft_wrap=True)


def _standing(job: Job, line: TrainLine | None) -> tuple[str, str, str]:
    """Step, loss and speed of a run, from the last line of its log."""
    steps = job.config.training.steps
    if not line:
        return f"0/{steps}", "", ""
    step = "evaluation" if line["step"] == steps else f"{line['step']}/{steps}"
    return step, f"{line['loss']:.4f}", f"{line['tokens_per_second']:,.0f}"
