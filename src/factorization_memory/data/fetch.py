"""Streams data sets of the Hugging Face hub, or local files laid out like them, to a file, with a record of their origin."""

from __future__ import annotations

import dataclasses
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from factorization_memory._files import FULL_DISK, atomic_file, lock, write_atomic
from factorization_memory.config import ConfigError
from factorization_memory.data.corpora import CorpusError, explain_full_disk, optional_text, require_file
from factorization_memory.data.named_corpora import (
    CORPORA,
    READERS,
    HubCorpus,
    download_command,
    find_corpus,
    local_files,
    reader,
)


@dataclass(frozen=True)
class FetchRecord:
    """Origin of a fetched file; written next to it."""

    data_set: str
    """OWNER/NAME on the hub, or the given folder."""
    config: str | None
    split: str
    revision: str | None
    """The commit that was read. For local files the requested one, since they do not record theirs."""
    local_files: tuple[str, ...] | None
    """Files read instead of the hub, relative to the given folder; None: the hub, or the whole folder."""
    text_column: str
    language: str | None
    """Language set on every document; None: as given by the rows."""
    licence: str | None
    documents: int
    max_documents: int | None
    fetched: str
    """Date and time of the fetch in UTC."""


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

    `name` is a short name of `named_corpora`, which implies a configuration, revision and language, or OWNER/NAME on the hub,
    or a folder; explicit arguments take precedence over those implied. With `data_dir`, files on disk laid out like the data
    set are read instead of the hub. `progress` gets the documents and (uncompressed) bytes written so far.

    Rows without text are skipped; `id`, `title`, `author` and `language` are kept if present. The file and its record
    (`source_record`), which is also returned, are written under temporary names and renamed when complete.

    Raises `ConfigError` for an unknown short name or a `max_documents` below 1, and `CorpusError` if `datasets` is not
    installed, the hub cannot be reached, the data set has no such column or no text, or `output` exists or is being fetched.
    """
    output = Path(output)
    if not output.name.endswith(".jsonl.zst"):
        raise CorpusError(f"{output}: the name of the output file must end in .jsonl.zst")
    _require_free(output)
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"max_documents={max_documents}: use 1 or more, or leave it out to fetch all")
    asked = find_corpus(name).choose(config=config, split=split, text_column=text_column, revision=revision)
    rows, read_revision, files = _open_data_set(name, asked, data_dir)

    def held(holder: str) -> CorpusError:
        return CorpusError(f"{output}: another process is fetching into this file; wait for it, or choose another name")

    output.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(output), lock(output.with_name(output.name + ".lock"), held):
        # Check again, now that no other process can write there.
        _require_free(output)
        with atomic_file(output) as aside:
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
            # The record first, so that no fetched file ever exists without one.
            write_atomic(source_record(output), json.dumps(dataclasses.asdict(record), ensure_ascii=False, indent=2) + "\n")
    return record


def _require_free(output: Path) -> None:
    if output.exists():
        raise CorpusError(f"{output}: already exists; remove it, or choose another name")


def source_record(output: Path) -> Path:
    """Path of the record that `fetch_dataset` writes for `output`: `NAME.source.json` next to `NAME.jsonl.zst`."""
    return output.with_name(output.name.removesuffix(".jsonl.zst") + ".source.json")


def _open_data_set(
    name: str, corpus: HubCorpus, data_dir: Path | None
) -> tuple[Iterable[Any], str | None, tuple[str, ...] | None]:
    """Rows to stream, their revision, and the local files they come from."""
    files: list[Path] = []
    if data_dir is not None:
        require_file(data_dir)
        files = local_files(corpus, data_dir)
        if corpus.pattern and not files:
            raise CorpusError(
                f"{data_dir}: no {corpus.pattern} file of {name!r} here ({', '.join(READERS)}); lay the files out as the "
                f"data set does, as this command does on a machine with network access: {download_command(corpus)}"
            )
        kinds = sorted({str(reader(path)) for path in files})
        if len(kinds) > 1:
            raise CorpusError(f"{data_dir}: {corpus.pattern} is files of several types ({', '.join(kinds)}); keep one type")
    elif name in CORPORA and Path(corpus.data_set).is_dir():
        # The library would use it as the data set, whatever its revision.
        raise CorpusError(
            f"{corpus.data_set}: a folder here has the same name as the data set of {name!r}; read it with "
            f"--data-dir {corpus.data_set}, or run the command in another folder"
        )
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"fetching {name!r} needs the `datasets` library: pip install datasets") from error
    try:
        if files:
            # The library treats paths as patterns. Do not resolve links: their targets may have another suffix.
            paths = [glob.escape(str(path.absolute())) for path in files]
            builder = datasets.load_dataset_builder(str(reader(files[0])), data_files={corpus.split: paths})
        elif data_dir is not None:
            builder = datasets.load_dataset_builder(str(data_dir.resolve()), corpus.config)
        else:
            builder = datasets.load_dataset_builder(corpus.data_set, corpus.config, revision=corpus.revision)
        rows = builder.as_streaming_dataset(split=corpus.split)
    except Exception as error:  # the library raises many kinds
        what = f"data set {name!r} (config {corpus.config!r}, split {corpus.split!r}) could not be loaded"
        if _is_of_network(error):
            raise CorpusError(
                f"{what}: the hub cannot be reached (or HF_HUB_OFFLINE is set); download its files on a machine with "
                f"network access, {download_command(corpus)}, and pass the folder with --data-dir DIR"
            ) from error
        raise CorpusError(f"{what}: {error}") from error
    if data_dir is not None:
        return rows, corpus.revision, tuple(path.relative_to(data_dir).as_posix() for path in files) or None
    commit = builder.hash if _is_commit(builder.hash) else corpus.revision
    if _is_commit(corpus.revision) and commit != corpus.revision:
        # Without a network the library falls back to its cache, whatever the revision.
        raise CorpusError(
            f"data set {name!r}: the hub cannot be reached, and the cache has revision {commit}, not {corpus.revision}; "
            f"use it with --revision {commit}, or download the files on a machine with network access, "
            f"{download_command(corpus)}, and pass the folder with --data-dir DIR"
        )
    return rows, commit, None


def _is_of_network(error: Exception) -> bool:
    """Whether the error is a network failure, raised by Python or by one of the HTTP clients that the library has used."""
    client = type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))
    return client or isinstance(error, (ConnectionError, TimeoutError))


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _explain_reading(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """Passes on the rows, turning any error of reading them into a `CorpusError`."""
    number = 0
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL_DISK:
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
                    f"data set {name!r}: no column {corpus.text_column!r} among {', '.join(row)}; give another as text_column"
                )
            text = row[corpus.text_column]
            if not isinstance(text, str) or not text.strip():
                continue
            document = {field: value for field, column in columns.items() if (value := optional_text(row, column))}
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
        raise CorpusError(f"data set {name!r}: no text in the column {corpus.text_column!r}")
    return documents
