"""Documents from files: .txt, .jsonl, .jsonl.zst, .parquet or a folder of these.

All text is returned in Unicode NFC with LF line ends. Each jsonl line or parquet row is one document: `text`, and optionally
`id`, `author` and `language`.
"""

from __future__ import annotations

import difflib
import importlib.resources
import logging
import os
import re
import reprlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorization_memory._files import FULL_DISK, explain_unreadable
from factorization_memory.data.encodings import decode
from factorization_memory.data.errors import CorpusError
from factorization_memory.data.folders import HIDDEN, OTHER_KIND, find_files
from factorization_memory.data.rows import json_rows, parquet_rows

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One complete text."""

    text: str
    """NFC, LF line ends, not empty."""
    id: str
    source: str
    """The mixture component it belongs to: the given name, else its language, else the stem of its file."""
    language: str | None
    author: str | None


def read_documents(
    path: Path, *, source: str | None = None, skipped: Callable[[Path, str], None] | None = None
) -> Iterator[Document]:
    """The documents of a file, or of all files in a folder (sorted, subfolders too, links followed once).

    A document's source is `source` if given, else its language, else the subfolder of its file, else the name of the folder,
    or of the file if a single file is given.

    `skipped(path, reason)` is called, before the first document, for everything in a folder that is not read: files of other
    types, hidden ones, broken or circular links. By default, links are logged as warnings, the rest at level info.

    Raises `CorpusError`, before the first document, for a path that cannot have any, and later for invalid content: not
    UTF-8, damaged, a line or row without text, a file without documents.
    """
    path = Path(path)
    require_file(path)
    if path.is_dir():
        with explain_unreadable(path):
            files, others = find_files(path, lambda name: _suffix(name) is not None)
        if not files:
            why = "".join(f"; {other.name} is {reason}" for other, reason in others[:3])
            raise CorpusError(f"{path}: no {', '.join(SUFFIXES)} file in this folder{why}")
        for other, reason in others:
            (skipped or _log_skipped)(other, reason)
        return (
            document
            for file in files
            for document in _read_file(file, str(file.relative_to(path)), source, _folder_source(file, path))
        )
    if not _suffix(path.name):
        raise CorpusError(f"{path}: unsupported file type; use one of {', '.join(SUFFIXES)}, or a folder of these")
    return _read_file(path, path.name, source, path.name[: -len(_suffix(path.name) or "")])


def builtin_corpus() -> Path:
    """The folder of the two public-domain books that ship with the package, one in `en`, one in `ja`."""
    return Path(str(importlib.resources.files(__package__) / "books"))


@contextmanager
def explain_full_disk(output: Path) -> Iterator[None]:
    """Turns the error of a full disk (or quota) into a `CorpusError` that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise CorpusError(f"{output}: no space left on the disk; nothing was kept; free some, or write elsewhere") from error


def require_file(path: Path) -> None:
    """Raises `CorpusError` if `path` does not exist, suggesting the sibling with the most similar name."""
    with explain_unreadable(path):
        if path.exists():
            return
    if path.is_symlink():
        raise CorpusError(f"{path}: a link that leads nowhere (to {os.readlink(path)}); fix it, or give another file or folder")
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    if nearest:
        raise CorpusError(f"{path}: no such file or folder; did you mean {str(path.parent / nearest[0])!r}?")
    missing = path if path.parent.is_dir() else next(p for p in reversed(path.parents) if not p.is_dir())
    raise CorpusError(f"{path}: no such file or folder" + (f" ({missing} is not a folder)" if missing != path else ""))


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in reversed(SUFFIXES) if name.lower().endswith(suffix)), None)


def _log_skipped(path: Path, reason: str) -> None:
    level = logging.INFO if reason in (OTHER_KIND, HIDDEN) else logging.WARNING
    logging.getLogger(__name__).log(level, "%s: skipped, it is %s", path, reason)


def _folder_source(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else folder.resolve().name


def _read_file(path: Path, name: str, source: str | None, fallback: str) -> Iterator[Document]:
    if _SURROGATE.search(source or fallback):
        raise CorpusError(
            f"{path}: the source name {source or fallback!r} is not UTF-8; rename the file or folder it comes "
            "from, or name the source with NAME=PATH"
        )
    suffix = _suffix(path.name)
    if suffix == ".txt":
        with explain_unreadable(path):
            data = path.read_bytes()
        whole = _clean(decode(data, path), str(path))
        del data
        if not whole.strip():
            raise CorpusError(f"{path}: the file is empty")
        yield Document(text=whole, id=name, source=source or fallback, language=None, author=None)
        return
    rows = parquet_rows(path) if suffix == ".parquet" else json_rows(path, compressed=suffix == ".jsonl.zst")
    number = 0
    for number, place, row in rows:
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            shown = reprlib.repr(text)[:40]
            what = "no field 'text'" if "text" not in row else "an empty 'text'" if text == "" else f"'text' = {shown!r}"
            raise CorpusError(f"{place}: {what}; give every document its text as a string in the field 'text'")
        language, author = (optional_text(row, field) for field in ("language", "author"))
        identity = optional_text(row, "id")
        for field, value in (("id", identity), ("author", author), ("language", language)):
            _require_characters(value, f"{place}, field {field!r}")
        if isinstance(row.get("language"), (dict, list)):
            shown = reprlib.repr(row["language"])[:40]
            raise CorpusError(f"{place}: 'language' = {shown!r}; write it as a string, such as \"en\", or leave it out")
        yield Document(
            text=_clean(text, place),
            id=identity or f"{name}:{number}",
            source=source or language or fallback,
            language=language,
            author=author,
        )
    if number == 0:
        raise CorpusError(f"{path}: the file is empty")


def optional_text(row: Mapping[str, Any], field: str) -> str | None:
    """A field of a row as text; None if missing or empty."""
    value = row.get(field)
    return None if value is None or value == "" else str(value)


def utf8_length(text: str) -> int:
    """Bytes of `text` as UTF-8, counted without copying it all."""
    size = 1 << 18
    return sum(len(text[start : start + size].encode("utf-8")) for start in range(0, len(text), size))


def _require_characters(text: str | None, place: str) -> None:
    lone = _SURROGATE.search(text or "")
    if lone is not None:
        raise CorpusError(
            f"{place}: character {lone.start()} is the lone surrogate U+{ord(lone[0]):04X}, which is not a character; remove it"
        )


def _clean(text: str, place: str) -> str:
    _require_characters(text, place)
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
