"""Packed corpora: the token ids of every source, cut into training and validation text, as memory-mapped files.

A packed corpus is a folder: `manifest.json`, `tokenizer.json`, and for each source and split a `.tokens` file (little-endian
uint16 or uint32, documents whole, each ended by the tokenizer's `document_end`) and a `.documents.npy` (int64, the start of
each document, and the total). It is written under a temporary name and renamed when complete; the manifest has sizes and
checksums.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from factorization_memory._files import atomic_folder, lock
from factorization_memory.data.corpora import CorpusError, Document, explain_full_disk, read_documents
from factorization_memory.data.manifest import Split, open_split, open_tokenizer, read_manifest
from factorization_memory.data.packer import Holdout, Packer, choose_holdout
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.data.verification import check_sizes, verify_once


@dataclass(frozen=True)
class Source:
    """One component of the mixture."""

    name: str
    language: str | None
    splits: dict[str, Split]
    """"train" and "validation"."""


@dataclass(frozen=True)
class PackedCorpus:
    """An open packed corpus: the index and small splits are in memory."""

    folder: Path
    sources: dict[str, Source]
    """By name, in the manifest's order (sorted)."""
    tokenizer: Tokenizer
    fingerprint: str
    """sha256 of the manifest, which has the checksums of all files: equal for equal corpora."""

    @classmethod
    def open(cls, folder: Path) -> PackedCorpus:
        """Open a corpus written by `pack`.

        The checksums and token ids of all files are checked once per machine, and again when a file has changed (see
        `verification`); `verify` always rereads them.

        Raises `CorpusError`, naming the file and the remedy, for a folder that is not a packed corpus, is of a newer version,
        has a missing or changed file or invalid boundaries or ids, or has a tokenizer other than the one it was packed with.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        tokenizer = open_tokenizer(folder, manifest)
        check_sizes(folder, manifest)
        verify_once(folder, manifest, tokenizer.vocab_size)
        try:
            sources = {
                name: Source(
                    name=name,
                    language=entry["language"],
                    splits={
                        split: open_split(folder, files, np.dtype(manifest["dtype"]), entry["language"])
                        for split, files in entry["splits"].items()
                    },
                )
                for name, entry in manifest["sources"].items()
            }
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise CorpusError(
                f"{folder}: more sources than the limit on open files; raise it (`ulimit -n 65536`), or pack "
                "several under one name (NAME=PATH)"
            ) from None
        return cls(folder=folder, sources=sources, tokenizer=tokenizer, fingerprint=manifest["fingerprint"])

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reread every file and compare its checksum. Raises `CorpusError` naming the first that changed since packing.

        `progress(read, total)` is called with bytes.
        """
        manifest = read_manifest(self.folder)
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

    `holdout` sets what is kept for validation, about `holdout_fraction` of the text: "hash", whole documents, by a hash of
    their text (equal documents stay together); "author", all documents of an author, by a hash of the name; "tail", the end of
    every document, cut at a line; "auto", "hash" if that gives every source both splits, else "tail", as for a few books. All
    but "tail" read the texts twice, so that a source without held-out text is detected before tokenizing.

    `progress(documents, bytes)` is called with the totals so far, `skipped(path, reason)` for paths in the folders that are
    not read (see `read_documents`), `notice(message)` with the reason if "auto" chose "tail".

    The result depends only on the arguments and the text. Raises `CorpusError` for bad text, a source whose
    training or validation text would be empty, a full disk, an `output` that another process is packing into, or one that
    exists (unless `overwrite`, which replaces a packed corpus once the new one is complete). If interrupted, it leaves nothing
    under the name `output`; the next call starts over.
    """
    output = Path(output)
    if holdout not in get_args(Holdout):
        raise CorpusError(f"holdout={holdout!r}: use one of {', '.join(get_args(Holdout))}")
    if not 0 < holdout_fraction < 1:
        raise CorpusError(f"holdout_fraction={holdout_fraction!r}: use a number between 0 and 1, such as 0.05")
    if not inputs:
        raise CorpusError("no input to pack; name at least one file or folder")
    _require_free(output, overwrite)
    for source, path in inputs:
        read_documents(path, source=source, skipped=skipped)  # rejects a path without texts

    def texts() -> Iterator[Document]:
        for source, path in inputs:
            yield from read_documents(path, source=source, skipped=lambda *_: None)  # reported above

    def held(holder: str) -> CorpusError:
        return CorpusError(f"{output}: another process is packing into this folder; wait for it, or choose another")

    output.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(output), lock(output.with_name(output.name + ".lock"), held):
        # Check again, now that no other process can write there.
        _require_free(output, overwrite)
        holdout, why = choose_holdout(texts, holdout, holdout_fraction)
        if why and notice is not None:
            notice(f"holding out the end of every document: {why}")
        with atomic_folder(output, overwrite=overwrite) as aside:
            packer = Packer(aside, tokenizer, holdout, holdout_fraction)
            for document in texts():
                packer.add(document)
                if progress is not None:
                    progress(packer.documents, packer.text_bytes)
            packer.finish()
    return PackedCorpus.open(output)


def _require_free(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "manifest.json").is_file():
        raise CorpusError(f"{output}: exists but is not a packed corpus; choose another folder")
    if not overwrite:
        raise CorpusError(f"{output}: already contains a packed corpus; choose another folder, or set overwrite")
