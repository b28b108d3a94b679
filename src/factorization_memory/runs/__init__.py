"""Run folders: file names, records, checkpoints; loading, exporting and importing models.

The names below are imported lazily, so that code that only needs file names (`names.py`) does not import PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from factorization_memory.runs.checkpoint import load_checkpoint, save_checkpoint
    from factorization_memory.runs.checkpoint_folder import CheckpointError, find_checkpoint, list_checkpoints
    from factorization_memory.runs.exporting import export_run
    from factorization_memory.runs.importing import import_model
    from factorization_memory.runs.loading import load_model
    from factorization_memory.runs.lock import RunLock, RunLockedError
    from factorization_memory.runs.record import RunFolderError, RunRecord

_HOMES = {
    "CheckpointError": "checkpoint_folder",
    "RunFolderError": "record",
    "RunLock": "lock",
    "RunLockedError": "lock",
    "RunRecord": "record",
    "export_run": "exporting",
    "find_checkpoint": "checkpoint_folder",
    "import_model": "importing",
    "list_checkpoints": "checkpoint_folder",
    "load_checkpoint": "checkpoint",
    "load_model": "loading",
    "save_checkpoint": "checkpoint",
}

__all__ = [
    "CheckpointError",
    "RunFolderError",
    "RunLock",
    "RunLockedError",
    "RunRecord",
    "export_run",
    "find_checkpoint",
    "import_model",
    "list_checkpoints",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
