"""The records of a run folder, as strict JSON: configuration, environment, metrics and result."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory._files import JSONError, read_json, read_json_lines, write_atomic
from factorization_memory.config import RunConfig, from_dict, to_dict
from factorization_memory.runs.environment import describe_environment
from factorization_memory.runs.names import (
    CHECKPOINTS_NAME,
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    METRICS_NAME,
    RESULT_NAME,
    TOKENIZER_NAME,
)

if TYPE_CHECKING:
    import torch

    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.runs.training_record import RunResult


class RunFolderError(ValueError):
    """A folder that has a run where none may exist, lacks one where one must, or has an unreadable one."""


class RunRecord:
    """The records of the run in `run_dir`; the caller holds the folder's `RunLock`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    @property
    def exists(self) -> bool:
        """Whether the folder has a run, however far it got."""
        return (self.run_dir / CONFIG_NAME).exists() or (self.run_dir / CHECKPOINTS_NAME).exists()

    def read_config(self) -> RunConfig:
        """The configuration in `config.json`. Raises RunFolderError if it is missing, ConfigError if it is invalid."""
        path = self.run_dir / CONFIG_NAME
        try:
            values = read_json(path)
        except FileNotFoundError:
            raise RunFolderError(f"{self.run_dir}: no run here ({CONFIG_NAME} is missing); start one first") from None
        except JSONError as error:
            raise RunFolderError(
                f"{path}: not a configuration ({error.reason}); restore it, or start in another folder"
            ) from None
        return from_dict(RunConfig, values)

    def begin(self, config: RunConfig, tokenizer: Tokenizer, device: torch.device, resumed_at: int | None = None) -> None:
        """Writes the configuration and environment of the run. A resumed run keeps the environments of its earlier parts."""
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
                        f"{path}: damaged or cut short ({error}); remove this file (it only describes the machines that "
                        "ran it earlier), then resume again"
                    ) from None
        write_json(path, environment)
        tokenizer.save(self.run_dir / TOKENIZER_NAME)
        # Last, since its presence marks the folder as a run.
        write_json(self.run_dir / CONFIG_NAME, to_dict(config))

    def append(self, kind: str, values: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`; once this returns, the line survives a crash of this process."""
        line = strict_json({"kind": kind, **values})
        path = self.run_dir / METRICS_NAME
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _unwritable(path, error) from error

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of `metrics.jsonl`, skipping one truncated by a crash. Raises RunFolderError for a complete line that is
        not a run's."""
        path = self.run_dir / METRICS_NAME
        try:
            for values in read_json_lines(path):
                if not isinstance(values.get("kind"), str) or not isinstance(values.get("step"), int):
                    raise RunFolderError(f"{path}: line without 'kind' and 'step' ({str(values)[:80]}); remove it")
                yield values
        except JSONError as error:
            raise RunFolderError(str(error)) from None

    def cut_after(self, step: int, observed_step: int) -> None:
        """Drops what a resumed run will redo: steps after `step`, and evaluations, routing and samples after
        `observed_step`."""
        kept = [
            strict_json(values) + "\n"
            for values in self.metrics()
            if values["step"] <= (step if values["kind"] == "train" else observed_step)
        ]
        _replace_text(self.run_dir / METRICS_NAME, "".join(kept))

    def write_result(self, result: RunResult) -> None:
        """Writes the result of a stopped run."""
        write_json(self.run_dir / RESULT_NAME, result)

    def remove_result(self) -> None:
        """Removes the result of a run that continues."""
        (self.run_dir / RESULT_NAME).unlink(missing_ok=True)


def strict_json(values: Any, indent: int | None = None) -> str:
    """`values` as strict JSON: non-finite numbers become null."""
    return json.dumps(_finite(values), ensure_ascii=False, allow_nan=False, indent=indent)


def write_json(path: Path, values: Any) -> None:
    """Writes `values` to `path` atomically."""
    _replace_text(path, strict_json(values, indent=2) + "\n")


def _replace_text(path: Path, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        raise _unwritable(path, error) from error


def refuse_link(path: Path) -> None:
    """Raises RunFolderError if `path`, which a run writes to, is a symbolic link."""
    if path.is_symlink():
        raise RunFolderError(
            f"{path}: a symbolic link, but a run writes only to its own folder; move its target here, or make the "
            "whole run folder a link instead"
        )


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: could not be written ({error.strerror or error}); free space or grant access there, then resume the run"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
