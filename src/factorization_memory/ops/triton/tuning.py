"""Tiles of the kernels, found by measurement on an H200."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """The part of a problem that one program computes."""

    states: int
    """Memory states; a power of two that divides their padded number."""
    width: int
    """Value columns."""
    warps: int
    stages: int
    """Depth of the software pipeline of loads."""


def tile(kernel: str, chunk: int, padded: int, width: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel for chunks of `chunk` tokens, `padded` states and values of `width` columns."""
    small = dtype == torch.float32
    if kernel == "walk":
        if padded <= 64:
            return Tile(padded, 64 if small else 128, 4, 2)
        return Tile(padded, 32 if small else 64, 8 if padded > 128 else 4, 2)
    if kernel == "states":
        return Tile(min(padded, 128), 64 if small else 128, 4 if padded <= 64 else 8, 3)
    if kernel == "carry":
        return Tile(16, 128, 4, 1)
    if kernel == "outputs":
        return Tile(min(padded, 64), 64 if small else 128, 4 if chunk <= 64 else 8, 4)
    if kernel == "gradients":
        return Tile(min(padded, 64 if small else 128), 64, 8, 2)
    if kernel == "inner_gradient":
        return Tile(16, 64, 4, 3)
    raise KeyError(kernel)
