"""Documents from files: .txt, .jsonl, .jsonl.zst, .parquet or a folder of these.

Everything that comes out is Unicode NFC with LF line ends. A jsonl line or parquet row is one document: `text`, and if it has
them `id`, `author` and `language`.
"""

from __future__ import annotations

import difflib
import importlib.resources
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorization_memory._files import FULL_DISK

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")

_READ_SIZE = 1 << 18


class CorpusError(ValueError):
    """Text or a packed corpus that cannot be used: the message names the file, the place in it and the remedy."""


@dataclass(frozen=True)
class Document:
    """One text, whole."""

    text: str
    """NFC, LF line ends, not empty."""
    id: str
    source: str
    """The mixture component it belongs to: the name given, or else its language, or else the stem of its file."""
    language: str | None
    author: str | None


def read_documents(path: Path, *, source: str | None = None) -> Iterator[Document]:
    """The documents of a file, or of all files in a folder (sorted, subfolders too; other kinds of file are left out).

    A document's source is `source` if given, else its language, else the subfolder that its file stands in, else the folder's
    name, or that of a file named by itself.

    Raises `CorpusError`, before the first document, for a path that cannot hold any, and later for one that turns out bad:
    not UTF-8, damaged, a line or row without text, a file without documents.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _suffix(file) and file.is_file() and not _hidden(file, path)]
        if not files:
            raise CorpusError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
        return (
            document
            for file in files
            for document in _read_file(file, str(file.relative_to(path)), source, _folder_source(file, path))
        )
    require_file(path)
    if not _suffix(path):
        raise CorpusError(f"{path}: unsupported kind of file; use one of {', '.join(SUFFIXES)}, or a folder of these")
    return _read_file(path, path.name, source, path.name[: -len(_suffix(path) or "")])


def builtin_corpus() -> Path:
    """The folder of the two books that ship with the package, one in `en`, one in `ja`, in the public domain."""
    return Path(str(importlib.resources.files(__package__) / "books"))


@contextmanager
def explain_full_disk(output: Path) -> Iterator[None]:
    """Turn the error of a full disk (or quota) into a `CorpusError` that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise CorpusError(f"{output}: no space left on the disk; nothing was kept; free some or write elsewhere") from error


def require_file(path: Path) -> None:
    """Raise `CorpusError`, suggesting the sibling with the nearest name, unless `path` exists."""
    if path.exists():
        return
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    if nearest:
        raise CorpusError(f"{path}: no such file or folder; did you mean {str(path.parent / nearest[0])!r}?")
    missing = path if path.parent.is_dir() else next(p for p in reversed(path.parents) if not p.is_dir())
    raise CorpusError(f"{path}: no such file or folder" + (f" ({missing} is not a folder)" if missing != path else ""))


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in reversed(SUFFIXES) if path.name.lower().endswith(suffix)), None)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _folder_source(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else folder.resolve().name


def _read_file(path: Path, name: str, source: str | None, fallback: str) -> Iterator[Document]:
    suffix = _suffix(path)
    if suffix == ".txt":
        whole = _clean(_decode(path.read_bytes(), path), str(path))
        if not whole.strip():
            raise CorpusError(f"{path}: the file is empty")
        yield Document(text=whole, id=name, source=source or fallback, language=None, author=None)
        return
    rows = _parquet_rows(path) if suffix == ".parquet" else _json_rows(path, compressed=suffix == ".jsonl.zst")
    number = 0
    for number, place, row in rows:
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            what = (
                "no field 'text'" if "text" not in row else "an empty 'text'" if text == "" else f"'text' = {str(text)[:40]!r}"
            )
            raise CorpusError(f"{place}: {what}; every document needs its text as a string in the field 'text'")
        language, author = (optional_text(row, field) for field in ("language", "author"))
        yield Document(
            text=_clean(text, place),
            id=optional_text(row, "id") or f"{name}:{number}",
            source=source or language or fallback,
            language=language,
            author=author,
        )
    if number == 0:
        raise CorpusError(f"{path}: the file is empty")


def optional_text(row: Mapping[str, Any], field: str) -> str | None:
    """A field of a row as text; None where it is missing or empty."""
    value = row.get(field)
    return None if value is None or value == "" else str(value)


def _clean(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise CorpusError(
            f"{place}: character {error.start} is the lone surrogate U+{code:04X}, which is no character; remove it"
        ) from error
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))


def _decode(data: bytes, path: Path, place: str = "", offset: int = 0) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")  # a byte-order mark is no part of the text
    except UnicodeDecodeError as error:
        # error.start leaves out the byte-order mark; error.object is what was decoded after it
        start = offset + error.start + len(data) - len(error.object)
        raise CorpusError(
            f"{place or path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {start}; "
            f"convert the file, for example with `iconv -f SHIFT_JIS -t UTF-8`"
        ) from error


def _json_rows(path: Path, *, compressed: bool) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line number from 1, "file, line n", object) of each line that is not blank."""
    offset = 0
    for number, line in enumerate(_lines(_zstd_blocks(path) if compressed else _file_blocks(path)), start=1):
        place = f"{path}, line {number}"
        text = _decode(line, path, f"{place} (offset in the text it unpacks to)" if compressed else place, offset)
        offset += len(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise CorpusError(
                f"{place}: not JSON ({error.msg} at character {error.pos}); each line is one JSON object"
            ) from error
        if not isinstance(row, dict):
            raise CorpusError(f'{place}: a {type(row).__name__}, not a JSON object; write {{"text": ...}}')
        yield number, place, row


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    pending = io.BytesIO()
    for block in blocks:
        start = 0
        while (end := block.find(b"\n", start) + 1) > 0:
            pending.write(block[start:end])
            yield pending.getvalue()
            pending = io.BytesIO()
            start = end
        pending.write(block[start:])
    if pending.tell():
        yield pending.getvalue()


def _file_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_READ_SIZE):
            yield block


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    import zstandard

    frame = None
    try:
        for block in _file_blocks(path):
            while block:  # a file may be several frames, one after the other
                frame = frame if frame is not None and not frame.eof else zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise CorpusError(f"{path}: not Zstandard data, or damaged ({error}); fetch or compress it again") from error
    # The library's own stream reader takes a file that was cut short for a short one.
    if frame is not None and not frame.eof:
        raise CorpusError(f"{path}: the compressed data is cut short; fetch or compress it again")


def _parquet_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise CorpusError(f"{path}: no column 'text' among {', '.join(names)}; rename the one that holds the documents")
            number = 0
            columns = [name for name in ("text", "id", "author", "language") if name in names]
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: not a parquet file, or damaged ({error})") from error
