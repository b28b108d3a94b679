"""Verifies the files of a packed corpus: sizes, checksums, token ids and document boundaries.

Reading all of a large corpus takes a while, and damage is rare: it is read completely once per machine, and again only after a
file's timestamps or inode have changed. This is recorded in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`), not
next to the corpus, which may be on a read-only disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from factorization_memory._files import JSONError, cache_folder, explain_unreadable, read_json, write_atomic
from factorization_memory.data.corpora import CorpusError

REMEMBERED_BYTES = 1 << 26
"""Smaller corpora are reread whenever they are opened, which takes a tenth of a second."""

_BLOCK_BYTES = 1 << 22

REMEDY = "restore the file, or pack the corpus again"


def listed_files(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The manifest's entry of each file: `name`, `size` (bytes), `sha256`."""
    for entry in manifest["sources"].values():
        for files in entry["splits"].values():
            yield files["tokens_file"]
            yield files["documents_file"]


def check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises `CorpusError` for the first file that is missing or of a different size than when packed."""
    for file in listed_files(manifest):
        path = folder / file["name"]
        try:
            with explain_unreadable(path):
                size = path.stat().st_size
        except FileNotFoundError:
            raise CorpusError(f"{path}: the file is missing; {REMEDY}") from None
        if size != file["size"]:
            raise CorpusError(f"{path}: got {size} bytes, expected {file['size']}: cut short or changed; {REMEDY}")


def verify_once(
    folder: Path,
    manifest: dict[str, Any],
    vocab_size: int,
    *,
    again: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Reads and checks every file, unless this machine has already checked these same files and `again` is False.

    `progress(read, total)` is called with bytes. Raises `CorpusError` for the first file with a wrong checksum or a token
    id of `vocab_size` or above.
    """
    remembered = sum(file["size"] for file in listed_files(manifest)) >= REMEMBERED_BYTES
    stamp = _stamp(folder, manifest)
    try:
        if remembered and not again and read_json(_note(folder)) == stamp:
            return
    except (OSError, RuntimeError, JSONError):
        pass  # no note, or one that cannot be read
    _check_contents(folder, manifest, vocab_size, progress)
    if remembered:
        # If notes cannot be written, the corpus is reread next time.
        with contextlib.suppress(OSError, RuntimeError):
            write_atomic(_note(folder), json.dumps(stamp))


def _check_contents(
    folder: Path, manifest: dict[str, Any], vocab_size: int, progress: Callable[[int, int], None] | None
) -> None:
    files = list(listed_files(manifest))
    of_tokens = {part["tokens_file"]["name"] for entry in manifest["sources"].values() for part in entry["splits"].values()}
    read, total = 0, sum(file["size"] for file in files)
    for file in files:
        path = folder / file["name"]
        found, largest = hashlib.sha256(), -1
        with explain_unreadable(path), path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                found.update(block)
                if file["name"] in of_tokens:
                    largest = max(largest, int(np.frombuffer(block, dtype=manifest["dtype"]).max()))
                read += len(block)
                if progress is not None:
                    progress(read, total)
        if found.hexdigest() != file["sha256"]:
            raise CorpusError(f"{path}: changed since it was packed (its checksum differs); {REMEDY}")
        if largest >= vocab_size:
            raise CorpusError(f"{path}: contains the token id {largest}, but its tokenizer has {vocab_size} ids; pack it again")


def _stamp(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """A stamp that changes whenever a file does, barring disk failures."""
    stats = {file["name"]: (folder / file["name"]).stat() for file in listed_files(manifest)}
    return {
        "fingerprint": manifest["fingerprint"],
        "files": {name: [s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats.items()},
    }


def _note(folder: Path) -> Path:
    """Path of the note about `folder`. Raises RuntimeError for a user without a home."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_folder() / "verified" / f"{name}.json"
