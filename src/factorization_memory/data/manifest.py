"""The on-disk format of a packed corpus: its manifest and fingerprint, and the files of a split.

A packed corpus is a folder: `manifest.json`, `tokenizer.json`, and for each source and split a `.tokens` file (little-endian
uint16 or uint32, documents whole, each ended by the tokenizer's `document_end`) and a `.documents.npy` (int64, the start of
each document, and the total). The manifest has sizes and checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from factorization_memory._files import JSONError, read_json
from factorization_memory.data.corpora import CorpusError, require_file
from factorization_memory.data.tokenizer import Tokenizer, TokenizerError
from factorization_memory.data.verification import REMEDY

TRAIN, VALIDATION = "train", "validation"

FORMAT, VERSION = "factorization_memory.corpus", 1
DTYPES = ("<u2", "<u4")

MAPPED_BYTES = 1 << 20
"""Splits of at least this size are memory-mapped; smaller ones are read, as each mapping keeps a file open."""


@dataclass(frozen=True)
class Split:
    """The text of one source for training, or for validation."""

    tokens: np.ndarray
    """Token ids [num_tokens], uint16 or uint32, read-only, memory-mapped if large."""
    document_starts: np.ndarray
    """int64 [num_documents + 1]: the start of each document, and num_tokens."""
    text_bytes: int
    """UTF-8 bytes of the text, the divisor of bits per byte."""
    language: str | None
    """Language of all its documents; None if they have none or several."""

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return len(self.document_starts) - 1


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest without its own fingerprint."""
    content = {name: value for name, value in manifest.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of a packed corpus. Raises `CorpusError` if it is missing, damaged or of another version."""
    require_file(folder)
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{folder}: not a packed corpus (no manifest.json); make one with `fmem data pack`") from None
    except JSONError as error:
        raise CorpusError(f"{path}: damaged ({error.reason}); {REMEDY}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorpusError(f"{path}: not the manifest of a packed corpus; make one with `fmem data pack`")
    if manifest.get("version") != VERSION:
        raise CorpusError(
            f"{path}: packed in format version {manifest.get('version')!r}, but this program reads version {VERSION}; "
            "update the program, or pack the corpus again"
        )
    if fingerprint_of(manifest) != manifest.get("fingerprint"):
        raise CorpusError(f"{path}: changed since it was written (its fingerprint does not match); pack the corpus again")
    _check_fields(path, manifest)
    return manifest


def _check_fields(path: Path, manifest: dict[str, Any]) -> None:
    """Raises `CorpusError` for the first field of the manifest that is not as `pack` writes it."""

    def field(entry: Any, name: str, *kinds: type, fits: Callable[[Any], bool] = lambda _: True) -> Any:
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, kinds) or not fits(value):
            raise CorpusError(f"{path}: {name}={str(value)[:80]!r} is not a valid value; pack the corpus again")
        return value

    bytes_per_token = np.dtype(field(manifest, "dtype", str, fits=DTYPES.__contains__)).itemsize
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


def open_tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the corpus was packed with. Raises `CorpusError` if the file is missing or holds another one."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CorpusError(f"{path}: the file is missing; {REMEDY}")
    try:
        tokenizer = Tokenizer.load(path)
    except TokenizerError as error:
        raise CorpusError(f"{error}; restore this corpus's tokenizer, or pack it again") from error
    if tokenizer.fingerprint != manifest["tokenizer"]:
        raise CorpusError(
            f"{path}: not the tokenizer the corpus was packed with: its fingerprint is "
            f"{tokenizer.fingerprint[:12]}, not {manifest['tokenizer'][:12]}; restore the right one, or pack again"
        )
    return tokenizer


def open_split(folder: Path, files: dict[str, Any], dtype: np.dtype[Any], language: str | None) -> Split:
    """A split, from its entry `files` in the manifest; large token files are mapped. Raises `CorpusError` if a file does not
    fit."""
    path = folder / files["documents_file"]["name"]
    try:
        starts = np.load(path)
    except (ValueError, EOFError) as error:
        raise CorpusError(f"{path}: not a list of document borders ({error}); {REMEDY}") from None
    shape = (files["documents"] + 1,)
    if starts.dtype != np.int64 or starts.shape != shape:
        raise CorpusError(f"{path}: got {starts.dtype} {list(starts.shape)}, expected int64 {list(shape)}; {REMEDY}")
    if starts[0] != 0 or starts[-1] != files["tokens"] or np.any(starts[1:] <= starts[:-1]):
        raise CorpusError(f"{path}: document borders do not increase from 0 to the split's {files['tokens']} tokens; {REMEDY}")
    return Split(
        tokens=_open_tokens(folder / files["tokens_file"]["name"], dtype),
        document_starts=starts,
        text_bytes=files["text_bytes"],
        language=language,
    )


def _open_tokens(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if path.stat().st_size < MAPPED_BYTES:
        tokens = np.fromfile(path, dtype=dtype)
        tokens.flags.writeable = False
        return tokens
    return np.memmap(path, dtype=dtype, mode="r")
