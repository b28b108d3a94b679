"""A linear layer for the few tokens of a decoding step, fused with its prologue and epilogue.

A program multiplies some rows of the weight by the whole input, so it is bound by reading the weights. It supports up to
`MAX_TOKENS` tokens: with our kernels for more, a step of 64 sequences was no faster than the plain one.

Shapes: B tokens, I inputs, O outputs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from factorization_memory.ops.runtime import processor_count
from factorization_memory.ops.runtime.launcher import dependent, launch

MAX_TOKENS = 4
"""Most tokens; weights are multiplied by one after the other."""
MAX_INPUTS = 16384
"""Most inputs of all tokens, both padded to a power of two: `few_kernel` keeps all in registers."""
MAX_THREAD_BYTES = 256
"""Most bytes of weights per thread of `few_kernel`: sixteen loads of 16 bytes."""


@triton.jit
def _silu_at(gate, at, mask):
    """SiLU of `gate` at offsets `at`."""
    g = tl.load(gate + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return g / (1.0 + tl.exp(-g))


@triton.jit
def _added(
    bias,
    residual,
    index,
    at,
    mask,
    OUTPUTS: tl.constexpr,
    GLU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Loads the epilogue's terms for outputs `index`: two biases (the second with GLU) and the residual at `at`."""
    first = tl.zeros(index.shape, tl.float32)
    second = first
    after = tl.zeros(at.shape, tl.float32)
    if HAS_BIAS:
        first = tl.load(bias + index, mask=index < OUTPUTS, other=0.0).to(tl.float32)
        if GLU:
            second = tl.load(bias + OUTPUTS + index, mask=index < OUTPUTS, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        after = tl.load(residual + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return first, second, after


@triton.jit
def _finished(y, up, first, second, after, GLU: tl.constexpr):
    """Outputs from products y (and, with GLU, `up`) and the results of `_added`."""
    y += first
    if GLU:
        y = y / (1.0 + tl.exp(-y)) * (up + second)
    return y + after


@triton.jit
def few_kernel(
    x,  # [B, I], row stride `x_row`
    weight,  # [O, I], with GLU [2 O, I]
    bias,  # [O], with GLU [2 O]
    norm_weight,  # [I]
    skipped,  # [B, I], row stride `skipped_row`
    skip_weight,  # [I]
    residual,  # [B, O], row stride `residual_row`
    gate,  # [B, I], row stride `gate_row`
    out,  # out: [B, O], row stride `out_row`
    eps,
    x_row,
    skipped_row,
    gate_row,
    residual_row,
    out_row,
    TOKENS: tl.constexpr,
    TOKENS_PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    INPUTS_PADDED: tl.constexpr,
    BO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    GLU: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BO outputs of all tokens. Inputs are padded to a power of two."""
    column = tl.arange(0, INPUTS_PADDED)
    inside = column < INPUTS
    index = tl.program_id(0) * BO + tl.arange(0, BO)
    known = index < OUTPUTS
    both = known[:, None] & inside[None, :]
    # Issue all loads first, weights before the rest, so that they overlap.
    at = index.to(tl.int64)[:, None] * INPUTS + column[None, :]
    w = tl.load(weight + at, mask=both, other=0.0)
    if GLU:
        w_up = tl.load(weight + OUTPUTS * INPUTS + at, mask=both, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.arange(0, TOKENS_PADDED)[:, None]
    there = (token < TOKENS) & inside[None, :]
    rows = tl.load(x + token * x_row + column[None, :], mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
    if HAS_SKIP:
        skip = tl.load(skipped + token * skipped_row + column[None, :], mask=there, other=0.0, cache_modifier=".cg").to(
            tl.float32
        )
        skip *= tl.load(skip_weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        factor = _silu_at(gate, token * gate_row + column[None, :], there)
    mask = (token < TOKENS) & known[None, :]
    first, second, after = _added(
        bias, residual, index[None, :], token * residual_row + index[None, :], mask, OUTPUTS, GLU, HAS_BIAS, HAS_RESIDUAL
    )
    if HAS_NORM:
        scale = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        rows = rows * tl.rsqrt(tl.sum(rows * rows, 1) / INPUTS + eps)[:, None] * scale
    if HAS_SKIP:
        rows += skip
    if HAS_GATE:
        rows *= factor
    rows = rows.to(weight.dtype.element_ty).to(tl.float32)
    y = tl.zeros([TOKENS_PADDED, BO], tl.float32)
    up = y
    for t in tl.static_range(TOKENS):
        # A thread holds its columns of all tokens, so selecting one is free.
        row = tl.sum(tl.where(token == t, rows, 0.0), 0)[None, :]
        y = tl.where(token == t, tl.sum(w.to(tl.float32) * row, 1)[None, :], y)
        if GLU:
            up = tl.where(token == t, tl.sum(w_up.to(tl.float32) * row, 1)[None, :], up)
    y = _finished(y, up, first, second, after, GLU)
    tl.store(out + token * out_row + index[None, :], y.to(out.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def most_tokens(inputs: int) -> int:
    """Most tokens with `inputs` inputs that `small_linear` supports; 0 if unsupported."""
    padded = triton.next_power_of_2(inputs)
    return max(
        (tokens for tokens in range(1, MAX_TOKENS + 1) if triton.next_power_of_2(tokens) * padded <= MAX_INPUTS), default=0
    )


def small_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    skipped: Tensor | None = None,
    skip_weight: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    glu: bool = False,
    early: bool = False,
) -> Tensor:
    """`out = linear((norm(x) + skipped * skip_weight) * silu(gate)) + residual`, or, with `glu`, `silu(linear of the first O
    rows) * linear of the others + residual`. Not differentiable. Never synchronizes, so it can be captured in a CUDA graph.

    Args:
        x: `[B, I]`, B up to `most_tokens(I)`. Each tensor is bfloat16 or float32; rows may be strided, elements of a row not.
        weight: `[O, I]`, with `glu` `[2 O, I]`, bfloat16 or float32, contiguous. The input is rounded to its dtype, as in
            autocast; accumulation is float32.
        out: `[B, O]`; may be `residual`, not `x`, `skipped` or `gate`.
        bias: `[O]`, with `glu` `[2 O]`; None for no bias.
        norm_weight: `[I]`, weight of an RMS normalisation of x; None for no normalisation.
        norm_eps: epsilon of the normalisation.
        skipped: `[B, I]`, added to the normalised inputs; None for no skip.
        skip_weight: `[I]`, multiplies `skipped`; only with it.
        residual: `[B, O]`, added to the outputs; None for no residual.
        gate: `[B, I]`, its SiLU multiplies the (normalised) inputs; None for no gate.
        glu: whether to multiply the SiLU of the first half of the outputs by the second half.
        early: whether to start and read weights while the previous kernel still runs (programmatic dependent launch), which
            must not write `weight`.

    Returns:
        `out`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout, or too many tokens.
    """
    _check(x, weight, out, bias, norm_weight, skipped, skip_weight, residual, gate, glu)
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return small_linear(
                x,
                weight,
                out,
                bias=bias,
                norm_weight=norm_weight,
                norm_eps=norm_eps,
                skipped=skipped,
                skip_weight=skip_weight,
                residual=residual,
                gate=gate,
                glu=glu,
                early=early,
            )
    tokens, inputs = x.shape
    outputs = out.shape[1]
    if tokens == 0 or outputs == 0:
        return out
    padded = triton.next_power_of_2(inputs)
    tokens_padded = triton.next_power_of_2(tokens)
    halves = 2 if glu else 1
    row_bytes = inputs * weight.element_size() * halves
    token_bytes = inputs * sum(each.element_size() for each in (x, skipped, gate) if each is not None)
    norm_bytes = inputs * sum(each.element_size() for each in (norm_weight, skip_weight) if each is not None)
    warps = min(8, max(1, padded // 256))
    most = max(1, MAX_THREAD_BYTES * 32 * warps // (padded * weight.element_size() * halves))
    rows = _rows(most, outputs, row_bytes, tokens * token_bytes + norm_bytes, processor_count(x.device))
    launch(
        few_kernel,
        (triton.cdiv(outputs, rows),),
        x,
        weight,
        bias,
        norm_weight,
        skipped,
        skip_weight,
        residual,
        gate,
        out,
        float(norm_eps),
        x.stride(0),
        *(0 if each is None else each.stride(0) for each in (skipped, gate, residual)),
        out.stride(0),
        TOKENS=tokens,
        TOKENS_PADDED=tokens_padded,
        OUTPUTS=outputs,
        INPUTS=inputs,
        INPUTS_PADDED=padded,
        BO=rows,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None,
        HAS_SKIP=skipped is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_GATE=gate is not None,
        GLU=glu,
        **dependent(early),
        num_warps=warps,
    )
    return out


@lru_cache(maxsize=1024)
def _rows(most: int, outputs: int, row_bytes: int, input_bytes: int, processors: int) -> int:
    """Outputs per program, a power of two up to `most`, such that the busiest multiprocessor reads the fewest bytes: few
    outputs balance poorly and reread the input, many leave multiprocessors idle."""
    choices = [1 << i for i in range(most.bit_length())]
    return min(choices, key=lambda rows: -(-outputs // (rows * processors)) * (rows * row_bytes + input_bytes))


def _check(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    skipped: Tensor | None,
    skip_weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    glu: bool,
) -> None:
    if x.dim() != 2 or weight.dim() != 2 or out.dim() != 2 or x.shape[1] == 0:
        raise ValueError(
            f"x, weight, out: got shapes {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(out.shape)}, "
            "takes [B, I], [O, I], [B, O]"
        )
    (tokens, inputs), outputs = x.shape, out.shape[1]
    rows = 2 * outputs if glu else outputs
    shapes = {
        "weight": (weight, (rows, inputs)),
        "out": (out, (tokens, outputs)),
        "bias": (bias, (rows,)),
        "norm_weight": (norm_weight, (inputs,)),
        "residual": (residual, (tokens, outputs)),
        "gate": (gate, (tokens, inputs)),
        "x": (x, (tokens, inputs)),
        "skipped": (skipped, (tokens, inputs)),
        "skip_weight": (skip_weight, (inputs,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, takes {shape}")
        if tensor.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"{name}: got dtype {tensor.dtype}, takes bfloat16 or float32")
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x on {x.device}; move them to one device")
        if tensor.stride(-1) != 1 and shape[-1] > 1:
            raise ValueError(f"{name}: last dimension has stride {tensor.stride(-1)}; use a contiguous tensor")
    if (skipped is None) != (skip_weight is None):
        missing, given = ("skip_weight", "skipped") if skip_weight is None else ("skipped", "skip_weight")
        raise ValueError(f"{missing}: got None, takes a tensor together with {given}")
    if not weight.is_contiguous():
        raise ValueError("weight: is not contiguous; use weight.contiguous()")
    if tokens > (most := most_tokens(inputs)):
        raise ValueError(f"x: got {tokens} tokens of {inputs} inputs, takes up to {most}; pass fewer at a time")
