"""The machine, software and command of a run, for its records."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NotRequired, TypedDict

import torch

from factorization_memory._version import __version__


class EnvironmentRecord(TypedDict):
    """`environment.json`, and where another record was made."""

    date: str
    """ISO 8601, UTC."""
    command: list[str]
    package: str
    """Our version."""
    git_commit: str | None
    """Of a checkout, with "+changes" if modified."""
    python: str
    torch: str
    cuda: str | None
    """The version that PyTorch was built for."""
    platform: str
    cpu: str
    cores: int
    """Those that the process may use."""
    threads: int
    """Of PyTorch."""
    device: str
    gpu: str | None
    resumed_at_step: NotRequired[int]
    earlier: NotRequired[list[EnvironmentRecord]]
    """Those of a resumed run's earlier parts."""


def _program() -> str:
    """The running program as one would type it: `fmem` also when started with `python -m`."""
    name = Path(sys.argv[0]).name
    return "fmem" if name == "__main__.py" and Path(sys.argv[0]).parent.name == "cli" else name


def describe_environment(device: torch.device) -> EnvironmentRecord:
    """The machine, software and command that produced a result."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [_program(), *sys.argv[1:]],
        "package": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def cpu_model() -> str:
    """The processor's name as reported by the system."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git_commit() -> str | None:
    """Commit of the checkout that tracks this file, with "+changes" if modified; None outside one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=10)

    if shutil.which("git") is None:
        return None
    try:
        # An installed copy may be inside another project's checkout, whose commit would be meaningless.
        if git("ls-files", "--error-unmatch", here.name).returncode != 0:
            return None
        commit = git("rev-parse", "HEAD")
        if commit.returncode != 0:
            return None
        return commit.stdout.strip() + ("+changes" if git("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None
