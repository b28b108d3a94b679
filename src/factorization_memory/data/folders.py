"""The files of a folder, following links, and the skipped paths with reasons."""

from __future__ import annotations

import heapq
import os
import stat
from collections.abc import Callable
from pathlib import Path

HIDDEN = "hidden"
OTHER_KIND = "of another kind"
BROKEN_LINK = "a link that leads nowhere"
CIRCLE = "a link to a folder that it is in itself"
READ_ALREADY = "read already, by another way"
NO_FILE = "neither a file nor a folder"

Skipped = list[tuple[Path, str]]
"""Each skipped path, with one of the reasons above."""


def find_files(folder: Path, wanted: Callable[[str], bool]) -> tuple[list[Path], Skipped]:
    """The files in `folder` and below whose names are `wanted`, sorted, and the skipped paths.

    Links are followed, and each file and folder is used once: preferably under its own name, else under that of the first link
    in order. Hidden files and folders are skipped. Raises OSError for a folder that cannot be listed.
    """
    files: list[Path] = []
    taken: set[tuple[int, int]] = set()
    folders: set[tuple[int, int]] = set()
    skipped: list[tuple[Path, str, tuple[int, int] | None]] = []
    links: list[Path] = []

    def take(path: Path, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            skipped.append((path, NO_FILE, None))
        elif wanted(path.name):
            files.append(path)
            taken.add(_identity(status))
        else:
            skipped.append((path, OTHER_KIND, _identity(status)))

    def walk(top: Path) -> None:
        waiting = [top]
        while waiting:
            inner = waiting.pop()
            identity = _identity(inner.stat())
            if identity in folders:
                skipped.append((inner, READ_ALREADY, None))
                continue
            folders.add(identity)
            for path in inner.iterdir():
                if path.name.startswith("."):
                    skipped.append((path, HIDDEN, None))
                elif path.is_symlink():
                    heapq.heappush(links, path)
                elif path.is_dir():
                    waiting.append(path)
                else:
                    take(path, path.stat())

    walk(folder)
    while links:
        link = heapq.heappop(links)
        try:
            status = link.stat()
        except FileNotFoundError:
            skipped.append((link, BROKEN_LINK, None))
            continue
        except OSError as error:
            # A circular link.
            skipped.append((link, f"{BROKEN_LINK} ({error.strerror})", None))
            continue
        place = link.parent.resolve()
        if stat.S_ISDIR(status.st_mode) and _identity(status) in {_identity(each.stat()) for each in (place, *place.parents)}:
            skipped.append((link, CIRCLE, None))
        elif _identity(status) in folders or _identity(status) in taken:
            skipped.append((link, READ_ALREADY, None))
        elif stat.S_ISDIR(status.st_mode):
            walk(link)
        else:
            take(link, status)
    # A file whose name differs from its link's, as in caches, is read through the link.
    return sorted(files), sorted((path, why) for path, why, identity in skipped if identity not in taken)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
