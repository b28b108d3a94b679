"""Locks on files, of the operating system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# NFS locks only files open for writing, and a folder never is (EBADF).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL)


@contextmanager
def lock(path: Path, held: Callable[[str], Exception]) -> Iterator[None]:
    """Holds the file `path` as an exclusive lock among processes and threads.

    Uses a lock of the operating system, released however the process ends, so stale locks never need manual cleanup. The file
    is created (its folder must exist) and removed. If another process holds the lock, raises `held(holder)`, with the holder
    as text: "process 123 on HOST". Warns if the file system has no locks.
    """
    path = Path(path)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        locked = try_lock(descriptor)
        if locked is False:
            holder = _holder(os.read(descriptor, 4096))
            os.close(descriptor)
            raise held(holder)
        if locked is None:
            warnings.warn(f"{path}: this file system has no locks; make sure no other process writes here", stacklevel=3)
            break
        # A holder that just finished removes the file, and a lock on a removed file protects nothing: try again.
        if is_open_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Whether we got the lock; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def is_open_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False


def _holder(record: bytes) -> str:
    try:
        values = json.loads(record)
        return f"process {values['pid']} on {values['host']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
