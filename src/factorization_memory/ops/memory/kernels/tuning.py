"""Tiles of the kernels, found by measurement on an H200 (docs/kernels.md; `fmem bench op --tune` searches again)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """The part of the problem that one program computes."""

    states: int
    """Memory states; divides their padded number. In `outputs`, the depth of one step of the matrix product instead."""
    width: int
    """Value columns; a power of two."""
    warps: int
    """Warps per program."""
    stages: int
    """Depth of the software pipeline of loads."""


KERNELS = ("walk", "states", "narrow_states", "carry", "outputs", "gradients", "inner_gradient")
CHOSEN: dict[tuple[str, int, int, torch.dtype], Tile] = {}
"""Overrides of the tiles below, by kernel, tokens per chunk, padded states and operand dtype."""


def tile(kernel: str, chunk: int, padded: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel for chunks of `chunk` tokens and `padded` states, with operands of `dtype`."""
    return CHOSEN.get((kernel, chunk, padded, dtype)) or candidates(kernel, chunk, padded, dtype)[0]


@cache
def candidates(kernel: str, chunk: int, padded: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles worth trying, at most eight, fastest known first."""
    if kernel not in KERNELS:
        raise KeyError(kernel)
    if kernel == "carry":
        return (Tile(16, 128, 4, 1),)
    found = _single(kernel, chunk, padded) if dtype == torch.float32 else _half(kernel, chunk, padded)
    return tuple(Tile(min(one.states, padded), one.width, one.warps, one.stages) for one in found)


def _half(kernel: str, chunk: int, padded: int) -> list[Tile]:
    """For operands of two bytes."""
    if kernel == "walk":
        return [Tile(padded, 64, 4, 3), Tile(padded, 128, 4, 3), Tile(padded, 64, 4, 2), Tile(padded, 128, 8, 2)]
    if kernel == "states":
        if padded <= 64:
            return [Tile(64, 128, 4, 2), Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(64, 128, 8, 2)]
        return [Tile(128, 256, 8, 2), Tile(128, 128, 8, 3), Tile(64, 128, 4, 2), Tile(128, 128, 8, 2)]
    if kernel == "narrow_states":  # if wide ones would leave multiprocessors idle
        if padded <= 64:
            return [Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)]
        return [Tile(64, 128, 4, 2), Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)]
    if kernel == "outputs":
        return [Tile(64, 128, 8, 3), Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(32, 128, 8, 4), Tile(64, 256, 8, 3)]
    if kernel == "inner_gradient":
        return [Tile(16, 64, 4, 3), Tile(16, 64, 8, 3), Tile(16, 128, 8, 2)]
    if chunk < 64:
        return [Tile(64, 64, 4, 3)]
    if chunk == 64 and padded <= 64:
        return [Tile(64, 64, 4, 4), Tile(64, 64, 4, 3), *([Tile(64, 64, 8, 3)] if padded == 64 else [])]
    return [Tile(128, 64, 8, 3 if padded != 128 or chunk <= 64 else 2), Tile(64, 64, 8, 3), Tile(128, 64, 8, 2)]


def _single(kernel: str, chunk: int, padded: int) -> list[Tile]:
    """For operands of four bytes."""
    if kernel == "walk":
        return [Tile(padded, 64 if padded <= 64 else 32, 4, 2)]
    if kernel in ("states", "narrow_states"):
        return [Tile(128, 64, 4 if padded <= 64 else 8, 2)]
    if kernel == "outputs":
        return [Tile(64, 64, 4 if chunk <= 64 else 8, 3)]
    if kernel == "inner_gradient":
        return [Tile(16, 64, 4, 3)]
    # Eight warps on 64 tokens and fewer than 64 states cause an illegal memory access on an H200 (Triton 3.6).
    return [Tile(64, 64, 8 if chunk >= 64 and padded >= 64 else 4, 2)]
