"""Interrupted measurements keep their results so far."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interruption:
    """Context manager: SIGINT (Ctrl-C), SIGTERM (a time limit) or SIGHUP (a closed terminal) leaves the block early, and the
    program continues after it.

    `signal` then names the one that came. The handlers that were there come back on leaving, so that a second signal, while the
    results are written, does what it always did; a signal that was ignored stays so. Python lets only the main thread handle
    signals; in any other this does nothing.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._inside = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._inside = True
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def check(self) -> None:
        """Leave the block if a signal came whose exception did not get here: it may have been raised in a destructor, which
        Python lets none leave."""
        if self.signal is not None:
            raise KeyboardInterrupt(self.signal)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self._inside = False
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        return kind is KeyboardInterrupt and self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if not self._inside:
            return  # already leaving
        raise KeyboardInterrupt(self.signal)
