"""Memory limits of this machine, checked before anything large is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from factorization_memory.config import ConfigError

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory(device: torch.device | str = "cpu") -> int:
    """Total bytes of `device`, free or not: of a GPU, or the main memory and swap that this process may use."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("SwapTotal:"):
                total += 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    for path in map(Path, _CGROUP_LIMITS):
        try:
            limit = path.read_text(encoding="ascii").strip()
        except OSError:
            continue  # no such limit here, or not readable
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def require_room(what: str, size: int, remedy: str, device: torch.device | str = "cpu") -> None:
    """Raises ConfigError if `what`, of `size` bytes, exceeds the memory of `device`; the message ends with `remedy`."""
    there = machine_memory(device)
    if size > there:
        raise ConfigError(f"{what} would take {readable(size)}, but this machine's {device} has {readable(there)}; {remedy}")


def readable(size: int) -> str:
    """A number of bytes in human-readable form."""
    for unit, factor in (("EB", 10**18), ("PB", 10**15), ("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:,} bytes"
