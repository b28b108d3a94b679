"""One writer per run folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Self

from factorization_memory._files import lock
from factorization_memory.runs.names import CHECKPOINTS_NAME, LOCK_NAME, METRICS_NAME
from factorization_memory.runs.record import refuse_link


class RunLockedError(ValueError):
    """Another process is writing this run folder; the message names the process, the host and the folder."""


class RunLock:
    """The exclusive right to write a run folder, as a context manager.

    An advisory lock of the operating system on `.lock` in the folder, released when the process ends for any reason, so there
    are no stale locks. Raises `RunLockedError` if another process holds it, and `RunFolderError` if a path that a run writes
    to is a symbolic link, which would place files outside the folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK_NAME
        self._held = contextlib.ExitStack()
        self._created: list[Path] = []

    def __enter__(self) -> Self:
        folder = self.path.parent
        self._created = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LOCK_NAME, CHECKPOINTS_NAME, METRICS_NAME):
            refuse_link(folder / name)
        self._held.enter_context(lock(self.path, self._locked))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()
        # A run refused before it wrote anything also leaves no folder; a non-empty folder stays.
        with contextlib.suppress(OSError):
            for folder in self._created:
                folder.rmdir()

    def _locked(self, holder: str) -> RunLockedError:
        return RunLockedError(
            f"{self.path.parent}: {holder} is writing this run folder; wait for it or stop it, or choose another folder"
        )
