"""How the work of the compiled loops is cut: blocks of columns, lanes for threads, stretches between snapshots; and tensors as
the arrays that they take.

Shapes: B sequences, T tokens, H heads, M memory states, K states that a token updates, R that it merges, D value width of a
head, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorization_memory.ops.arguments import read_borders

BLOCK_WIDTH = 256
"""Most columns of a block: with 256 states of float32, 256 KiB. It depends on D alone, so that results do not depend on the
number of threads."""
MIN_INTERVAL, MAX_INTERVAL = 64, 512
"""Tokens from one snapshot to the next: M / 2 within these bounds. Up to M = 1024 snapshots take at most twice the memory
of the values."""
NOTHING = (0, 0, 0, 0)
MIN_SHARED_ELEMENTS = 1 << 18
"""Elements of the state that a call touches from which several threads pay."""


def interval(num_states: int) -> int:
    """Tokens from one snapshot to the next."""
    return min(max(num_states // 2, MIN_INTERVAL), MAX_INTERVAL)


def as_array(x: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """The tensor as a contiguous array, sharing its memory if it has this dtype; an empty one for None."""
    x = torch.empty(NOTHING, dtype=dtype) if x is None else x
    return x.detach().to(dtype).contiguous().numpy()


def selection(indices: Tensor, num_states: int) -> np.ndarray:
    """Indices as an array. Raises ValueError where one is out of range: the compiled loops do not check."""
    selected = indices.contiguous().numpy()
    if selected.size and not (selected.min() >= 0 and selected.max() < num_states):
        raise ValueError(f"indices: got {selected.min()} to {selected.max()}, takes 0 to num_states - 1 = {num_states - 1}")
    return selected.astype(np.int32, copy=False)


def slots_of(places: Tensor | None, batch: int, slots: int) -> np.ndarray:
    """Slot of each sequence in a pooled state. Raises ValueError where one is out of range, or taken twice."""
    if places is None and batch == slots:
        return np.arange(batch)
    got = None if places is None else places.numpy()
    there = np.empty(0, np.int64) if got is None else got[got >= 0]
    if got is None or len(got) != batch or (got < -1).any() or (there >= slots).any() or len(np.unique(there)) < len(there):
        said = None if got is None else got.tolist()
        raise ValueError(f"places: got {said}, takes {batch} distinct numbers from 0 to {slots - 1}, or -1")
    return got


def sequences_of(value: Tensor, cu_seqlens: Tensor | None, num_states: int) -> np.ndarray:
    """Row, first token and end of each sequence, and its first snapshot, int64 `[N, 4]`. Raises ValueError for borders that do
    not rise from 0 to T."""
    batch, length = value.shape[:2]
    if cu_seqlens is None:
        parts = [(row, 0, length) for row in range(batch)]
    else:
        borders = read_borders(cu_seqlens)
        parts = [(0, start, end) for start, end in pairwise(borders)]
        if batch != 1 or borders[0] != 0 or borders[-1] != length or any(start > end for _, start, end in parts):
            raise ValueError(f"cu_seqlens: got {borders}, takes a non-decreasing sequence from 0 to T = {length}")
    firsts = accumulate((_snapshots_of(end - start, num_states) for _, start, end in parts), initial=0)
    return np.array([(*part, first) for part, first in zip(parts, firsts, strict=False)], dtype=np.int64).reshape(-1, 4)


def snapshots_needed(sequences: np.ndarray, num_states: int) -> int:
    """Snapshots of all sequences (see `sequences_of`): each has one after every `interval` tokens, but for its end."""
    return sum(_snapshots_of(int(end - start), num_states) for _, start, end, _ in sequences)


def _snapshots_of(length: int, num_states: int) -> int:
    return max(length - 1, 0) // interval(num_states)


def snapshot_shape(value: Tensor, num_states: int) -> tuple[Any, ...]:
    """Shape of the snapshots: room for as many as there can be, since a compiler does not know the lengths of packed
    sequences."""
    batch, length, heads, width = value.shape
    return batch * (length // interval(num_states)), heads, num_states, width


def blocks_of(width: int) -> list[tuple[int, int]]:
    """First column and end of each block, of nearly equal widths."""
    count = -(-width // BLOCK_WIDTH)
    return list(pairwise(width * block // count for block in range(count + 1))) if count else []


def share_out(run: Callable[..., None], sequences: np.ndarray, value: Tensor, rows: int) -> None:
    """Calls `run(lanes, block, columns)` for every lane and block, in as many threads as PyTorch uses.

    Args:
        sequences: see `sequences_of`.
        value: v, `[B, T, H, D]`.
        rows: rows of the state that a token touches.
    """
    lanes, blocks = len(sequences) * value.shape[2], list(enumerate(blocks_of(value.shape[3])))
    threads = torch.get_num_threads() if value.numel() * rows >= MIN_SHARED_ELEMENTS else 1
    if threads == 1:
        for block, columns in blocks:
            run((0, lanes), block, columns)
        return
    cuts = sorted({lanes * part // (4 * threads) for part in range(4 * threads + 1)})
    work = [(part, block, columns) for part in pairwise(cuts) for block, columns in blocks]
    with ThreadPoolExecutor(threads) as pool:
        try:
            tasks = [pool.submit(run, *each) for each in work]
        except RuntimeError:  # the interpreter is ending, and starts no more threads
            tasks = []
    for task in tasks:
        task.result()
    if not tasks:
        for each in work:
            run(*each)
