"""Documents from files: .txt, .jsonl, .jsonl.zst, .parquet or a folder of these; and data sets fetched by name.

Everything that comes out is Unicode NFC with LF line ends. A jsonl line or parquet row is one document: `text`, and if it has
them `id`, `author` and `language`.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import glob
import importlib.resources
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from factorization_memory.config import ConfigError
from factorization_memory.data.named_corpora import (
    CORPORA,
    READERS,
    HubCorpus,
    download_command,
    find_corpus,
    local_files,
    reader,
)

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")

_READ_SIZE = 1 << 18
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


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


@dataclass(frozen=True)
class FetchRecord:
    """Where a fetched file comes from; written beside it."""

    data_set: str
    """OWNER/NAME on the hub, or the folder that was named."""
    config: str | None
    split: str
    revision: str | None
    """The commit that was read. Of local files it is the one asked for: they do not tell theirs."""
    local_files: tuple[str, ...] | None
    """What was read instead of the hub, relative to the folder given; None: the hub, or the folder as a whole."""
    text_column: str
    language: str | None
    """What was set on every document; None: what the rows say."""
    licence: str | None
    documents: int
    max_documents: int | None
    fetched: str
    """Date and time in UTC."""


def fetch_dataset(
    name: str,
    output: Path,
    *,
    config: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    revision: str | None = None,
    data_dir: Path | None = None,
    max_documents: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FetchRecord:
    """Stream a data set once, through the `datasets` library, into `output` (.jsonl.zst).

    `name` is a short one of `named_corpora`, which brings its configuration, revision and language with it, or OWNER/NAME on
    the hub, or a folder; what else is given goes before what the short name says. With `data_dir`, files on disk laid out
    like the data set are read and the hub is not asked. `progress` gets the documents and (unpacked) bytes written so far.

    Rows without text are left out; `id`, `title`, `author` and `language` are kept where there are any. The file and the
    record beside it (`source_record`), which is also returned, are written aside and renamed when whole.

    Raises `ConfigError` for an unknown short name or a `max_documents` below 1, and `CorpusError` when `datasets` is not
    installed, the hub cannot be reached, the data set has no such column or no text, or `output` exists.
    """
    output = Path(output)
    if not output.name.endswith(".jsonl.zst"):
        raise CorpusError(f"{output}: the name of the fetched file must end in .jsonl.zst")
    if output.exists():
        raise CorpusError(f"{output}: the file exists; remove it or choose another name")
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"max_documents={max_documents}: use 1 or more, or leave it out to take all")
    asked = find_corpus(name).choose(config=config, split=split, text_column=text_column, revision=revision)
    rows, read_revision, files = _open_data_set(name, asked, data_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside, record_path = output.with_name(output.name + ".partial"), source_record(output)
    record_aside = record_path.with_name(record_path.name + ".partial")
    try:
        with explain_full_disk(output):
            documents = _write_rows(_explain_reading(rows, name), aside, name, asked, max_documents, progress)
            record = FetchRecord(
                data_set=asked.data_set,
                config=asked.config,
                split=asked.split,
                revision=read_revision,
                local_files=files,
                text_column=asked.text_column,
                language=asked.language,
                licence=asked.licence,
                documents=documents,
                max_documents=max_documents,
                fetched=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            text = json.dumps(dataclasses.asdict(record), ensure_ascii=False, indent=2) + "\n"
            record_aside.write_text(text, encoding="utf-8")
        os.replace(record_aside, record_path)
        os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)
        record_aside.unlink(missing_ok=True)
    return record


def source_record(output: Path) -> Path:
    """Where `fetch_dataset` writes what it knows of `output`: `NAME.source.json` beside `NAME.jsonl.zst`."""
    return output.with_name(output.name.removesuffix(".jsonl.zst") + ".source.json")


@contextmanager
def explain_full_disk(output: Path) -> Iterator[None]:
    """Turn the error of a full disk (or quota) into a `CorpusError` that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
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
        language, author = (_optional(row, field) for field in ("language", "author"))
        yield Document(
            text=_clean(text, place),
            id=_optional(row, "id") or f"{name}:{number}",
            source=source or language or fallback,
            language=language,
            author=author,
        )
    if number == 0:
        raise CorpusError(f"{path}: the file is empty")


def _optional(row: Mapping[str, Any], field: str) -> str | None:
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


