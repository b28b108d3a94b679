"""The run folder's records: what was run, where, and how it went, as strict JSON.

config.json       the complete configuration          environment.json  versions, hardware, command line, date
tokenizer.json    the tokenizer                       metrics.jsonl     one line per event, in the order of steps
result.json       the outcome, once the run stopped   checkpoints/      see checkpoint.py
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from factorization_memory import __version__
from factorization_memory._files import JSONError, read_json, read_json_lines, write_atomic
from factorization_memory.config import RunConfig, from_dict, to_dict

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer

CONFIG_NAME = "config.json"
ENVIRONMENT_NAME = "environment.json"
TOKENIZER_NAME = "tokenizer.json"
METRICS_NAME = "metrics.jsonl"
RESULT_NAME = "result.json"


class RunFolderError(ValueError):
    """A folder that holds a run where none may be, holds none where one must be, or holds one that cannot be read."""


class RunRecord:
    """The records of the run in `run_dir`; the caller holds the folder's `RunLock`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run, however far it got."""
        return (self.run_dir / CONFIG_NAME).exists() or (self.run_dir / "checkpoints").exists()

    def read_config(self) -> RunConfig:
        """The configuration in `config.json`. Raises RunFolderError where there is none, ConfigError where it cannot be."""
        path = self.run_dir / CONFIG_NAME
        try:
            values = read_json(path)
        except FileNotFoundError:
            raise RunFolderError(f"{self.run_dir}: there is no run here ({CONFIG_NAME} is missing); start one first") from None
        except JSONError as error:
            raise RunFolderError(
                f"{path}: not a configuration ({error.reason}); restore it, or start in another folder"
            ) from None
        return from_dict(RunConfig, values)

    def begin(self, config: RunConfig, tokenizer: Tokenizer, device: torch.device, resumed_at: int | None = None) -> None:
        """Write the files that say what runs and where. A resumed run keeps the environments of its earlier parts."""
        environment = describe_environment(device)
        path = self.run_dir / ENVIRONMENT_NAME
        if resumed_at is not None:
            environment["resumed_at_step"] = resumed_at
            if path.exists():
                try:
                    before = read_json(path)
                    environment["earlier"] = [*before.pop("earlier", []), before]
                except (ValueError, TypeError, AttributeError) as error:
                    raise RunFolderError(
                        f"{path}: damaged or cut short ({error}); remove that file (it only describes the run's earlier "
                        "machines), then resume again"
                    ) from None
        write_json(path, environment)
        tokenizer.save(self.run_dir / TOKENIZER_NAME)
        # Last, since its presence is what says that there is a run.
        write_json(self.run_dir / CONFIG_NAME, to_dict(config))

    def append(self, kind: str, values: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`, on disk when this returns as far as a crash of this process goes."""
        line = strict_json({"kind": kind, **values})
        path = self.run_dir / METRICS_NAME
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _unwritable(path, error) from error

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of `metrics.jsonl`; one that a crash cut short is passed over. Raises RunFolderError for one that is whole
        and is none of a run's."""
        path = self.run_dir / METRICS_NAME
        try:
            for values in read_json_lines(path):
                if not isinstance(values.get("kind"), str) or not isinstance(values.get("step"), int):
                    raise RunFolderError(f"{path}: a line without 'kind' and 'step' ({str(values)[:80]}); remove it")
                yield values
        except JSONError as error:
            raise RunFolderError(str(error)) from None

    def cut_after(self, step: int, observed_step: int) -> None:
        """Drop what a resumed run does again: steps after `step`, and evaluations, routing, samples after `observed_step`."""
        kept = [
            strict_json(values) + "\n"
            for values in self.metrics()
            if values["step"] <= (step if values["kind"] == "train" else observed_step)
        ]
        _replace_text(self.run_dir / METRICS_NAME, "".join(kept))

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.run_dir / RESULT_NAME, result)

    def remove_result(self) -> None:
        """A run that goes on has no outcome yet."""
        (self.run_dir / RESULT_NAME).unlink(missing_ok=True)


def strict_json(values: Any, indent: int | None = None) -> str:
    """`values` as JSON that every reader takes: numbers that are not finite become null."""
    return json.dumps(_finite(values), ensure_ascii=False, allow_nan=False, indent=indent)


def write_json(path: Path, values: Any) -> None:
    """Write `values` to `path`, whole or not at all."""
    _replace_text(path, strict_json(values, indent=2) + "\n")


def _replace_text(path: Path, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        raise _unwritable(path, error) from error


def refuse_link(path: Path) -> None:
    """RunFolderError where `path`, which a run writes to or into, is a symbolic link."""
    if path.is_symlink():
        raise RunFolderError(
            f"{path}: a symbolic link, and a run writes into its own folder alone; move here what it points to, or make the "
            "whole run folder a link"
        )


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: could not be written ({error.strerror or error}); make room or give access there, then resume the run"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _program() -> str:
    """The program that runs, as one would type it: `fmem` also where it was started with `python -m`."""
    name = Path(sys.argv[0]).name
    return "fmem" if name == "__main__.py" and Path(sys.argv[0]).parent.name == "cli" else name


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a reader of the results needs to know of the machine, the software and the command that made them."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [_program(), *sys.argv[1:]],
        "package": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the checkout that this file is tracked in, "+changes" where it differs; None outside one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=10)

    if shutil.which("git") is None:
        return None
    try:
        # An installed copy may lie inside some other project's checkout, whose commit would say nothing.
        if git("ls-files", "--error-unmatch", here.name).returncode != 0:
            return None
        commit = git("rev-parse", "HEAD")
        if commit.returncode != 0:
            return None
        return commit.stdout.strip() + ("+changes" if git("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None
