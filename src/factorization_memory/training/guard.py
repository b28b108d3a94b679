"""Guards of a run: a graceful stop that loses nothing, and no step with a non-finite gradient. The lock is in runs/lock.py."""

from __future__ import annotations

import math
import signal
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self


class TrainingDivergedError(RuntimeError):
    """A loss, a gradient or a weight became infinite or NaN. A step with such a loss or gradient is not applied; earlier
    checkpoints are intact."""


class GracefulStop:
    """Context manager that turns the first SIGINT, SIGTERM or SIGHUP (a closed terminal) into a request to stop.

    `requested` then names the signal, and the training loop ends after the current step. A second SIGINT or SIGTERM raises
    KeyboardInterrupt at once; SIGHUP does not count, since closing a terminal sends it twice (from the system and from the
    shell), and before or after the SIGTERM that ends a session. If SIGHUP is ignored, as under `nohup`, it stays ignored. The
    previous handlers are restored on exit. Python allows only the main thread to handle signals; in other threads this does
    nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._insisting = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be restored from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if number != signal.SIGHUP:
            if self._insisting:
                raise KeyboardInterrupt(f"second {signal.Signals(number).name}: stopped without finishing the step")
            self._insisting = True
        self.requested = self.requested or signal.Signals(number).name


def check_finite(
    step: int,
    losses: Sequence[float],
    gradient_norm: float,
    windows: Sequence[Sequence[str]],
    last_checkpoint: Path | None,
) -> None:
    """Raises `TrainingDivergedError` unless every loss and the gradient norm of a step are finite.

    `losses` (nats/token) and `windows` (names of the rows read) have one entry per micro-batch; the error names the rows of
    those with a non-finite loss, or all rows if only the gradient is not finite.
    """
    bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if not bad and math.isfinite(gradient_norm):
        return
    what = f"the loss is {losses[bad[0]]}" if bad else f"the gradient norm is {gradient_norm}"
    rows = [row for index in bad or range(len(windows)) for row in windows[index]]
    named = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    raise TrainingDivergedError(
        f"step {step}: {what}, in the batch rows {named}. The step was not applied; {_what_to_do(last_checkpoint)}"
    )


def diverged(step: int, what: str, last_checkpoint: Path | None) -> TrainingDivergedError:
    """The error for weights, or other contents of a checkpoint, that are not finite after a step; `what` names them."""
    return TrainingDivergedError(f"step {step}: {what} after it. The step was not saved; {_what_to_do(last_checkpoint)}")


def _what_to_do(last_checkpoint: Path | None) -> str:
    kept = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "no checkpoint was saved yet"
    return f"{kept}. Try a lower optimizer.learning_rate, a longer optimizer.warmup_steps or a smaller optimizer.clip_norm."
