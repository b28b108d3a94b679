"""Rows of the files that hold documents: lines of JSON, plain or compressed, and rows of parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from factorization_memory._files import JSONError, UnreadableError, explain_unreadable, parse_json
from factorization_memory.data.encodings import conversion, decode
from factorization_memory.data.errors import CorpusError

_READ_SIZE = 1 << 18
_LONGEST_WINDOW = 1 << 31
"""Window size of `zstd --long=31`, the maximum; memory is allocated only for the window that a file uses."""


def json_rows(path: Path, *, compressed: bool) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line number from 1, "file, line n", object) for each non-blank line."""
    offset = 0
    for number, line in enumerate(_lines(_zstd_blocks(path) if compressed else _file_blocks(path)), start=1):
        place = f"{path}, line {number}"
        text = decode(line, path, f"{place} (offset in the text it unpacks to)" if compressed else place, offset)
        offset += len(line)
        del line  # a line may be huge: keep only one copy in memory
        if text.isspace():
            continue
        try:
            row = parse_json(text, any_text=True)
        except JSONError as error:
            raise CorpusError(f"{place}: {error}; write one JSON object per line") from error
        del text
        if not isinstance(row, dict):
            raise CorpusError(f'{place}: expected a JSON object, got a {type(row).__name__}; write {{"text": ...}}')
        yield number, place, row


def parquet_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(row number from 1, "file, row n", fields) for each row."""
    import pyarrow
    import pyarrow.parquet

    try:
        with explain_unreadable(path), path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise CorpusError(f"{path}: no column 'text' among {', '.join(names)}; rename the column with the documents")
            number = 0
            columns = [name for name in ("text", "id", "author", "language") if name in names]
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in _rows_of(batch, path, number):
                    number += 1
                    yield number, f"{path}, row {number}", row
    except UnreadableError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: not a parquet file, or damaged ({error})") from error


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for block in blocks:
        start = 0
        while (end := block.find(b"\n", start) + 1) > 0:
            pending.append(block[start:end])
            yield _joined(pending)
            start = end
        pending.append(block[start:])
    if any(pending):
        yield _joined(pending)


def _joined(pieces: list[bytes]) -> bytes:
    """Joins the pieces and empties the list, to free them."""
    line = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    pieces.clear()
    return line


def _file_blocks(path: Path) -> Iterator[bytes]:
    with explain_unreadable(path), path.open("rb") as file:
        while block := file.read(_READ_SIZE):
            yield block


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
    frame = None
    try:
        for block in _file_blocks(path):
            while block:  # a file may have several frames
                frame = frame if frame is not None and not frame.eof else decompressor.decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise CorpusError(f"{path}: not a Zstandard file, or damaged ({error}); download or compress it again") from error
    # The library's own stream reader does not detect truncated files.
    if frame is not None and not frame.eof:
        raise CorpusError(f"{path}: the compressed data is cut short; download or compress it again")


def _rows_of(batch: Any, path: Path, before: int) -> list[dict[str, Any]]:
    """The rows of a record batch; `before` rows of its file precede it."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # bytes that are not UTF-8, a date beyond Python's
        for index in range(len(batch)):
            place = f"{path}, row {before + index + 1}"
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start} of a field"
                raise CorpusError(f"{place}: not UTF-8: {byte}; {conversion(error.object)}") from None
            except (ValueError, OverflowError) as error:
                raise CorpusError(f"{place}: cannot be read ({error}); fix or remove that row") from None
        raise
