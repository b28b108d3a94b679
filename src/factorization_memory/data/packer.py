"""Writes documents to the files of a packed corpus: assigns each to a split and appends its tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from factorization_memory.data.corpora import CorpusError, Document, utf8_length
from factorization_memory.data.manifest import DTYPES, FORMAT, TRAIN, VALIDATION, VERSION, fingerprint_of
from factorization_memory.data.tokenizer import Tokenizer

Holdout = Literal["auto", "hash", "author", "tail"]

_PENDING_BYTES = 1 << 16
"""Bytes of tokens buffered per split while packing."""


class Packer:
    """Writes documents to the files of their source and split."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, holdout: Holdout, fraction: float) -> None:
        self.documents = 0
        self.text_bytes = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._holdout: Holdout = holdout
        self._fraction = fraction
        self._dtype = np.dtype(DTYPES[tokenizer.vocab_size > 1 << 16])
        self._writers: dict[str, dict[str, _SplitWriter]] = {}
        self._languages: dict[str, set[str | None]] = {}

    def add(self, document: Document) -> None:
        """Tokenizes a document and appends it to the files of its source and split."""
        source = document.source
        if source not in self._writers:
            self._languages[source] = set()
            stem = f"{len(self._writers):02d}-" + _file_stem(source)
            self._writers[source] = {
                split: _SplitWriter(self._folder, f"{stem}.{split}", self._dtype) for split in (TRAIN, VALIDATION)
            }
        self._languages[source].add(document.language)
        for split, text in self._parts(document):
            writer = self._writers[source][split]
            for ids in self._tokenizer.encode_blocks(text):
                writer.write(ids)
            writer.end_document(self._tokenizer.document_end, utf8_length(text))
        self.documents += 1
        self.text_bytes += utf8_length(document.text)

    def _parts(self, document: Document) -> Iterator[tuple[str, str]]:
        if self._holdout == "tail":
            cut = _tail(document.text, self._fraction)
            yield from (
                (split, text) for split, text in ((TRAIN, document.text[:cut]), (VALIDATION, document.text[cut:])) if text
            )
            return
        yield _drawn(document, self._holdout, self._fraction), document.text

    def finish(self) -> None:
        """Finishes the files and writes the tokenizer and, last, the manifest."""
        entries: dict[str, Any] = {}
        for source in sorted(self._writers):
            languages = self._languages[source]
            entries[source] = {
                "language": next(iter(languages)) if len(languages) == 1 else None,
                "splits": {split: writer.finish() for split, writer in self._writers[source].items()},
            }
            for split in (TRAIN, VALIDATION):
                if not entries[source]["splits"][split]["documents"]:
                    raise CorpusError(f"source {source!r}: too little text to split into training and validation; add more")
        self._tokenizer.save(self._folder / "tokenizer.json")
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self._dtype.str,
            "tokenizer": self._tokenizer.fingerprint,
            "vocab_size": self._tokenizer.vocab_size,
            "holdout": self._holdout,
            "holdout_fraction": self._fraction,
            "sources": entries,
        }
        manifest["fingerprint"] = fingerprint_of(manifest)
        (self._folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _drawn(document: Document, holdout: Holdout, fraction: float) -> str:
    """The split that a whole document belongs to."""
    if holdout == "author" and document.author is None:
        raise CorpusError(
            f"document {document.id!r} of source {document.source!r} has no author, but holdout='author' needs one; "
            "add the field, or use holdout='hash'"
        )
    key = document.author if holdout == "author" and document.author is not None else document.text
    draw = int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest()) / 2**64
    return VALIDATION if draw < fraction else TRAIN


def choose_holdout(
    texts: Callable[[], Iterable[Document]], holdout: Holdout, fraction: float
) -> tuple[Literal["hash", "author", "tail"], str]:
    """The method that "auto" chooses, with the reason if "tail". Raises `CorpusError` if another method leaves a split
    empty."""
    if holdout == "tail":
        return holdout, ""
    by: Literal["hash", "author"] = "hash" if holdout == "auto" else holdout
    counts: dict[str, dict[str, int]] = {}
    for document in texts():
        counts.setdefault(document.source, {TRAIN: 0, VALIDATION: 0})[_drawn(document, by, fraction)] += 1
    empty = ((source, split) for source, parts in sorted(counts.items()) for split in parts if not parts[split])
    source, split = next(empty, ("", ""))
    if not split:
        return by, ""
    why = (
        f"source {source!r}: its {split} text would be empty, as no {'author' if by == 'author' else 'document'} of its "
        f"{sum(counts[source].values())} document(s) fell there with holdout={by!r}, holdout_fraction={fraction}"
    )
    if holdout == "auto":
        return "tail", why
    size = "a larger" if split == VALIDATION else "a smaller"
    raise CorpusError(f"{why}; use {size} holdout_fraction, or holdout='tail', which holds out the end of every document")


class _SplitWriter:
    """The two files of a split. Closed between calls: a corpus may have more sources than the limit of open files."""

    def __init__(self, folder: Path, stem: str, dtype: np.dtype[Any]) -> None:
        self._folder, self._stem, self._dtype = folder, stem, dtype
        self._tokens_file = folder / f"{stem}.tokens"
        self._tokens_file.touch()
        self._pending = bytearray()
        self._sha256 = hashlib.sha256()
        self._tokens = 0
        self._starts = [0]
        self._text_bytes = 0

    def write(self, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._pending += data
        self._sha256.update(data)
        self._tokens += len(ids)
        if len(self._pending) >= _PENDING_BYTES:
            self._flush()

    def _flush(self) -> None:
        with self._tokens_file.open("ab") as file:
            file.write(self._pending)
        self._pending.clear()

    def end_document(self, document_end: int, text_bytes: int) -> None:
        self.write(np.array([document_end]))
        self._starts.append(self._tokens)
        self._text_bytes += text_bytes

    def finish(self) -> dict[str, Any]:
        self._flush()
        documents = self._folder / f"{self._stem}.documents.npy"
        np.save(documents, np.array(self._starts, dtype=np.int64))
        return {
            "tokens": self._tokens,
            "documents": len(self._starts) - 1,
            "text_bytes": self._text_bytes,
            "tokens_file": {
                "name": self._tokens_file.name,
                "size": self._tokens * self._dtype.itemsize,
                "sha256": self._sha256.hexdigest(),
            },
            "documents_file": {
                "name": documents.name,
                "size": documents.stat().st_size,
                "sha256": hashlib.sha256(documents.read_bytes()).hexdigest(),
            },
        }


def _file_stem(source: str) -> str:
    """The stem of a source's file names, which may have at most 255 bytes."""
    return re.sub(r"[^\w.-]", "_", source).encode("utf-8")[:128].decode("utf-8", errors="ignore")


def _tail(text: str, fraction: float) -> int:
    """Start of the last `fraction` of `text`: at a line if one starts shortly before, else at a character."""
    cut = round(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, cut) + 1
    return line if cut - line < fraction * len(text) and line > 0 else cut
