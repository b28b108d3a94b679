"""Standard streams that may close while a program runs. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, TextIO, cast


class BestEffortStream:
    """A text stream for human readers whose failure is not fatal: what cannot be written is dropped.

    The reader of a pipe may have left, a terminal may be closed, a disk full. Each write is tried anew, since a disk may have
    room again. Characters that the stream's encoding lacks are written as backslash escapes. Everything else is the wrapped
    stream's own; `None`, which Python has in place of a stream that was closed before it started, takes everything.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written; returns the length of the text."""
        if self._stream is not None:
            with _loss_ignored():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = getattr(self._stream, "encoding", None) or "utf-8"
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        if self._stream is not None:
            with _loss_ignored():
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal; False if that cannot be told."""
        with _loss_ignored():
            return self._stream is not None and self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__.get("_stream"), name)


class ClosedStream:
    """Replaces a standard stream that was closed before the program started: writing to it raises an error that says so."""

    encoding = "utf-8"

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, text: str) -> int:
        """Raises OSError."""
        raise OSError(errno.EBADF, "it was closed before this program started", self.name)

    def flush(self) -> None:
        """Nothing was written."""

    def isatty(self) -> bool:
        """False."""
        return False


@contextlib.contextmanager
def _loss_ignored() -> Iterator[None]:
    try:
        yield
    except OSError:
        pass
    except ValueError as error:  # raised by Python for a stream that this program has closed
        if "closed file" not in str(error) and "detached" not in str(error):
            raise


def best_effort(stream: IO[str] | None) -> TextIO:
    """`stream` as a `BestEffortStream`, unchanged if it already is one."""
    return cast(TextIO, stream if isinstance(stream, BestEffortStream) else BestEffortStream(stream))


def prepare_standard_streams() -> None:
    """Make the process's stderr a `BestEffortStream`, and its stdout one that takes every character (as a backslash escape
    where its encoding lacks it) or says that it is closed.

    Descriptors 0 to 2 that are closed are opened on the null device: else the next file that is opened, a checkpoint say, would
    get the number to which libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free descriptor
    sys.stderr = best_effort(sys.stderr)
    if sys.stdout is None:
        sys.stdout = cast(TextIO, ClosedStream("stdout"))
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def lacks(stream: IO[str], text: str) -> bool:
    """Whether `text` has characters that the encoding of `stream` cannot represent."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return True
    return False