def _open_data_set(
    name: str, corpus: HubCorpus, data_dir: Path | None
) -> tuple[Iterable[Any], str | None, tuple[str, ...] | None]:
    """Rows to stream, the revision they are of, and the local files they come from."""
    files: list[Path] = []
    if data_dir is not None:
        require_file(data_dir)
        files = local_files(corpus, data_dir)
        if corpus.pattern and not files:
            raise CorpusError(
                f"{data_dir}: holds no {corpus.pattern} of the kinds {', '.join(READERS)}, the files of {name!r}; lay them out "
                f"as the data set does, as this does where there is a network: {download_command(corpus)}"
            )
        kinds = sorted({str(reader(path)) for path in files})
        if len(kinds) > 1:
            raise CorpusError(f"{data_dir}: {corpus.pattern} are files of several kinds ({', '.join(kinds)}); keep one")
    elif name in CORPORA and Path(corpus.data_set).is_dir():
        # The library would take it for the data set, whatever revision it is of.
        raise CorpusError(
            f"{corpus.data_set}: this folder has the name of the data set of {name!r}; read it with "
            f"--data-dir {corpus.data_set}, or work in another folder"
        )
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"fetching {name!r} needs the `datasets` library: pip install datasets") from error
    try:
        if files:
            # The library takes paths for patterns. Links are left as they are: what they point to may have another suffix.
            paths = [glob.escape(str(path.absolute())) for path in files]
            builder = datasets.load_dataset_builder(str(reader(files[0])), data_files={corpus.split: paths})
        elif data_dir is not None:
            builder = datasets.load_dataset_builder(str(data_dir.resolve()), corpus.config)
        else:
            builder = datasets.load_dataset_builder(corpus.data_set, corpus.config, revision=corpus.revision)
        rows = builder.as_streaming_dataset(split=corpus.split)
    except Exception as error:  # the library raises many kinds
        what = f"data set {name!r} (config {corpus.config!r}, split {corpus.split!r}) cannot be loaded"
        if _is_of_network(error):
            raise CorpusError(
                f"{what}: the hub cannot be reached (or HF_HUB_OFFLINE is set); download its files where there is a network, "
                f"{download_command(corpus)}, and name the folder: --data-dir DIR"
            ) from error
        raise CorpusError(f"{what}: {error}") from error
    if data_dir is not None:
        return rows, corpus.revision, tuple(path.relative_to(data_dir).as_posix() for path in files) or None
    commit = builder.hash if _is_commit(builder.hash) else corpus.revision
    if _is_commit(corpus.revision) and commit != corpus.revision:
        # Where there is no network, the library takes what it finds in its cache, of any revision.
        raise CorpusError(
            f"data set {name!r}: the hub cannot be reached, and the cache holds revision {commit}, not {corpus.revision}; "
            f"take it with --revision {commit}, or download the files where there is a network, "
            f"{download_command(corpus)}, and name the folder: --data-dir DIR"
        )
    return rows, commit, None


def _is_of_network(error: Exception) -> bool:
    """Whether nothing answered, as told by Python or by one of the clients that versions of the library use."""
    client = type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))
    return client or isinstance(error, (ConnectionError, TimeoutError))


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _explain_reading(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """The rows, with the many kinds of error of their reading as a `CorpusError` each."""
    number = 0
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL_DISK:
                raise
            raise CorpusError(
                f"data set {name!r}: reading stopped after {number:,} rows ({type(error).__name__}: {error}); "
                "nothing was kept; if the network failed, run it again; if a file is damaged, download it again"
            ) from error
        number += 1
        yield row


def _write_rows(
    rows: Iterable[Any],
    path: Path,
    name: str,
    corpus: HubCorpus,
    max_documents: int | None,
    progress: Callable[[int, int], None] | None,
) -> int:
    import zstandard

    columns = {"id": corpus.id_column, "title": corpus.title_column, "author": "author", "language": "language"}
    documents = size = 0
    with path.open("wb") as file, zstandard.ZstdCompressor(level=6).stream_writer(file) as writer:
        for number, row in enumerate(rows, start=1):
            if corpus.text_column not in row:
                raise CorpusError(
                    f"data set {name!r}: no column {corpus.text_column!r} among {', '.join(row)}; name another text column"
                )
            text = row[corpus.text_column]
            if not isinstance(text, str) or not text.strip():
                continue
            document = {field: value for field, column in columns.items() if (value := _optional(row, column))}
            document.setdefault("id", f"{name}:{number}")
            if corpus.language:
                document["language"] = corpus.language
            document["text"] = text
            line = json.dumps(document, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"
            writer.write(line)
            documents += 1
            size += len(line)
            if progress is not None and documents % 1000 == 0:
                progress(documents, size)
            if documents == max_documents:
                break
    if documents == 0:
        raise CorpusError(f"data set {name!r}: no row has text in the column {corpus.text_column!r}")
    return documents
