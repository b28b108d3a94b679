"""The device and the precision of a run."""

from __future__ import annotations

import torch

from factorization_memory.config import ConfigError, TrainingConfig


def resolve_device(name: str, setting: str = "training.device") -> torch.device:
    """The device named by the value `name` of `setting`: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises ConfigError for any other name, and for a GPU that does not exist.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or name.endswith(":") or (index and not (index.isascii() and index.isdigit())):
        raise ConfigError(f"{setting}={name!r}: use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if not torch.cuda.is_available():
        reason = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no GPU here"
        raise ConfigError(f"{setting}={name!r}: {reason}; use 'auto' or 'cpu'")
    count = torch.cuda.device_count()
    if index and int(index) >= count:
        raise ConfigError(f"{setting}={name!r}: this machine has {count} GPUs; use 'cuda:0' to 'cuda:{count - 1}'")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


def autocast(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """Context of the forward pass: bfloat16 matrix products over float32 weights, or float32 throughout."""
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
