"""Atomic writes of files and folders, file locks, and reading JSON. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from factorization_memory._files.atomic import atomic_file, atomic_folder, write_atomic
from factorization_memory._files.errors import (
    FULL_DISK,
    DiskFullError,
    UnreadableError,
    explain_unreadable,
    require_readable,
)
from factorization_memory._files.json_files import (
    MAX_DEPTH,
    JSONError,
    JSONSyntaxError,
    parse_json,
    read_json,
    read_json_lines,
    read_json_or_none,
)
from factorization_memory._files.locks import lock

__all__ = [
    "FULL_DISK",
    "MAX_DEPTH",
    "DiskFullError",
    "JSONError",
    "JSONSyntaxError",
    "UnreadableError",
    "atomic_file",
    "atomic_folder",
    "cache_folder",
    "explain_unreadable",
    "lock",
    "parse_json",
    "read_json",
    "read_json_lines",
    "read_json_or_none",
    "require_readable",
    "write_atomic",
]


def cache_folder() -> Path:
    """Folder of notes kept between calls: in `$XDG_CACHE_HOME`, else `~/.cache`. Raises RuntimeError for a user
    without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "factorization_memory"
