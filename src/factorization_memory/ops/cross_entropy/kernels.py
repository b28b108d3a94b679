"""Cross-entropy on a GPU: computes losses from logits and overwrites the logits with their gradient.

A program owns one row. It reads it once, with a running maximum and a running sum of exponentials per lane, which are combined
at the end; and once more, from cache, to overwrite it. There is no reduction across programs.

Shapes: N rows (tokens), V logits per row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from factorization_memory.ops.runtime import on_device_of
from factorization_memory.ops.runtime.launcher import launch

ALIGNMENT = 64
"""Row stride in logits is a multiple of this, so that rows can be read 16 bytes at a time."""
LOAD_BYTES = 16
"""Bytes of logits per lane: one load of a thread."""
MOST_LANES, WARP_LANES = 1024, 64
"""Most lanes per program, and lanes per warp. At the maximum, four rows fill a multiprocessor, and their logits still fit its
cache for the second read, up to a vocabulary of about 40,000 in bfloat16."""


@triton.jit
def _block(logits, first, lane, V: tl.constexpr, ROW: tl.constexpr, WIDE: tl.constexpr):
    """Logits from column `first` on, float32 `[lanes, WIDE]`, -inf past the row's end, and their columns."""
    column = first + lane[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    x = tl.load(logits + column, mask=column < ROW, other=float("-inf")).to(tl.float32)
    if ROW != V:
        x = tl.where(column < V, x, float("-inf"))
    return x, column


@triton.jit
def cross_entropy_kernel(
    logits,  # in and, with GRADIENT, out: [N, V], row stride ROW
    targets,  # [N]
    losses,  # out: [N]
    share,  # [1], factor of the gradient
    V: tl.constexpr,
    ROW: tl.constexpr,
    IGNORE: tl.constexpr,
    LANES: tl.constexpr,  # lanes of a program
    WIDE: tl.constexpr,  # logits per lane and load
    GRADIENT: tl.constexpr,
):
    """Loss of one row; with GRADIENT, overwrites the logits with `share` times their gradient."""
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
        # An invalid target makes its whole row NaN.
        chosen = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
        # Lowest finite float, not -inf: (-inf) - (-inf) is NaN.
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
            # No thread may overwrite what another still reads.
            tl.debug_barrier()
            factor = tl.where(known, part / partition, float("nan"))
            # Last block first: it was read last, so it is most likely in cache.
            for back in range(BLOCKS):
                x, column = _block(logits, (BLOCKS - 1 - back) * BLOCK, lane, V, ROW, WIDE)
                gradient = tl.exp(x - highest) * factor
                tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < ROW)
            # Threads may overwrite what others wrote.
            tl.debug_barrier()
            at_target = tl.exp(chosen - highest) * factor - part
            tl.store(logits + target, at_target.to(logits.dtype.element_ty), mask=known)


def row_size(vocabulary: int) -> int:
    """Row stride, in logits, with which `cross_entropy` is fast."""
    return -(-vocabulary // ALIGNMENT) * ALIGNMENT


@on_device_of
def cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, share: Tensor | None, ignore: int) -> None:
    """Writes losses in nats to `losses`, and overwrites the logits with their gradient.

    Args:
        logits: `[N, V]`, bfloat16, float16 or float32, rows contiguous; overwritten if there is a share, including the padding
            between rows.
        targets: int64 `[N]`, contiguous. An invalid id other than `ignore` makes its loss and gradient NaN, which shows when
            the loss is read; nothing synchronizes here.
        losses: float32 `[N]`, contiguous.
        share: float32 `[1]`, factor of the gradient; None for no gradient.
        ignore: target of a row with loss 0 and gradient 0, whatever its logits.
    """
    if len(targets) == 0:
        return
    vocabulary, wide = logits.shape[1], LOAD_BYTES // logits.element_size()
    lanes = min(MOST_LANES, triton.next_power_of_2(triton.cdiv(vocabulary, wide)))
    launch(
        cross_entropy_kernel,
        (len(targets),),
        logits,
        targets,
        losses,
        share,
        V=vocabulary,
        ROW=logits.stride(0),
        IGNORE=ignore,
        LANES=lanes,
        WIDE=wide,
        GRADIENT=share is not None,
        num_warps=max(1, lanes // WARP_LANES),
    )
