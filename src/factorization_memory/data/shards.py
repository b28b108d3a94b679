"""Packed corpora: the token ids of every source, cut into training and validation text, as memory-mapped files.

A packed corpus is a folder: `manifest.json`, `tokenizer.json`, and for each source and split a `.tokens` file (little-endian
uint16 or uint32, documents whole, each ended by the tokenizer's `document_end`) and a `.documents.npy` (int64, where each
document starts, and the total). It is written aside and renamed when whole; sizes and checksums stand in the manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from factorization_memory._files import JSONError, atomic_folder, lock, read_json
from factorization_memory.data.corpora import (
    CorpusError,
    Document,
    explain_full_disk,
    read_documents,
    require_file,
    utf8_length,
)
from factorization_memory.data.tokenizer import Tokenizer, TokenizerError
from factorization_memory.data.verification import REMEDY, check_sizes, verify_once

Holdout = Literal["auto", "hash", "author", "tail"]

TRAIN, VALIDATION = "train", "validation"

_FORMAT, _VERSION = "factorization_memory.corpus", 1
_DTYPES = ("<u2", "<u4")

_PENDING_BYTES = 1 << 16
"""Tokens of a split that are held while packing."""

_MAPPED_BYTES = 1 << 20
"""Splits from this size on are mapped; smaller ones are read, as each mapping holds a file open."""


@dataclass(frozen=True)
class Split:
    """The text of one source for training, or for validation."""

    tokens: np.ndarray
    """Token ids [num_tokens], uint16 or uint32, read-only, memory-mapped if there are many."""
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
    """A packed corpus, opened: in memory are the index and what is small."""

    folder: Path
    sources: dict[str, Source]
    """By name, in the manifest's order (sorted)."""
    tokenizer: Tokenizer
    fingerprint: str
    """sha256 over the manifest, checksums of all files included: equal corpora have equal ones."""

    @classmethod
    def open(cls, folder: Path) -> PackedCorpus:
        """Open what `pack` wrote.

        Its files are read whole, and their checksums and token ids checked, once on a machine and again when one has changed
        (see `verification`); `verify` reads them anew.

        Raises `CorpusError`, naming the file and the remedy, for a folder that is no packed corpus, of a newer version, with a
        file missing or changed, with borders or ids that cannot be, or with another tokenizer than it was packed with.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        tokenizer = _open_tokenizer(folder, manifest)
        check_sizes(folder, manifest)
        verify_once(folder, manifest, tokenizer.vocab_size)
        try:
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
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise CorpusError(
                f"{folder}: the corpus has more sources than files may be open; raise the limit (`ulimit -n 65536`), or pack "
                "several under one name (NAME=PATH)"
            ) from None
        return cls(folder=folder, sources=sources, tokenizer=tokenizer, fingerprint=manifest["fingerprint"])

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every file again and compare its checksum. Raises `CorpusError` naming the first that changed since packing.

        `progress(read, total)` is called with bytes.
        """
        manifest = _read_manifest(self.folder)
        check_sizes(self.folder, manifest)
        verify_once(self.folder, manifest, self.tokenizer.vocab_size, again=True, progress=progress)


