"""What is installed, what the machine has, and whether every backend computes the recurrence here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from factorization_memory._version import __version__
from factorization_memory.benchmarks.correctness import check_backend
from factorization_memory.ops.memory import backends
from factorization_memory.runs.environment import cores, cpu_model

REQUIRED = ("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub")
OPTIONAL = ("triton", "numba", "transformers", "datasets", "lm_eval")


def examine() -> dict[str, Any]:
    """The findings: `versions` (None if absent), `cpu`, `gpus`, `no_gpu` (why there is none, or None), `checks`, `skipped`
    (what cannot run on a device, and why), `passed`."""
    no_gpu = None
    if not torch.cuda.is_available():
        no_gpu = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no GPU"
    devices = ["cpu"] if no_gpu else ["cpu", "cuda"]
    checks, skipped = [], []
    for backend in reversed(backends.BACKENDS):
        for device in devices:
            reason = backend.why_unsupported(torch.empty(1, 1, 1, 1, device=device), 1, 1, True, False)
            if reason is None:
                checks += check_backend(backend.name, device)
            else:
                skipped.append({"backend": backend.name, "device": device, "reason": reason})
    return {
        "versions": {"factorization_memory": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in REQUIRED + OPTIONAL},
        "cpu": {"name": cpu_model(), "cores": cores(), "threads": torch.get_num_threads()},
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if no_gpu is None else [],
        "no_gpu": no_gpu,
        "checks": checks,
        "skipped": skipped,
        "passed": all(result["passed"] for result in checks),
    }


def _version(name: str) -> str | None:
    # A folder of that name on the path has a spec but no metadata: it is not the package.
    try:
        return importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
