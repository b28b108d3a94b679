"""Files and folders that are whole or not there, the right to write one, and JSON read back.

What is written stands beside its place under a name of its own, `NAME.<8 hex digits>.partial`, reaches the disk, and is renamed
when it is whole: readers never see half a file, a power cut leaves the old one or the new one, and two writers never share a
file. What a killed writer left is removed by the next one: a living writer holds a lock on its own. Standard library only.
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
"""Numbers of the `OSError`s of a full disk and of a used-up quota."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

MAX_DEPTH = 500
"""Objects and lists within each other in JSON that is read. From Python 3.12 on `json` itself reads deeper than it writes."""
_TRIES = 100
"""To have a new file to oneself, which another writer may remove before it is locked."""

# NFS locks only what is open for writing, which a folder never is (EBADF).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL)


class JSONError(ValueError):
    """Text that is not JSON, or that no writer of ours can take; the message is `reason`, after the `place` if known."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(f"{place}: {reason}" if place else reason)
        self.reason = reason


class JSONSyntaxError(JSONError):
    """Text that is not JSON, perhaps since it was cut short."""


class DiskFullError(OSError):
    """A full disk or used-up quota, of which the message names the place; what stood there is untouched."""

    def __str__(self) -> str:
        return f"{self.filename}: No space left on the disk; nothing was written there; free some, or write elsewhere"


class UnreadableError(OSError):
    """A file or folder that is there and cannot be read, for want of permission or by a fault of the disk."""

    def __str__(self) -> str:
        return f"{self.filename}: cannot be read ({self.strerror}); give read access to it, or put a readable copy there"


def cache_folder() -> Path:
    """Where notes are kept from one call to the next: in `$XDG_CACHE_HOME`, else `~/.cache`. Raises RuntimeError for a user
    without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "factorization_memory"


@contextmanager
def explain_unreadable(path: Path) -> Iterator[None]:
    """Turn an error of reading `path` into an `UnreadableError`; FileNotFoundError and NotADirectoryError stay as they are."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UnreadableError(error.errno, error.strerror or str(error), str(error.filename or path)) from None


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """An empty file to write to, which takes the place of `path` when the block ends well, and else is removed.

    The folders above `path` are made. Raises FileExistsError where `path` is something else than a file (a folder, a device),
    and OSError as writing does; what stood at `path` is then untouched.
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
    """Write a whole file, text as UTF-8, through `atomic_file`."""
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to write into, which becomes `path` when the block ends well, and else is removed.

    The folders above `path` are made. A folder that is there by then is replaced if `overwrite`; otherwise, unless it is empty,
    FileExistsError is raised. A failure leaves the old folder at `path`; where the process is killed just between the two
    renames, it waits beside it as `NAME.<8 hex digits>.replaced`, and the next writer puts it back.
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
    """The exclusive right that the file `path` stands for, among processes and threads.

    A lock of the operating system, which goes with the process however that ends: no stale one needs to be cleared by hand. The
    file is made (its folder must be there) and removed. Where another holds the lock, `held(holder)` is raised, with the holder
    in words: "process 123 on HOST". A file system without locks gets a warning.
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
    """Raise `UnreadableError` for a file that may not be read, of which some libraries say that it is missing."""
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
    """What a JSON file holds; None where there is no such file or it was cut short."""
    try:
        return read_json(path)
    except (FileNotFoundError, JSONError):
        return None


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a log of one to a line, none where there is no such file; a line that was cut short is passed over.

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
    """The value that JSON text (bytes: UTF-8) stands for.

    Raises `JSONError` for what is not JSON, for nesting and numbers beyond what Python reads, and (unless `any_text`) for lone
    surrogates, which no UTF-8 file can hold.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
            raise RecursionError
        # An escape is the only way in for a surrogate without its other half.
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
    """Whether lists and objects stand within each other more than `MAX_DEPTH` times."""
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
    """A new file or folder beside `path`, locked while the block runs and removed after it if it is still there."""
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
    """Remove what killed writers of `path` left, or put back what they were about to replace."""
    pattern = re.compile(re.escape(_stem(path)) + r"\.[0-9a-f]{8}\.(partial|replaced)")
    for leftover in sorted(each for each in path.parent.iterdir() if pattern.fullmatch(each.name)):
        try:
            descriptor = os.open(leftover, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # removed meanwhile, or somebody else's
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
    """Bring a file, or the names in a folder, to the disk. Some file systems cannot do it for folders."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has no locks."""
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
    """Whether an open file is the one that `path` names now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False


def _holder(record: bytes) -> str:
    try:
        values = json.loads(record)
        return f"process {values['pid']} on {values['host']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