def pack(
    inputs: Sequence[tuple[str | None, Path]],
    tokenizer: Tokenizer,
    output: Path,
    *,
    holdout: Holdout = "hash",
    holdout_fraction: float = 0.05,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    skipped: Callable[[Path, str], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> PackedCorpus:
    """Tokenize the documents of `inputs`, (source name or None, file or folder) each, into the packed corpus `output`.

    `holdout` says what is kept for validation, about `holdout_fraction` of it: "hash", whole documents, by a hash of their text
    (equal documents stay together); "author", all documents of an author, by a hash of the name; "tail", the end of every
    document, cut at a line; "auto", "hash" where that gives every source both kinds of text, else "tail", as for a few books.
    All but "tail" read the texts twice, so that a source without held-out text is seen before any is tokenized.

    `progress(documents, bytes)` is called with the totals so far, `skipped(path, reason)` with what the folders hold and is
    not read (see `read_documents`), `notice(message)` with why "auto" has taken "tail".

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
    for source, path in inputs:
        read_documents(path, source=source, skipped=skipped)  # refuses a path that holds no texts

    def texts() -> Iterator[Document]:
        for source, path in inputs:
            yield from read_documents(path, source=source, skipped=lambda *_: None)  # told of above

    def held(holder: str) -> CorpusError:
        return CorpusError(f"{output}: another process is packing into it; wait for that one, or choose another folder")

    output.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(output), lock(output.with_name(output.name + ".lock"), held):
        # Again, now that no other process can write there.
        _require_free(output, overwrite)
        holdout, why = _choose_holdout(texts, holdout, holdout_fraction)
        if why and notice is not None:
            notice(f"the end of every document is held out: {why}")
        with atomic_folder(output, overwrite=overwrite) as aside:
            packer = _Packer(aside, tokenizer, holdout, holdout_fraction)
            for document in texts():
                packer.add(document)
                if progress is not None:
                    progress(packer.documents, packer.text_bytes)
            packer.finish()
    return PackedCorpus.open(output)


class _Packer:
    """Writes documents into the files of their source and split."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, holdout: Holdout, fraction: float) -> None:
        self.documents = 0
        self.text_bytes = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._holdout: Holdout = holdout
        self._fraction = fraction
        self._dtype = np.dtype(_DTYPES[tokenizer.vocab_size > 1 << 16])
        self._writers: dict[str, dict[str, _SplitWriter]] = {}
        self._languages: dict[str, set[str | None]] = {}

    def add(self, document: Document) -> None:
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
        """Finish the files and write tokenizer and manifest, which comes last."""
        entries: dict[str, Any] = {}
        for source in sorted(self._writers):
            languages = self._languages[source]
            entries[source] = {
                "language": next(iter(languages)) if len(languages) == 1 else None,
                "splits": {split: writer.finish() for split, writer in self._writers[source].items()},
            }
            for split in (TRAIN, VALIDATION):
                if not entries[source]["splits"][split]["documents"]:
                    raise CorpusError(
                        f"source {source!r}: its text is too short to give both training and validation text; add more"
                    )
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


def _drawn(document: Document, holdout: Holdout, fraction: float) -> str:
    """The split that a whole document belongs to."""
    if holdout == "author" and document.author is None:
        raise CorpusError(
            f"document {document.id!r} of source {document.source!r} has no author, which holdout='author' needs; "
            "add the field, or use holdout='hash'"
        )
    key = document.author if holdout == "author" and document.author is not None else document.text
    draw = int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest()) / 2**64
    return VALIDATION if draw < fraction else TRAIN


def _choose_holdout(
    texts: Callable[[], Iterable[Document]], holdout: Holdout, fraction: float
) -> tuple[Literal["hash", "author", "tail"], str]:
    """What "auto" takes, with the reason for "tail". Raises `CorpusError` if another one would leave a split empty."""
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
    """The two files of one split. None is open between two calls: a corpus may have more sources than files may be open."""

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
    """A source's name for the names of its files, which may have 255 bytes each."""
    return re.sub(r"[^\w.-]", "_", source).encode("utf-8")[:128].decode("utf-8", errors="ignore")


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
    try:
        manifest = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{folder}: not a packed corpus (no manifest.json); make one with `fmem data pack`") from None
    except JSONError as error:
        raise CorpusError(f"{path}: damaged ({error.reason}); {REMEDY}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CorpusError(f"{path}: not the manifest of a packed corpus; make one with `fmem data pack`")
    if manifest.get("version") != _VERSION:
        raise CorpusError(
            f"{path}: packed in format version {manifest.get('version')!r}, this program reads version {_VERSION}; "
            "update the program, or pack the corpus again"
        )
    if _fingerprint(manifest) != manifest.get("fingerprint"):
        raise CorpusError(f"{path}: changed since it was written (its fingerprint does not match); pack the corpus again")
    _check_fields(path, manifest)
    return manifest


def _check_fields(path: Path, manifest: dict[str, Any]) -> None:
    """Raise `CorpusError` for the first field of the manifest that is not as `pack` writes it."""

    def field(entry: Any, name: str, *kinds: type, fits: Callable[[Any], bool] = lambda _: True) -> Any:
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, kinds) or not fits(value):
            raise CorpusError(f"{path}: {name}={str(value)[:80]!r}, which no packing writes; pack the corpus again")
        return value

    bytes_per_token = np.dtype(field(manifest, "dtype", str, fits=_DTYPES.__contains__)).itemsize
    field(manifest, "tokenizer", str)
    for entry in field(manifest, "sources", dict).values():
        field(entry, "language", str, type(None))
        for split in (TRAIN, VALIDATION):
            files = field(field(entry, "splits", dict), split, dict)
            size = field(files, "tokens", int) * bytes_per_token
            field(files, "documents", int)
            field(files, "text_bytes", int)
            for kind in ("tokens_file", "documents_file"):
                file = field(files, kind, dict)
                field(file, "name", str, fits=lambda name: Path(name).name == name != "")
                field(file, "sha256", str)
                field(file, "size", int)
            field(files["tokens_file"], "size", int, fits=size.__eq__)


def _open_tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CorpusError(f"{path}: the file is missing; {REMEDY}")
    try:
        tokenizer = Tokenizer.load(path)
    except TokenizerError as error:
        raise CorpusError(f"{error}; put back the tokenizer of this corpus, or pack it again") from error
    if tokenizer.fingerprint != manifest["tokenizer"]:
        raise CorpusError(
            f"{path}: another tokenizer (fingerprint {tokenizer.fingerprint[:12]}) than the corpus was packed "
            f"with ({manifest['tokenizer'][:12]}); put the right one back, or pack again"
        )
    return tokenizer


def _open_split(folder: Path, files: dict[str, Any], dtype: np.dtype[Any], language: str | None) -> Split:
    path = folder / files["documents_file"]["name"]
    try:
        starts = np.load(path)
    except (ValueError, EOFError) as error:
        raise CorpusError(f"{path}: not a file of document borders ({error}); {REMEDY}") from None
    shape = (files["documents"] + 1,)
    if starts.dtype != np.int64 or starts.shape != shape:
        raise CorpusError(f"{path}: {starts.dtype} {list(starts.shape)} instead of int64 {list(shape)}; {REMEDY}")
    if starts[0] != 0 or starts[-1] != files["tokens"] or np.any(starts[1:] <= starts[:-1]):
        raise CorpusError(
            f"{path}: the borders of documents do not rise from 0 to the {files['tokens']} tokens of the split; {REMEDY}"
        )
    return Split(
        tokens=_open_tokens(folder / files["tokens_file"]["name"], dtype),
        document_starts=starts,
        text_bytes=files["text_bytes"],
        language=language,
    )


def _open_tokens(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if path.stat().st_size < _MAPPED_BYTES:
        tokens = np.fromfile(path, dtype=dtype)
        tokens.flags.writeable = False
        return tokens
    return np.memmap(path, dtype=dtype, mode="r")
