"""The causal convolution on a GPU: the operators `factorization_memory::convolve` and `convolve_backward`.

A program walks along some tokens of a block of channels and keeps the last inputs in registers, so that each element is read
once. Backward recomputes the input of SiLU, and writes one partial sum per program of the gradients of taps and bias, which
PyTorch adds up.

Shapes: B sequences, T tokens, C channels, up to four taps; N packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.runtime import on_device_of
from factorization_memory.ops.runtime.launcher import launch

BLOCK = 128
"""Channels per program of one warp; this and the constants below are the fastest of those tried on an H200."""
ROWS = 4
"""Tokens loaded at once."""
RUN = 64
"""Most tokens per program; in backward, the next program repeats the last three."""
BEFORE = 3
"""Previous inputs that the kernels support: four taps with the token's own."""


@triton.jit
def _taps(weight, column, inside, C: tl.constexpr, TAPS: tl.constexpr):
    """The taps of the token itself and the three before it, float32 `[BLOCK]`; zero for missing taps."""
    last = weight + (TAPS - 1) * C + column
    w0 = tl.load(last, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(last - C, mask=inside & (TAPS > 1), other=0.0).to(tl.float32)
    w2 = tl.load(last - 2 * C, mask=inside & (TAPS > 2), other=0.0).to(tl.float32)
    w3 = tl.load(last - 3 * C, mask=inside & (TAPS > 3), other=0.0).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _before(x, tail, token, position, sequence, back, time, inside, C: tl.constexpr, TAPS: tl.constexpr, TAIL: tl.constexpr):
    """The input `back` tokens before `token`, float32 `[BLOCK]`, from the tail if it is before the sequence."""
    known = position >= back
    h = tl.load(x + (token - back) * time, mask=inside & known, other=0.0).to(tl.float32)
    if TAIL:
        row = sequence * (TAPS - 1) + TAPS - 1 + position - back
        h += tl.load(tail + row * C, mask=inside & ~known & (back < TAPS), other=0.0).to(tl.float32)
    return h


@triton.jit
def _place(token, batch, positions, sequences, PACKED: tl.constexpr, TAIL: tl.constexpr):
    """Position of `token` in its sequence, and the sequence's index."""
    position, sequence = token, batch
    if PACKED:
        position = tl.load(positions + token).to(tl.int64)
        if TAIL:
            sequence = tl.load(sequences + token).to(tl.int64)
    return position, sequence


@triton.jit
def _history(
    x,
    tail,
    token,
    batch,
    positions,
    sequences,
    time,
    inside,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    TAIL: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The three inputs before `token`."""
    position, sequence = _place(token, batch, positions, sequences, PACKED, TAIL)
    h1 = _before(x, tail, token, position, sequence, 1, time, inside, C, TAPS, TAIL)
    h2 = _before(x, tail, token, position, sequence, 2, time, inside, C, TAPS, TAIL)
    h3 = _before(x, tail, token, position, sequence, 3, time, inside, C, TAPS, TAIL)
    return h1, h2, h3


@triton.jit
def _sum(now, h1, h2, h3, w0, w1, w2, w3, b, TAPS: tl.constexpr):
    """The input of SiLU. Missing taps skip their input rather than multiply it by zero, as it may be infinite."""
    total = b + w0 * now
    if TAPS > 1:
        total += w1 * h1
    if TAPS > 2:
        total += w2 * h2
    if TAPS > 3:
        total += w3 * h3
    return total


@triton.jit
def _program(length, COLUMNS: tl.constexpr, RUN_TOKENS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """This program's row of x, first token, channels and their mask, and the index of its run over all rows."""
    program = tl.program_id(0)
    run = (program // COLUMNS).to(tl.int64)
    column = (program % COLUMNS) * BLOCK + tl.arange(0, BLOCK)
    runs = (length + RUN_TOKENS - 1) // RUN_TOKENS
    return run // runs, (run % runs) * RUN_TOKENS, column, column < C, run


@triton.jit
def forward_kernel(
    x,  # [B, T, C], strides `x_batch` and `x_time`
    tail,  # inputs before the first [B or N, TAPS - 1, C]
    weight,  # w [TAPS, C], the last for the token itself
    bias,  # b [C]
    positions,  # position of each token in its packed sequence [T]
    sequences,  # packed sequence of each token [T]
    y,  # out: y [B, T, C]
    length,  # T
    x_batch,
    x_time,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    TAIL: tl.constexpr,
    PACKED: tl.constexpr,
    COLUMNS: tl.constexpr,  # blocks of channels
    STEPS: tl.constexpr,  # tokens per program
    ROWS: tl.constexpr,  # tokens loaded at once
    BLOCK: tl.constexpr,  # channels per program
):
    """`y_t = silu(sum_i w_i x_{t-i} + b)` for STEPS tokens of a block of channels."""
    batch, first, column, inside, _ = _program(length, COLUMNS, STEPS, BLOCK, C)
    x += batch * x_batch + column
    y += batch * length * C + column
    if TAIL:
        tail += column
    w0, w1, w2, w3 = _taps(weight, column, inside, C, TAPS)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    h1, h2, h3 = _history(x, tail, first, batch, positions, sequences, x_time, inside, C, TAPS, TAIL, PACKED)
    count = tl.minimum(length - first, STEPS)
    for block in range((count + ROWS - 1) // ROWS):
        begin = first + block * ROWS
        rows = ()
        for i in tl.static_range(ROWS):
            rows = rows + (tl.load(x + (begin + i) * x_time, mask=inside & (begin + i < length), other=0.0).to(tl.float32),)
        for i in tl.static_range(ROWS):
            token = begin + i
            if PACKED:
                # No sequence begins past the end.
                position = tl.load(positions + token, mask=token < length, other=1)
                if position == 0:
                    h1, h2, h3 = _history(x, tail, token, batch, positions, sequences, x_time, inside, C, TAPS, TAIL, PACKED)
            total = _sum(rows[i], h1, h2, h3, w0, w1, w2, w3, b, TAPS)
            out = total / (1.0 + tl.exp(-total))
            tl.store(y + token * C, out.to(y.dtype.element_ty), mask=inside & (token < length))
            h3 = h2
            h2 = h1
            h1 = rows[i]


@triton.jit
def backward_kernel(
    x,  # [B, T, C], strides `x_batch` and `x_time`
    tail,  # inputs before the first [B or N, TAPS - 1, C]
    weight,  # w [TAPS, C], the last for the token itself
    bias,  # b [C]
    positions,  # position of each token in its packed sequence [T]
    sequences,  # packed sequence of each token [T]
    d_y,  # dy [B, T, C], strides `d_y_batch` and `d_y_time`
    d_x,  # out: dx [B, T, C]
    sums,  # out: parts of dw and db [programs, TAPS + 1, C]
    length,  # T
    x_batch,
    x_time,
    d_y_batch,
    d_y_time,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    TAIL: tl.constexpr,
    PACKED: tl.constexpr,
    COLUMNS: tl.constexpr,  # blocks of channels
    STEPS: tl.constexpr,  # tokens per program plus 3
    ROWS: tl.constexpr,  # tokens loaded at once
    BLOCK: tl.constexpr,  # channels per program
):
    """Gradient of x for STEPS - 3 tokens of a block of channels, and their share of those of taps and bias. A token's gradient
    depends on the three tokens after it, so it is written three steps late."""
    OWN: tl.constexpr = STEPS - 3
    batch, first, column, inside, run = _program(length, COLUMNS, OWN, BLOCK, C)
    x += batch * x_batch + column
    d_y += batch * d_y_batch + column
    d_x += batch * length * C + column
    sums += run * (TAPS + 1) * C + column
    if TAIL:
        tail += column
    w0, w1, w2, w3 = _taps(weight, column, inside, C, TAPS)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    h1, h2, h3 = _history(x, tail, first, batch, positions, sequences, x_time, inside, C, TAPS, TAIL, PACKED)
    # Partial gradients of x of the three previous tokens (a1 the latest), and of taps and bias.
    a1 = tl.zeros([BLOCK], tl.float32)
    a2 = tl.zeros([BLOCK], tl.float32)
    a3 = tl.zeros([BLOCK], tl.float32)
    s0 = tl.zeros([BLOCK], tl.float32)
    s1 = tl.zeros([BLOCK], tl.float32)
    s2 = tl.zeros([BLOCK], tl.float32)
    s3 = tl.zeros([BLOCK], tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    count = tl.minimum(length - first, OWN) + 3
    for block in range((count + ROWS - 1) // ROWS):
        begin = first + block * ROWS
        rows = ()
        gradients = ()
        for i in tl.static_range(ROWS):
            there = inside & (begin + i < length)
            rows = rows + (tl.load(x + (begin + i) * x_time, mask=there, other=0.0).to(tl.float32),)
            gradients = gradients + (tl.load(d_y + (begin + i) * d_y_time, mask=there, other=0.0).to(tl.float32),)
        for i in tl.static_range(ROWS):
            token = begin + i
            position = token
            if PACKED:
                # No sequence begins past the end, and nothing there contributes to earlier tokens.
                position = tl.load(positions + token, mask=token < length, other=3).to(tl.int64)
                if position == 0:
                    h1, h2, h3 = _history(x, tail, token, batch, positions, sequences, x_time, inside, C, TAPS, TAIL, PACKED)
            total = _sum(rows[i], h1, h2, h3, w0, w1, w2, w3, b, TAPS)
            sigmoid = 1.0 / (1.0 + tl.exp(-total))
            d_total = tl.where(token < length, gradients[i] * (sigmoid * (1.0 + total * (1.0 - sigmoid))), 0.0)
            own = tl.where(token < first + OWN, d_total, 0.0)
            s += own
            s0 += own * rows[i]
            if TAPS > 1:
                s1 += own * h1
                a1 += tl.where(position >= 1, w1 * d_total, 0.0)
            if TAPS > 2:
                s2 += own * h2
                a2 += tl.where(position >= 2, w2 * d_total, 0.0)
            if TAPS > 3:
                s3 += own * h3
                a3 += tl.where(position >= 3, w3 * d_total, 0.0)
            done = token - 3
            known = (done >= first) & (done < tl.minimum(first + OWN, length))
            tl.store(d_x + done * C, a3.to(d_x.dtype.element_ty), mask=inside & known)
            a3 = a2
            a2 = a1
            a1 = w0 * d_total
            h3 = h2
            h2 = h1
            h1 = rows[i]
    tl.store(sums + (TAPS - 1) * C, s0, mask=inside)
    if TAPS > 1:
        tl.store(sums + (TAPS - 2) * C, s1, mask=inside)
    if TAPS > 2:
        tl.store(sums + (TAPS - 3) * C, s2, mask=inside)
    if TAPS > 3:
        tl.store(sums, s3, mask=inside)
    tl.store(sums + TAPS * C, s, mask=inside)


@on_device_of
def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor | None,
    positions: Tensor | None,
    sequences: Tensor | None,
) -> Tensor:
    """The convolution.

    Args:
        x: `[B, T, C]`, bfloat16, float16 or float32.
        weight: `[taps, C]`, the last for the token itself.
        bias: `[C]`.
        tail: the inputs before the first, `[B, taps - 1, C]` (`[N, ...]` with `sequences`) in x's dtype; None means zeros.
        positions: int32 `[T]`, position of each token in its sequence, if packed.
        sequences: int32 `[T]`, sequence of each token, if packed and with tails.

    Returns:
        y `[B, T, C]`, contiguous, in x's dtype.
    """
    y = _fake_convolve(x, weight, bias, tail, positions, sequences)
    if x.numel() > 0:
        x, weight, bias, tail = _laid_out(x, weight, bias, tail)
        batch, length, channels = x.shape
        columns = triton.cdiv(channels, BLOCK)
        launch(
            forward_kernel,
            (columns * batch * triton.cdiv(length, RUN),),
            x,
            tail,
            weight,
            bias,
            positions,
            sequences,
            y,
            length,
            *x.stride()[:2],
            C=channels,
            TAPS=len(weight),
            TAIL=tail is not None,
            PACKED=positions is not None,
            COLUMNS=columns,
            STEPS=RUN,
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=1,
        )
    return y


def _fake_convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor | None,
    positions: Tensor | None,
    sequences: Tensor | None,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@on_device_of
def _convolve_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor | None,
    positions: Tensor | None,
    sequences: Tensor | None,
    d_y: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x `[B, T, C]`, weight `[taps, C]` and bias `[C]`, each in its tensor's dtype, given that of y."""
    d_x, d_weight, d_bias = _fake_convolve_backward(x, weight, bias, tail, positions, sequences, d_y)
    if x.numel() == 0:
        return d_x, d_weight.zero_(), d_bias.zero_()
    x, weight, bias, tail = _laid_out(x, weight, bias, tail)
    d_y = d_y if d_y.stride(2) == 1 else d_y.contiguous()
    batch, length, channels = x.shape
    taps = len(weight)
    columns, programs = triton.cdiv(channels, BLOCK), batch * triton.cdiv(length, RUN - BEFORE)
    sums = x.new_empty(programs, taps + 1, channels, dtype=torch.float32)
    launch(
        backward_kernel,
        (columns * programs,),
        x,
        tail,
        weight,
        bias,
        positions,
        sequences,
        d_y,
        d_x,
        sums,
        length,
        *x.stride()[:2],
        *d_y.stride()[:2],
        C=channels,
        TAPS=taps,
        TAIL=tail is not None,
        PACKED=positions is not None,
        COLUMNS=columns,
        STEPS=RUN,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=1,
    )
    total = sums.sum(0)
    return d_x, d_weight.copy_(total[:taps]), d_bias.copy_(total[taps])


def _fake_convolve_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor | None,
    positions: Tensor | None,
    sequences: Tensor | None,
    d_y: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (x, weight, bias))  # type: ignore[return-value]


def _laid_out(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The operands as the kernels read them: x with channels contiguous, all others fully contiguous."""
    x = x if x.stride(2) == 1 else x.contiguous()
    return x, weight.contiguous(), bias.contiguous(), None if tail is None else tail.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@once_differentiable
def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.factorization_memory.convolve_backward.default(*ctx.saved_tensors, d_y)
    return *gradients, None, None, None


torch.library.define(
    "factorization_memory::convolve",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? tail, Tensor? positions, Tensor? sequences) -> Tensor",
)
torch.library.define(
    "factorization_memory::convolve_backward",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? tail, Tensor? positions, Tensor? sequences, Tensor d_y)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("factorization_memory::convolve", ("cpu", "cuda"), _convolve)
torch.library.impl("factorization_memory::convolve_backward", ("cpu", "cuda"), _convolve_backward)
torch.library.register_fake("factorization_memory::convolve", _fake_convolve)
torch.library.register_fake("factorization_memory::convolve_backward", _fake_convolve_backward)
torch.library.register_autograd("factorization_memory::convolve", _backward, setup_context=_setup_context)

convolve = torch.ops.factorization_memory.convolve.default
"""The operator; see `_convolve` for its arguments and results."""
