"""Checks that weights are finite, before they are saved and after they are loaded, in every format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first of `tensors` with NaN or infinite values; None if all are finite.

    Skips tensors without storage; of sharded ones, checks this process's shard.
    """
    for name, tensor in tensors.items():
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if part.is_meta or not (part.is_floating_point() or part.is_complex()) or part.dtype.itemsize < 2:
            continue
        if not torch.isfinite(part).all():
            return name
    return None
