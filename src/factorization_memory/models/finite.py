"""Whether weights are numbers: what is saved or loaded must be, in every format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first of `tensors` that holds NaN or infinite numbers; None where all are finite.

    Tensors without storage are passed over, of sharded ones this process's part is looked at.
    """
    for name, tensor in tensors.items():
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if part.is_meta or not (part.is_floating_point() or part.is_complex()) or part.dtype.itemsize < 2:
            continue
        if not torch.isfinite(part).all():
            return name
    return None
