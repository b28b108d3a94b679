"""Observers of a run: the interface, and one that shows a live progress bar on a terminal."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory._streams import best_effort
from factorization_memory._text import clock, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from factorization_memory.runs.training_record import EvaluationLine, RoutingLine, SampleLine, TrainLine


class TrainingObserver:
    """Notified of a run's events as they happen; does nothing. Override the events of interest.

    The dictionaries are the lines of `metrics.jsonl`, except that `on_step` is called at every step, with that step's values.
    """

    def on_start(self, total_steps: int, parameters: int, step: int) -> None:
        """The run starts: its total steps, the number of trainable parameters, and the step it resumes from (0 for a new
        run)."""

    def on_step(self, metrics: TrainLine) -> None:
        """An optimizer step is done."""

    def on_evaluation(self, metrics: EvaluationLine) -> None:
        """The model was evaluated on held-out text."""

    def on_routing(self, metrics: RoutingLine) -> None:
        """Routing health was measured."""

    def on_sample(self, metrics: SampleLine) -> None:
        """The model generated samples."""

    def on_checkpoint(self, path: Path) -> None:
        """A checkpoint is complete at `path`."""

    def on_message(self, message: str) -> None:
        """A message for the user."""

    def on_end(self) -> None:
        """The run has ended, for any reason."""


class ShieldedObserver(TrainingObserver):
    """Forwards to another observer, and keeps the run going if that one loses its output (an OSError, such as
    BrokenPipeError)."""

    def __init__(self, observer: TrainingObserver) -> None:
        self._observer = observer
        self._warned = False

    def _tell(self, event: str, *arguments: Any) -> None:
        try:
            getattr(self._observer, event)(*arguments)
        except OSError as error:
            if not self._warned:
                self._warned = True
                # Not a warning, which may be turned into an error.
                logging.getLogger(__name__).warning("%s failed to show progress: %s", type(self._observer).__name__, error)

    def on_start(self, total_steps: int, parameters: int, step: int) -> None:
        self._tell("on_start", total_steps, parameters, step)

    def on_step(self, metrics: TrainLine) -> None:
        self._tell("on_step", metrics)

    def on_evaluation(self, metrics: EvaluationLine) -> None:
        self._tell("on_evaluation", metrics)

    def on_routing(self, metrics: RoutingLine) -> None:
        self._tell("on_routing", metrics)

    def on_sample(self, metrics: SampleLine) -> None:
        self._tell("on_sample", metrics)

    def on_checkpoint(self, path: Path) -> None:
        self._tell("on_checkpoint", path)

    def on_message(self, message: str) -> None:
        self._tell("on_message", message)

    def on_end(self) -> None:
        self._tell("on_end")


class RichProgress(TrainingObserver):
    """A live progress bar (loss in bits per byte, tokens/s, time left) on stderr; plain lines if it is not a terminal.

    Without a terminal, prints a line every tenth of the run or every 15 seconds, whichever is sooner. Output that can no longer
    be written, because the reader has exited or the terminal is closed, is dropped.
    """

    PLAIN_SECONDS = 15.0

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console if console is not None else Console(stderr=True, highlight=False, emoji=False)
        self.console.file = best_effort(self.console.file)
        self._bar: Progress | None = None
        self._task: Any = None
        self._total = self._first = 0
        self._started = self._last_time = 0.0
        self._last_step = 0

    def on_start(self, total_steps: int, parameters: int, step: int) -> None:
        self._total, self._first, self._last_step = total_steps, step, step
        self._started = self._last_time = time.monotonic()
        start = f" from step {step}" if step else ""
        self._say(f"training {parameters / 1e6:.2f} M parameters for {total_steps} steps{start}")
        if self.console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[values]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=step, values="", left="")
            self._bar.start()

    def on_step(self, metrics: TrainLine) -> None:
        step = metrics["step"]
        bits = metrics["bits_per_byte"]
        loss = f"{metrics['loss']:.3f} nats/token" if bits is None else f"{bits:.3f} bits/byte"
        values = f"{loss}  {metrics['tokens_per_second']:,.0f} tokens/s"
        now = time.monotonic()
        left = f"{clock((now - self._started) / (step - self._first) * (self._total - step))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=values, left=left)
            return
        a_tenth = 10 * (step - self._last_step) >= self._total
        if a_tenth or step == self._total or now - self._last_time >= self.PLAIN_SECONDS:
            self._last_time, self._last_step = now, step
            self._say(f"step {step}/{self._total}  {values}  {left}")

    def on_evaluation(self, metrics: EvaluationLine) -> None:
        sources = metrics.get("sources", {})
        parts = [f"{name} {value['bits_per_byte']:.3f}" for name, value in sources.items()] if len(sources) > 1 else []
        detail = f"  ({', '.join(parts)})" if parts else ""
        self._say(f"step {metrics['step']}: held-out {metrics['bits_per_byte']:.3f} bits/byte{detail}")

    def on_routing(self, metrics: RoutingLine) -> None:
        if metrics["dead_states"]:
            self._say(f"step {metrics['step']}: {metrics['dead_states']} of {metrics['states']} memory states are dead")

    def on_sample(self, metrics: SampleLine) -> None:
        for sample in metrics["samples"]:
            self._say(f"  | {sample.get('prompt', '')}{sample.get('text', '')}".replace("\n", " "))

    def on_message(self, message: str) -> None:
        self._say(message)

    def on_end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        # No markup and no highlighting: prompts and paths may contain brackets.
        self.console.print(visible(line, keep="\t"), markup=False, highlight=False, soft_wrap=True)
