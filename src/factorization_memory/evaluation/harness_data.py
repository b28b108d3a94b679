"""Local data files of lm-evaluation-harness tasks: the splits that a task needs, and its configuration changed to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Suffixes of data files and their format names in the `datasets` library."""


class HarnessDataError(ValueError):
    """The data of a task cannot be loaded."""


def task_splits(config: dict[str, Any], shots: int | None) -> tuple[str, str | None]:
    """The split that a task is evaluated on, and the split of its few-shot examples (None without examples)."""
    evaluated = config.get("test_split") or config.get("validation_split") or "test"
    own = config.get("num_fewshot")
    if shots is None or own == 0:  # a task that rules out examples is never given any
        shots = own
    if not shots:
        return evaluated, None
    examples = config.get("fewshot_config")
    chosen = examples.get("split") if isinstance(examples, dict) else None
    return evaluated, chosen or config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")


def needed_splits(config: dict[str, Any], shots: int | None) -> list[str]:
    """The splits that a task requires."""
    evaluated, examples = task_splits(config, shots)
    return [evaluated] if examples in (None, evaluated) else [str(examples), evaluated]


def read_from_files(
    name: str, config: dict[str, Any], folder: Path, shots: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Changes to a task's configuration that make it read the files of a folder, and the file of each split."""
    if "class" in config:
        raise HarnessDataError(f"{folder}: task {name} loads its data with its own code, not from files; remove the folder")
    there = [path for path in sorted(folder.iterdir()) if path.suffix in FORMATS]
    examples = config.get("fewshot_config")
    named = {config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")}
    named |= {*needed_splits(config, shots), examples.get("split") if isinstance(examples, dict) else None}
    found = {path.stem: path for path in there if path.stem in named}
    for path in there:
        if path.stem in found and path != found[path.stem]:
            raise HarnessDataError(
                f"{folder}: {path.name} and {found[path.stem].name} are the same split of task {name}; keep one"
            )
    missing = [split for split in needed_splits(config, shots) if split not in found]
    if missing:
        needed = ", ".join(f"{split}.jsonl" for split in missing)
        holds = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise HarnessDataError(f"{folder}: task {name} needs {needed} (or .json, .parquet) there; found {holds}")
    formats = {FORMATS[path.suffix] for path in found.values()}
    if len(formats) > 1:
        raise HarnessDataError(f"{folder}: files of task {name} are of several types; give all as .jsonl or all as .parquet")
    for path in found.values():
        if path.stat().st_size == 0:
            raise HarnessDataError(f"{path}: the file is empty; give task {name} rows in the format of its own data set")
    files = {split: str(path.resolve()) for split, path in found.items()}
    change: dict[str, Any] = {
        "dataset_path": formats.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "custom_dataset": None,
    }
    # Do not ask for splits that are missing but not needed: the harness takes examples from another one.
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in (None, *files):
            change[key] = None
    if isinstance(examples, dict) and examples.get("split") not in (None, *files):
        change["fewshot_config"] = {key: value for key, value in examples.items() if key != "split"}
    return change, files
