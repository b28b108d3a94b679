"""Fused pointwise kernels between the matmuls of a decoding step of more than a few sequences.

As separate launches, a norm, a cast, a gate and a sum would each take as long as reading thousands of rows. All kernels
support programmatic dependent launch (`launcher.dependent`) and never synchronize.

Shapes: B sequences, I channels, P partial sums of a matmul.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from factorization_memory.ops.memory.kernels.step import check_shapes
from factorization_memory.ops.runtime import on_device_of
from factorization_memory.ops.runtime.launcher import dependent, launch

THREAD_NUMBERS = 8
"""Elements of a row per thread, up to the limit of warps."""
WARPS = 16
"""Most warps of a program that holds a row."""
BLOCK = 512
"""Elements per program of 4 warps in elementwise kernels."""


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def normalise_kernel(
    x,  # in and, with parts, out: [B, I], row stride `x_row`
    parts,  # [P, B, I]
    gate,  # [B, I], row stride `gate_row`
    norm_weight,  # [I]
    skipped,  # [B, I], row stride `skipped_row`
    skip_weight,  # [I]
    out,  # out: [B, I]
    batch,
    eps,
    x_row,
    gate_row,
    skipped_row,
    INPUTS: tl.constexpr,
    INPUTS_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One row, padded to a power of two: adds the parts, normalises, adds the skip, multiplies by the gate."""
    column = tl.arange(0, INPUTS_PADDED)
    there = column < INPUTS
    if HAS_NORM:
        scale = tl.load(norm_weight + column, mask=there, other=0.0).to(tl.float32)
    if HAS_SKIP:
        skip_scale = tl.load(skip_weight + column, mask=there, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(x + row * x_row + column, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
    if HAS_GATE:
        factor = _silu(tl.load(gate + row * gate_row + column, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32))
    if HAS_SKIP:
        skip = tl.load(skipped + row * skipped_row + column, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
    if PARTS:
        added = tl.zeros([INPUTS_PADDED], tl.float32)
        for part in tl.static_range(PARTS):
            at = (part * batch + row) * INPUTS + column
            added += tl.load(parts + at, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
        y += added
        tl.store(x + row * x_row + column, y.to(x.dtype.element_ty), mask=there)
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(y * y, 0) / INPUTS + eps) * scale
    if HAS_SKIP:
        y += skip * skip_scale
    if HAS_GATE:
        y *= factor
    tl.store(out + row * INPUTS + column, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def glu_kernel(
    gate_up,  # [B, 2 I]
    out,  # out: [B, I]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A block of a row of `silu(gate) * up`."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + column, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + column, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(out + row * WIDTH + column, (_silu(gate) * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def convolve_kernel(
    x,  # [B, I], row stride `x_row`
    tail,  # in and out: [B, TAPS - 1, I]
    weight,  # [TAPS, I]
    bias,  # [I]
    out,  # out: [B, I]
    x_row,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One block of columns. Each thread owns its columns, and reads a row of the tail before overwriting it."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    y = tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    held = tail + row * ((TAPS - 1) * WIDTH) + column
    for i in tl.static_range(TAPS):
        if i < TAPS - 1:
            taken = tl.load(held + i * WIDTH, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
        else:
            taken = tl.load(x + row * x_row + column, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
        y += taken * tl.load(weight + i * WIDTH + column, mask=there, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(held + (i - 1) * WIDTH, taken.to(tail.dtype.element_ty), mask=there)
    tl.store(out + row * WIDTH + column, _silu(y).to(out.dtype.element_ty), mask=there)


@on_device_of
def normalise(
    x: Tensor,
    parts: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    skipped: Tensor | None = None,
    skip_weight: Tensor | None = None,
) -> Tensor:
    """`(norm(x + sum of parts) + skipped * skip_weight) * silu(gate)`, `[B, I]` in `dtype`; with parts, x becomes
    `x + sum of parts`.

    Args:
        x: `[B, I]`; all tensors are bfloat16 or float32, and rows of x, `gate` and `skipped` may be strided.
        parts: contiguous `[P, B, I]`; None adds nothing.
        gate: `[B, I]`; None for no gate.
        norm_weight: `[I]`, the weight of the RMS normalisation; None for no normalisation.
        eps: its epsilon.
        dtype: dtype of the result.
        skipped: `[B, I]`, added after the norm; None for no skip.
        skip_weight: `[I]`, multiplies `skipped`; only with it.
    """
    assert (skipped is None) == (skip_weight is None), "one is nothing without the other"
    batch, inputs = x.shape
    shapes = {
        "parts": (parts, (0 if parts is None else len(parts), batch, inputs)),
        "gate": (gate, (batch, inputs)),
        "norm_weight": (norm_weight, (inputs,)),
        "skipped": (skipped, (batch, inputs)),
        "skip_weight": (skip_weight, (inputs,)),
    }
    check_shapes(shapes, "x", x)
    out = x.new_empty(batch, inputs, dtype=dtype)
    padded = triton.next_power_of_2(inputs)
    if batch:
        launch(
            normalise_kernel,
            (batch,),
            x,
            parts,
            gate,
            norm_weight,
            skipped,
            skip_weight,
            out,
            batch,
            float(eps),
            x.stride(0),
            0 if gate is None else gate.stride(0),
            0 if skipped is None else skipped.stride(0),
            INPUTS=inputs,
            INPUTS_PADDED=padded,
            PARTS=0 if parts is None else len(parts),
            HAS_NORM=norm_weight is not None,
            HAS_SKIP=skipped is not None,
            HAS_GATE=gate is not None,
            **dependent(early=True),
            num_warps=max(1, min(WARPS, padded // (32 * THREAD_NUMBERS))),
        )
    return out


@on_device_of
def glu(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    """`silu(gate) * up` of the halves of contiguous `gate_up` `[B, 2 I]`: `[B, I]` in `dtype`."""
    batch, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(batch, width, dtype=dtype)
    if batch:
        launch(
            glu_kernel,
            (batch, triton.cdiv(width, BLOCK)),
            gate_up,
            out,
            WIDTH=width,
            BLOCK=BLOCK,
            **dependent(early=True),
            num_warps=4,
        )
    return out


@on_device_of
def convolve(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One token of `CausalConvolution`: `[B, I]` in x's dtype.

    Args:
        x: `[B, I]`; rows may be strided.
        tail: the inputs before it, contiguous `[B, taps - 1, I]`, oldest first; shifted in place.
        weight: `[taps, I]`.
        bias: `[I]`.
    """
    assert tail.is_contiguous(), "it is updated in place"
    batch, width = x.shape
    taps = len(weight)
    shapes = {"tail": (tail, (batch, taps - 1, width)), "weight": (weight, (taps, width)), "bias": (bias, (width,))}
    check_shapes(shapes, "x", x)
    out = x.new_empty(batch, width)
    if batch:
        launch(
            convolve_kernel,
            (batch, triton.cdiv(width, BLOCK)),
            x,
            tail,
            weight,
            bias,
            out,
            x.stride(0),
            WIDTH=width,
            TAPS=len(weight),
            BLOCK=BLOCK,
            **dependent(early=True),
            num_warps=4,
        )
    return out
