"""Atomic writes of files and folders.

Data are written next to the target under a unique name, `NAME.<8 hex digits>.partial`, synced to disk, and renamed when
complete: readers never see half a file, a power cut leaves the old or the new one, and two writers never share a file.
Leftovers of killed writers are removed by the next one: a live writer holds a lock on its own.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from factorization_memory._files.errors import FULL_DISK, DiskFullError
from factorization_memory._files.locks import is_open_at, try_lock

_TRIES = 100
"""Attempts to create and lock a new file, which another writer may remove before it is locked."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """An empty file to write to, which replaces `path` if the block succeeds, and is removed otherwise.

    Parent folders are created. Raises FileExistsError if `path` exists and is not a file (a folder, a device), and OSError for
    failed writes; the old content of `path` is then untouched.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path}: not a file; choose another name")
    with _aside(path, folder=False) as partial:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a complete file, text as UTF-8, through `atomic_file`."""
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to write into, which becomes `path` if the block succeeds, and is removed otherwise.

    Parent folders are created. If a folder exists at `path` by then, it is replaced if `overwrite`; otherwise FileExistsError
    is raised unless it is empty. A failure leaves the old folder at `path`; if the process is killed between the two renames,
    it remains next to it as `NAME.<8 hex digits>.replaced`, and the next writer restores it.
    """
    path = Path(path)
    with _aside(path, folder=True) as partial:
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if overwrite and path.exists():
            _exchange(partial, path)
        else:
            try:
                os.rename(partial, path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(f"{path}: exists and is not empty; choose another folder") from None
                raise
        _sync(path.parent)


@contextmanager
def _aside(path: Path, folder: bool) -> Iterator[Path]:
    """A new file or folder next to `path`, locked during the block and removed after it if it still exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path)
    for _ in range(_TRIES):
        partial = _beside(path, ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if folder:
                partial.mkdir()
            else:
                os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        except (FileExistsError, FileNotFoundError):
            continue
        # Until it is locked, another writer may take it for a leftover and remove it.
        if try_lock(descriptor) is not False and is_open_at(descriptor, partial):
            break
        os.close(descriptor)
    else:
        raise OSError(errno.EAGAIN, "other processes keep removing the file", str(path))
    try:
        yield partial
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise DiskFullError(error.errno, "No space left on the disk", str(path)) from error
    finally:
        if is_open_at(descriptor, partial):
            _remove(partial)
        os.close(descriptor)


def _exchange(new: Path, path: Path) -> None:
    old = _beside(path, ".replaced")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try_lock(descriptor)  # so that no other writer takes it for a leftover meanwhile
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise
        _remove(old)
    finally:
        os.close(descriptor)


def _clear(path: Path) -> None:
    """Removes leftovers of killed writers of `path`, or restores what they were about to replace."""
    pattern = re.compile(re.escape(_stem(path)) + r"\.[0-9a-f]{8}\.(partial|replaced)")
    for leftover in sorted(each for each in path.parent.iterdir() if pattern.fullmatch(each.name)):
        try:
            descriptor = os.open(leftover, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # removed meanwhile, or not ours to open
        try:
            if try_lock(descriptor) and is_open_at(descriptor, leftover):
                if leftover.suffix == ".replaced" and not path.exists():
                    os.rename(leftover, path)
                else:
                    _remove(leftover)
        finally:
            os.close(descriptor)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{_stem(path)}.{secrets.token_hex(4)}{suffix}")


def _stem(path: Path) -> str:
    # A name has at most 255 bytes, of which the digits and the suffix take 18.
    return os.fsdecode(os.fsencode(path.name)[:237])


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Syncs a file, or the entries of a folder, to disk. Some file systems cannot do so for folders."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
