"""Atomic writes of files and folders, file locks, and reading JSON.

Data are written next to the target under a unique name, `NAME.<8 hex digits>.partial`, synced to disk, and renamed when
complete: readers never see half a file, a power cut leaves the old or the new one, and two writers never share a file.
Leftovers of killed writers are removed by the next one: a live writer holds a lock on its own. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""`errno` values of a full disk and of an exceeded quota."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

MAX_DEPTH = 500
"""Maximum nesting depth of JSON that is read. From Python 3.12 on, `json` itself reads deeper nesting than it can write."""
_TRIES = 100
"""Attempts to create and lock a new file, which another writer may remove before it is locked."""

# NFS locks only files open for writing, and a folder never is (EBADF).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL)


class JSONError(ValueError):
    """Text that is not JSON, or that our writers do not accept; the message is the `place`, if known, and the `reason`."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(f"{place}: {reason}" if place else reason)
        self.reason = reason


class JSONSyntaxError(JSONError):
    """Text that is not JSON, perhaps because it is truncated."""


class DiskFullError(OSError):
    """A full disk or exceeded quota; the message names the path, whose old content is untouched."""

    def __str__(self) -> str:
        return f"{self.filename}: No space left on the disk; nothing was written there; free some, or write elsewhere"


class UnreadableError(OSError):
    """A file or folder exists but cannot be read, for lack of permission or because of a disk error."""

    def __str__(self) -> str:
        return f"{self.filename}: cannot be read ({self.strerror}); give read access to it, or put a readable copy there"


def cache_folder() -> Path:
    """Folder of notes kept between calls: in `$XDG_CACHE_HOME`, else `~/.cache`. Raises RuntimeError for a user
    without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "factorization_memory"


@contextmanager
def explain_unreadable(path: Path) -> Iterator[None]:
    """Turns errors of reading `path` into `UnreadableError`; FileNotFoundError and NotADirectoryError are passed on."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UnreadableError(error.errno, error.strerror or str(error), str(error.filename or path)) from None


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
                    raise FileExistsError(f"{path}: it exists and is not empty; choose another folder") from None
                raise
        _sync(path.parent)


@contextmanager
def lock(path: Path, held: Callable[[str], Exception]) -> Iterator[None]:
    """Holds the file `path` as an exclusive lock among processes and threads.

    Uses a lock of the operating system, released however the process ends, so stale locks never need manual cleanup. The file
    is created (its folder must exist) and removed. If another process holds the lock, raises `held(holder)`, with the holder
    as
    text: "process 123 on HOST". Warns if the file system has no locks.
    """
    path = Path(path)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        locked = _try_lock(descriptor)
        if locked is False:
            holder = _holder(os.read(descriptor, 4096))
            os.close(descriptor)
            raise held(holder)
        if locked is None:
            warnings.warn(f"{path}: this file system has no locks; let no second process write here", stacklevel=3)
            break
        # A holder that just finished removes the file, and a lock on a removed file protects nothing: try again.
        if _is_open_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def require_readable(path: Path) -> None:
    """Raises `UnreadableError` for a file without read permission, which some libraries report as missing."""
    with explain_unreadable(path), open(path, "rb"):
        pass


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises `JSONError`, whose message begins with the path, for a damaged file, FileNotFoundError for one that is not there, and
    `UnreadableError`.
    """
    with explain_unreadable(path):
        data = Path(path).read_bytes()
    try:
        return parse_json(data)
    except JSONError as error:
        raise type(error)(error.reason, str(path)) from None


def read_json_or_none(path: Path) -> Any:
    """The value in a JSON file; None if there is no such file or it is truncated."""
    try:
        return read_json(path)
    except (FileNotFoundError, JSONError):
        return None


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a log with one per line, none if there is no such file; truncated lines are skipped.

    Raises `JSONError`, naming the file and the line, for one that is JSON and yet no object that can be read, and
    `UnreadableError`.
    """
    try:
        with explain_unreadable(path), open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    values = parse_json(line.decode("utf-8", errors="replace"))
                except JSONSyntaxError:
                    continue
                except JSONError as error:
                    raise JSONError(f"{error}; remove that line", f"{path}, line {number}") from None
                if not isinstance(values, dict):
                    raise JSONError(f"a {type(values).__name__}, not an object; remove that line", f"{path}, line {number}")
                yield values
    except FileNotFoundError:
        return


def parse_json(data: str | bytes, *, any_text: bool = False) -> Any:
    """Parses JSON text (bytes: UTF-8).

    Raises `JSONError` for what is not JSON, for nesting and numbers beyond what Python reads, and (unless `any_text`) for lone
    surrogates, which no UTF-8 file can hold.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
            raise RecursionError
        if not any_text and isinstance(data, str):
            text.encode("utf-8")
        if not any_text and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise JSONSyntaxError(f"not JSON ({error.msg} at character {error.pos})") from None
    except UnicodeDecodeError as error:
        raise JSONError(f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from None
    except UnicodeEncodeError as error:
        raise JSONError(f"holds the lone surrogate U+{ord(error.object[error.start]):04X}, which is no character") from None
    except RecursionError:
        raise JSONError("JSON nested too deeply to be read") from None
    except ValueError as error:  # an integer of thousands of digits
        raise JSONError(f"JSON that cannot be read ({error})") from None
    return value


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (list, dict))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


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
        if _try_lock(descriptor) is not False and _is_open_at(descriptor, partial):
            break
        os.close(descriptor)
    else:
        raise OSError(errno.EAGAIN, "other processes remove what is written here", str(path))
    try:
        yield partial
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise DiskFullError(error.errno, "No space left on the disk", str(path)) from error
    finally:
        if _is_open_at(descriptor, partial):
            _remove(partial)
        os.close(descriptor)


def _exchange(new: Path, path: Path) -> None:
    old = _beside(path, ".replaced")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _try_lock(descriptor)  # so that no other writer takes it for a leftover meanwhile
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
            if _try_lock(descriptor) and _is_open_at(descriptor, leftover):
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


def _try_lock(descriptor: int) -> bool | None:
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


def _is_open_at(descriptor: int, path: Path) -> bool:
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
