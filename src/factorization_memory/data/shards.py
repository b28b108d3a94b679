"""Packed corpora: the token ids of every source, cut into training and validation text, as memory-mapped files.

A packed corpus is a folder: `manifest.json`, `tokenizer.json`, and for each source and split a `.tokens` file (little-endian
uint16 or uint32, documents whole, each ended by the tokenizer's `document_end`) and a `.documents.npy` (int64, where each
document starts, and the total). It is written aside and renamed when whole; sizes and checksums stand in the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from factorization_memory._files import atomic_folder, lock
from factorization_memory.data.corpora import CorpusError, Document, explain_full_disk, read_documents, require_file
from factorization_memory.data.tokenizer import Tokenizer, TokenizerError

Holdout = Literal["hash", "author", "tail"]

TRAIN, VALIDATION = "train", "validation"

_FORMAT, _VERSION = "factorization_memory.corpus", 1


@dataclass(frozen=True)
class Split:
    """The text of one source for training, or for validation."""

    tokens: np.ndarray
    """Token ids [num_tokens], uint16 or uint32, memory-mapped read-only."""
    document_starts: np.ndarray
    """int64 [num_documents + 1]: where each document starts, and num_tokens."""
    text_bytes: int
    """UTF-8 bytes of the text, the divisor of bits per byte."""
    language: str | None
    """Language of all its documents; None if they say none or several."""

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1


@dataclass(frozen=True)
class Source:
    """One component of the mixture."""

    name: str
    language: str | None
    splits: dict[str, Split]
    """"train" and "validation"."""


@dataclass(frozen=True)
class PackedCorpus:
    """A packed corpus, opened: nothing is in memory but the index."""

    folder: Path
    sources: dict[str, Source]
    """By name, in the manifest's order (sorted)."""
    tokenizer: Tokenizer
    fingerprint: str
    """sha256 over the manifest, checksums of all files included: equal corpora have equal ones."""

    @classmethod
    def open(cls, folder: Path) -> PackedCorpus:
        """Open what `pack` wrote.

        Raises `CorpusError` for a folder that is none, of a newer version, with a file missing or cut short, or with another
        tokenizer than it was packed with. Checksums are left to `verify`.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        tokenizer_file = _present(folder, "tokenizer.json")
        try:
            tokenizer = Tokenizer.load(tokenizer_file)
        except TokenizerError as error:
            raise CorpusError(f"{error}; put back the tokenizer of this corpus, or pack it again") from error
        if tokenizer.fingerprint != manifest["tokenizer"]:
            raise CorpusError(
                f"{tokenizer_file}: another tokenizer (fingerprint {tokenizer.fingerprint[:12]}) than the corpus was packed "
                f"with ({manifest['tokenizer'][:12]}); put the right one back, or pack again"
            )
        sources = {
            name: Source(
                name=name,
                language=entry["language"],
                splits={
                    split: _open_split(folder, files, np.dtype(manifest["dtype"]), entry["language"])
                    for split, files in entry["splits"].items()
                },
            )
            for name, entry in manifest["sources"].items()
        }
        return cls(folder=folder, sources=sources, tokenizer=tokenizer, fingerprint=manifest["fingerprint"])

    def verify(self) -> None:
        """Read every file and compare its checksum. Raises `CorpusError` naming the first that changed since packing."""
        for entry in _read_manifest(self.folder)["sources"].values():
            for files in entry["splits"].values():
                for file in (files["tokens_file"], files["documents_file"]):
                    with _present(self.folder, file["name"]).open("rb") as stream:
                        found = hashlib.file_digest(stream, "sha256").hexdigest()
                    if found != file["sha256"]:
                        raise CorpusError(
                            f"{self.folder / file['name']}: changed since it was packed (checksum); pack the corpus again"
                        )


def pack(
    inputs: Sequence[tuple[str | None, Path]],
    tokenizer: Tokenizer,
    output: Path,
    *,
    holdout: Holdout = "hash",
    holdout_fraction: float = 0.05,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackedCorpus:
    """Tokenize the documents of `inputs`, (source name or None, file or folder) each, into the packed corpus `output`.

    `holdout` says what is kept for validation, about `holdout_fraction` of it: "hash", whole documents, by a hash of their text
    (equal documents stay together); "author", all documents of an author, by a hash of the name; "tail", the end of every
    document, cut at a line. `progress(documents, bytes)` is called with the totals so far.

    The result does not depend on anything but the arguments and the text. Raises `CorpusError` for bad text, a source whose
    training or validation text would be empty, a full disk, an `output` that another process is packing into, or one that
    exists (unless `overwrite`, which replaces a packed corpus once the new one is whole). Interrupted, it leaves nothing under
    the name `output`; the next call starts anew.
    """
    output = Path(output)
    if holdout not in get_args(Holdout):
        raise CorpusError(f"holdout={holdout!r}: use one of {', '.join(get_args(Holdout))}")
    if not 0 < holdout_fraction < 1:
        raise CorpusError(f"holdout_fraction={holdout_fraction!r}: use a share between 0 and 1, for example 0.05")
    if not inputs:
        raise CorpusError("no input to pack; name at least one file or folder")
    _require_free(output, overwrite)
    documents = [read_documents(path, source=source) for source, path in inputs]

    def held(holder: str) -> CorpusError:
        return CorpusError(f"{output}: another process is packing into it; wait for that one, or choose another folder")

    output.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(output), lock(output.with_name(output.name + ".lock"), held):
        # Again, now that no other process can write there.
        _require_free(output, overwrite)
        with atomic_folder(output, overwrite=overwrite) as aside, contextlib.ExitStack() as files:
            packer = _Packer(aside, files, tokenizer, holdout, holdout_fraction)
            for document in (document for some in documents for document in some):
                packer.add(document)
                if progress is not None:
                    progress(packer.documents, packer.text_bytes)
            packer.finish()
    return PackedCorpus.open(output)


class _Packer:
    """Writes documents into the files of their source and split."""

    def __init__(
        self, folder: Path, files: contextlib.ExitStack, tokenizer: Tokenizer, holdout: Holdout, fraction: float
    ) -> None:
        self.documents = 0
        self.text_bytes = 0
        self._folder = folder
        self._files = files
        self._tokenizer = tokenizer
        self._holdout: Holdout = holdout
        self._fraction = fraction
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._writers: dict[str, dict[str, _SplitWriter]] = {}
        self._languages: dict[str, set[str | None]] = {}

    def add(self, document: Document) -> None:
        source = document.source
        if source not in self._writers:
            self._languages[source] = set()
            stem = f"{len(self._writers):02d}-" + re.sub(r"[^\w.-]", "_", source)
            self._writers[source] = {
                split: self._files.enter_context(_SplitWriter(self._folder, f"{stem}.{split}", self._dtype))
                for split in (TRAIN, VALIDATION)
            }
        self._languages[source].add(document.language)
        for split, text in self._parts(document):
            writer = self._writers[source][split]
            for ids in self._tokenizer.encode_blocks(text):
                writer.write(ids)
            writer.end_document(self._tokenizer.document_end, len(text.encode("utf-8")))
        self.documents += 1
        self.text_bytes += len(document.text.encode("utf-8"))

    def _parts(self, document: Document) -> Iterator[tuple[str, str]]:
        if self._holdout == "tail":
            cut = _tail(document.text, self._fraction)
            yield from (
                (split, text) for split, text in ((TRAIN, document.text[:cut]), (VALIDATION, document.text[cut:])) if text
            )
            return
        if self._holdout == "author" and document.author is None:
            raise CorpusError(
                f"document {document.id!r} of source {document.source!r} has no author, which holdout='author' needs; "
                "add the field, or use holdout='hash'"
            )
        key = document.author if self._holdout == "author" and document.author is not None else document.text
        draw = int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest()) / 2**64
        yield VALIDATION if draw < self._fraction else TRAIN, document.text

    def finish(self) -> None:
        """Close the files and write tokenizer and manifest, which comes last."""
        entries: dict[str, Any] = {}
        for source in sorted(self._writers):
            languages = self._languages[source]
            entries[source] = {
                "language": next(iter(languages)) if len(languages) == 1 else None,
                "splits": {split: writer.finish() for split, writer in self._writers[source].items()},
            }
            for split in (TRAIN, VALIDATION):
                if not entries[source]["splits"][split]["documents"]:
                    raise CorpusError(self._empty_split(source, split, entries[source]["splits"]))
        self._tokenizer.save(self._folder / "tokenizer.json")
        manifest: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "dtype": self._dtype.str,
            "tokenizer": self._tokenizer.fingerprint,
            "vocab_size": self._tokenizer.vocab_size,
            "holdout": self._holdout,
            "holdout_fraction": self._fraction,
            "sources": entries,
        }
        manifest["fingerprint"] = _fingerprint(manifest)
        (self._folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _empty_split(self, source: str, split: str, splits: dict[str, Any]) -> str:
        documents = sum(files["documents"] for files in splits.values())
        kind = "author" if self._holdout == "author" else "document"
        remedy = "a larger" if split == VALIDATION else "a smaller"
        if self._holdout == "tail":
            return f"source {source!r}: its text is too short to give both training and validation text; add more"
        return (
            f"source {source!r}: its {split} text would be empty, as no {kind} of its {documents} document(s) fell there with "
            f"holdout={self._holdout!r}, holdout_fraction={self._fraction}; use {remedy} holdout_fraction, or holdout='tail', "
            "which holds out the end of every document"
        )


class _SplitWriter(contextlib.AbstractContextManager["_SplitWriter"]):
    """The two files of one split."""

    def __init__(self, folder: Path, stem: str, dtype: np.dtype[Any]) -> None:
        self._folder, self._stem, self._dtype = folder, stem, dtype
        self._file = (folder / f"{stem}.tokens").open("wb")
        self._sha256 = hashlib.sha256()
        self._tokens = 0
        self._starts = [0]
        self._text_bytes = 0

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._sha256.update(data)
        self._tokens += len(ids)

    def end_document(self, document_end: int, text_bytes: int) -> None:
        self.write(np.array([document_end]))
        self._starts.append(self._tokens)
        self._text_bytes += text_bytes

    def finish(self) -> dict[str, Any]:
        self._file.close()
        documents = self._folder / f"{self._stem}.documents.npy"
        np.save(documents, np.array(self._starts, dtype=np.int64))
        return {
            "tokens": self._tokens,
            "documents": len(self._starts) - 1,
            "text_bytes": self._text_bytes,
            "tokens_file": {
                "name": f"{self._stem}.tokens",
                "size": self._tokens * self._dtype.itemsize,
                "sha256": self._sha256.hexdigest(),
            },
            "documents_file": {
                "name": documents.name,
                "size": documents.stat().st_size,
                "sha256": hashlib.sha256(documents.read_bytes()).hexdigest(),
            },
        }


def _tail(text: str, fraction: float) -> int:
    """Where the last `fraction` of `text` begins: at a line if one begins shortly before, else at a character."""
    cut = round(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, cut) + 1
    return line if cut - line < fraction * len(text) and line > 0 else cut


def _require_free(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "manifest.json").is_file():
        raise CorpusError(f"{output}: exists and is not a packed corpus; choose another folder")
    if not overwrite:
        raise CorpusError(f"{output}: holds a packed corpus already; choose another folder, or ask to overwrite it")


def _fingerprint(manifest: dict[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    require_file(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise CorpusError(f"{folder}: not a packed corpus (no manifest.json); make one with `fmem data pack`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"{path}: damaged ({error}); pack the corpus again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CorpusError(f"{path}: not the manifest of a packed corpus; make one with `fmem data pack`")
    if manifest.get("version") != _VERSION:
        raise CorpusError(
            f"{path}: packed in format version {manifest.get('version')!r}, this program reads version {_VERSION}; "
            "update the program, or pack the corpus again"
        )
    if _fingerprint(manifest) != manifest.get("fingerprint"):
        raise CorpusError(f"{path}: changed since it was written (its fingerprint does not match); pack the corpus again")
    return manifest


def _present(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise CorpusError(f"{folder / name}: the file is missing; put it back, or pack the corpus again")
    return folder / name


def _open_split(folder: Path, files: dict[str, Any], dtype: np.dtype[Any], language: str | None) -> Split:
    for file in (files["tokens_file"], files["documents_file"]):
        size = _present(folder, file["name"]).stat().st_size
        if size != file["size"]:
            raise CorpusError(
                f"{folder / file['name']}: {size} bytes instead of {file['size']}: cut short or changed; pack the corpus again"
            )
    return Split(
        tokens=np.memmap(folder / files["tokens_file"]["name"], dtype=dtype, mode="r"),
        document_starts=np.load(folder / files["documents_file"]["name"]),
        text_bytes=files["text_bytes"],
        language=language,
    )
