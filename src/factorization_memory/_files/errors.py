"""Errors of disks and files: no space left, and what exists but cannot be read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""`errno` values of a full disk and of an exceeded quota."""


class DiskFullError(OSError):
    """A full disk or exceeded quota; the message names the path, whose old content is untouched."""

    def __str__(self) -> str:
        return f"{self.filename}: No space left on the disk; nothing was written; free some space, or write elsewhere"


class UnreadableError(OSError):
    """A file or folder exists but cannot be read, for lack of permission or because of a disk error."""

    def __str__(self) -> str:
        return f"{self.filename}: cannot be read ({self.strerror}); grant read access, or replace it with a readable copy"


@contextmanager
def explain_unreadable(path: Path) -> Iterator[None]:
    """Turns errors of reading `path` into `UnreadableError`; FileNotFoundError and NotADirectoryError are passed on."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UnreadableError(error.errno, error.strerror or str(error), str(error.filename or path)) from None


def require_readable(path: Path) -> None:
    """Raises `UnreadableError` for a file without read permission, which some libraries report as missing."""
    with explain_unreadable(path), open(path, "rb"):
        pass
