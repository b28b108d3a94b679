"""Cross-entropy on a GPU: from the logits of some tokens to their losses and, in place of the logits, their gradient.

A program has one row. It reads it once, keeping a running maximum and a running sum of exponentials for each of its lanes,
which meet at the end; and once more, while the row is still in a cache, to overwrite it. Nothing is added up between programs.

Shapes: N rows (tokens), V logits of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from factorization_memory.ops.runtime import on_device_of
from factorization_memory.ops.runtime.launcher import launch

ALIGNMENT = 64
"""Of which the logits from one row to the next are a multiple, so that all of a row can be read 16 bytes at a time."""
LOAD_BYTES = 16
"""Logits of a lane: what a thread reads at once."""
MOST_LANES, WARP_LANES = 1024, 64
"""Lanes of a program at most, and of a warp. With all of them four rows fill a multiprocessor, and their logits, up to a
vocabulary of about 40,000 in bfloat16, the cache that they are read from again."""


@triton.jit
def _block(logits, first, lane, V: tl.constexpr, ROW: tl.constexpr, WIDE: tl.constexpr):
    """Logits from column `first` on, float32 `[lanes, WIDE]`, minus infinity where there are none, and their columns."""
    column = first + lane[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    x = tl.load(logits + column, mask=column < ROW, other=float("-inf")).to(tl.float32)
    if ROW != V:
        x = tl.where(column < V, x, float("-inf"))
    return x, column


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, share, V: tl.constexpr, ROW: tl.constexpr, IGNORE: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The loss of a row and, with GRADIENT, `share` times its gradient in place of the logits."""
    BLOCK: tl.constexpr = LANES * WIDE
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    logits += row * ROW
    lane = tl.arange(0, LANES)
    target = tl.load(targets + row)
    if target == IGNORE:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for block in range(BLOCKS):
                column = block * BLOCK + lane[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
                tl.store(logits + column, tl.zeros([LANES, WIDE], logits.dtype.element_ty), mask=column < ROW)
    else:
        known = (target >= 0) & (target < V)
        # A target that is no id makes all of its row NaN.
        chosen = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
        # Of all numbers the least rather than minus infinity, of which differences are none.
        most = tl.full([LANES], -3.4028234663852886e38, tl.float32)
        total = tl.zeros([LANES], tl.float32)
        for block in range(BLOCKS):
            x, _ = _block(logits, block * BLOCK, lane, V, ROW, WIDE)
            higher = tl.maximum(most, tl.max(x, 1))
            total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
            most = higher
        highest = tl.max(most, 0)
        partition = tl.sum(total * tl.exp(most - highest), 0)
        tl.store(losses + row, tl.log(partition) + (highest - chosen))
        if GRADIENT:
            part = tl.load(share)
            # No thread overwrites what another still reads.
            tl.debug_barrier()
            factor = tl.where(known, part / partition, float("nan"))
            # The last block first: it was read last.
            for back in range(BLOCKS):
                x, column = _block(logits, (BLOCKS - 1 - back) * BLOCK, lane, V, ROW, WIDE)
                gradient = tl.exp(x - highest) * factor
                tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < ROW)
            # Threads may write to where others wrote.
            tl.debug_barrier()
            at_target = tl.exp(chosen - highest) * factor - part
            tl.store(logits + target, at_target.to(logits.dtype.element_ty), mask=known)


def row_size(vocabulary: int) -> int:
    """Logits from the beginning of a row to that of the next, for `cross_entropy` to be fast."""
    return -(-vocabulary // ALIGNMENT) * ALIGNMENT


@on_device_of
def cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, share: Tensor | None, ignore: int) -> None:
    """Losses in nats, into `losses`, and their gradient in place of the logits.

    Args:
        logits: `[N, V]`, bfloat16, float16 or float32, with V numbers in a row; overwritten if there is a share, and with them
            what stands in memory between one row and the next.
        targets: int64 `[N]`, contiguous. One that is no id and not `ignore` makes its loss and its gradient NaN, which the
            host finds out when it looks at the loss: nothing waits for the GPU here.
        losses: float32 `[N]`, contiguous.
        share: float32 `[1]`, what the gradient is multiplied with; None for no gradient.
        ignore: the target of a row that has loss 0 and gradient 0, whatever its logits.
    """
    if len(targets) == 0:
        return
    vocabulary, wide = logits.shape[1], LOAD_BYTES // logits.element_size()
    lanes = min(MOST_LANES, triton.next_power_of_2(triton.cdiv(vocabulary, wide)))
    launch(
        cross_entropy_kernel, (len(targets),), logits, targets, losses, share, V=vocabulary, ROW=logits.stride(0),
        IGNORE=ignore, LANES=lanes, WIDE=wide, GRADIENT=share is not None, num_warps=max(1, lanes // WARP_LANES),
    )  # fmt: skip
