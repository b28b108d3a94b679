"""Which tasks and groups lm-evaluation-harness has under given names, without reading all its files."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from factorization_memory.config import ConfigError

GROUPS: dict[str, tuple[str, ...]] = {
    "english": (
        "hellaswag",
        "arc_easy",
        "arc_challenge",
        "piqa",
        "winogrande",
        "openbookqa",
        "boolq",
        "lambada_openai",
        "mmlu",
    ),
    "japanese": tuple(
        f"ja_leaderboard_{name}"
        for name in ("jcommonsenseqa", "jnli", "marc_ja", "jsquad", "jaqket_v2", "xlsum", "xwinograd", "mgsm")
    ),
}
"""Our names for groups of harness tasks."""
_NAME = re.compile(rb"""^["']?(?:task|group)["']?[ \t]*:[ \t]*["']?([^\s"'#\[{]+)""", re.MULTILINE)


def task_manager(names: Iterable[str], own: Path | None) -> Any:
    """A `TaskManager` that knows the names and their members. It indexes only their folders if that suffices, which saves
    reading some 14,000 files, else all of them. Raises ConfigError for an unknown name."""
    from lm_eval.tasks import TaskManager

    standard, extra = _standard_tasks(), [] if own is None else [own]
    of_own = TaskManager(include_path=extra, include_defaults=False).task_index
    files = _named_files(standard)
    if all(name in of_own or name in files for name in names):
        folders = dict.fromkeys(files[name].parent for name in names if name not in of_own)
        manager = TaskManager(include_path=[*folders, *extra], include_defaults=False)
        if all(_is_whole(manager.task_index, name) for name in names):
            return manager
    for name in names:
        if name not in of_own and name not in files and not _is_mentioned(standard, name):
            raise _unknown(name, [*GROUPS, *of_own, *files])
    manager = TaskManager(include_path=[standard, *extra], include_defaults=False)
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name, [*GROUPS, *manager.task_index])
    return manager


def leaves_of(index: dict[str, Any], name: str) -> dict[str, None]:
    """The individual tasks of a name, in order, each once."""
    entry = index.get(name)
    if entry is None:  # defined inline in its group
        return {}
    if entry.kind.name not in ("GROUP", "TAG"):
        return {name: None}
    return {leaf: None for child in _children(entry) for leaf in leaves_of(index, child)}


@cache
def _standard_tasks() -> Path:
    """The folder of the harness's own tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


@cache
def _named_files(folder: Path) -> dict[str, Path]:
    """The YAML file of each task and group in a folder, found by text search: ten times faster than parsing all YAML."""
    found: dict[str, Path] = {}
    for place, _, files in os.walk(folder):
        for name in files:
            if name.endswith(".yaml"):
                path = Path(place, name)
                for match in _NAME.finditer(path.read_bytes()):
                    found.setdefault(match[1].decode(), path)
    return found


def _is_mentioned(folder: Path, name: str) -> bool:
    """Whether a file in a folder contains the word, as a tag would: a quick no saves parsing all files as YAML."""
    word = re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])")
    return any(
        word.search(Path(place, file).read_bytes())
        for place, _, files in os.walk(folder)
        for file in files
        if not file.endswith((".py", ".pyc", ".md"))
    )


def _unknown(name: str, known: list[str]) -> ConfigError:
    """The error for an unknown name, with up to three suggestions: names that contain it, shortest first, and similar ones."""
    holding = sorted((one for one in known if name and name in one), key=len)[:2]
    near = list(dict.fromkeys([*holding, *difflib.get_close_matches(name, known, n=3, cutoff=0.6)]))[:3]
    remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else "list all with `lm_eval ls tasks`"
    return ConfigError(f"unknown task {name!r}; {remedy}")


def _children(entry: Any) -> list[str]:
    """The names of the members of a group or tag."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    children = (entry.cfg or {}).get("task") or []
    children = [children] if isinstance(children, str) else children
    return [child if isinstance(child, str) else child.get("task", child.get("group", "")) for child in children]


def _is_whole(index: dict[str, Any], name: str) -> bool:
    """Whether an index of some folders has all members of a name. It cannot tell for a tag."""
    entry = index.get(name)
    if entry is None or entry.kind.name == "TAG":
        return False
    return entry.kind.name != "GROUP" or all(_is_whole(index, child) for child in _children(entry))
