"""A causal depthwise convolution over time with SiLU: `y_t = silu(sum_i w_i x_{t-i} + b)` per channel.

Shapes: B sequences, T tokens, C channels; N sequences packed along T (B = 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from factorization_memory.ops import runtime
from factorization_memory.ops.arguments import check_borders
from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.runtime.backends import Backend, choose

MAX_TAPS = 4
"""Largest number of taps that the kernels support."""


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolves whole sequences. Gradients flow to x, weight, bias and tail.

    Args:
        x: `[B, T, C]`.
        weight: `[taps, C]`; the last tap is for the token itself, the one before it for the previous token.
        bias: `[C]`.
        tail: the inputs before the first, oldest first, `[B, taps - 1, C]` (`[N, taps - 1, C]` with `cu_seqlens`); None means
            zeros.
        cu_seqlens: `[N + 1]` int32 or int64, borders of sequences packed along T (B = 1).
        backend: "plain" (PyTorch), "triton" (kernels for GPUs; up to four taps, not for float64, nor if `tail` requires a
            gradient), or "auto": triton on a GPU where it can run, plain elsewhere.

    Returns:
        y `[B, T, C]` in x's dtype.

    Raises:
        ValueError: an argument of the wrong shape or dtype, borders that do not fit, an unknown backend or one that cannot run
            here; the message names the argument, the value and what is accepted.
    """
    _check(x, weight, bias, tail, cu_seqlens)
    return convolve(x, weight, bias, tail, cu_seqlens, backend)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    """`causal_convolution` on checked arguments; checking borders would synchronize with a GPU."""
    if tail is not None:
        tail = tail.to(x.dtype)
    return choose(BACKENDS, backend, x, weight, tail).forward(x, weight, bias, tail, cu_seqlens)


def _by_kernels(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    from factorization_memory.ops.convolution import kernels

    positions, sequences = (None, None) if cu_seqlens is None else _places(x, cu_seqlens, tail is not None)
    return kernels.convolve(x, weight, bias, tail, positions, sequences)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    return _whole(x, weight, bias, tail) if cu_seqlens is None else _packed(x, weight, bias, tail, cu_seqlens)


def window_convolution(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`causal_convolution` in PyTorch: `window` is tail and x concatenated, `[B, taps - 1 + T, C]`; returns `[B, T, C]`."""
    weight, bias = weight.to(window.dtype), bias.to(window.dtype)
    if torch.compiler.is_compiling():  # the compiler fuses it better
        shifted = _shifted(window, len(weight))
        return torch.nn.functional.silu(bias + sum(x * tap for x, tap in zip(shifted, weight, strict=True)))
    return _Convolution.apply(window, weight, bias)


def last_inputs(x: Tensor, taps: int, tail: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The tail to continue from, shaped like `tail` of `causal_convolution`, for the same arguments; a copy."""
    room = taps - 1
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    tail = x.new_zeros(sequences, room, x.shape[2]) if tail is None else tail.to(x.dtype)
    if cu_seqlens is None:
        # Never a view, which would keep all of x alive as long as the tail.
        if torch.compiler.is_compiling():  # one graph for sequences shorter or longer than the tail
            return torch.cat((tail, x), dim=1).narrow(1, x.shape[1], room).clone()
        last = x[:, max(x.shape[1] - room, 0) :]
        return torch.cat((tail[:, last.shape[1] :], last), dim=1)
    borders = cu_seqlens.to(x.device, torch.long)
    back = torch.arange(-room, 0, device=x.device)
    length = borders.diff()[:, None]
    # A sequence shorter than the tail keeps part of the old tail.
    old = tail.gather(1, (length + back + room).clamp(max=max(room - 1, 0))[..., None].expand_as(tail))
    if x.shape[1] == 0:
        return old
    new = x[0, (borders[1:, None] + back).clamp(min=0)]
    return torch.where((length + back >= 0)[..., None], new, old)


def _places(x: Tensor, cu_seqlens: Tensor, tails: bool) -> tuple[Tensor, Tensor | None]:
    """For each token of packed sequences its position in its sequence and, for tails, the sequence's index; int32 `[T]`.
    Always in range, even if the borders are invalid, which a compiled model does not check."""
    borders = cu_seqlens.to(x.device, torch.long)
    token = torch.arange(x.shape[1], device=x.device)
    sequence = torch.bucketize(token, borders[1:], right=True).clamp(max=len(borders) - 2)
    return (token - borders[sequence]).clamp(min=0).minimum(token).int(), sequence.int() if tails else None


def _whole(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None) -> Tensor:
    room = len(weight) - 1
    tail = x.new_zeros(x.shape[0], room, x.shape[2]) if tail is None else tail
    return window_convolution(torch.cat((tail, x), dim=1), weight, bias)


def _packed(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Shifts each sequence right to insert its tail, so that one convolution serves all sequences."""
    borders = cu_seqlens.to(x.device, torch.long)
    room, sequences = len(weight) - 1, borders.numel() - 1
    token = torch.arange(x.shape[1], device=x.device)
    token = token + room * torch.bucketize(token, borders[1:], right=True) + room
    extended = x.new_zeros(1, x.shape[1] + room * sequences, x.shape[2]).index_copy(1, token, x)
    if tail is not None:
        gap = (
            borders[:-1, None] + room * torch.arange(sequences, device=x.device)[:, None] + torch.arange(room, device=x.device)
        )
        extended = extended.index_copy(1, gap.flatten(), tail.reshape(1, -1, x.shape[2]))
    return window_convolution(extended, weight, bias)[:, token - room]


class _Convolution(torch.autograd.Function):
    """`silu(sum_i w_i x_{t+i} + b)` of x `[B, T + taps - 1, C]`, w `[taps, C]` and b, as `[B, T, C]`.

    Sums shifted products in place, forward and backward: autograd would allocate a zero-filled gradient of x per tap.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        first, *rest = _shifted(x, len(weight))
        y = torch.addcmul(bias, first, weight[0])
        for shifted, tap in zip(rest, weight[1:], strict=True):
            y.addcmul_(shifted, tap)
        ctx.save_for_backward(x, weight, bias, y)  # all inputs, as `once_differentiable` requires
        return torch.nn.functional.silu(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, _, y = ctx.saved_tensors
        d_y = torch.ops.aten.silu_backward(d_output, y)
        d_x, d_weight, product = torch.zeros_like(x), torch.empty_like(weight), torch.empty_like(y)
        for d_shifted, shifted, tap, d_tap in zip(
            _shifted(d_x, len(weight)), _shifted(x, len(weight)), weight, d_weight, strict=True
        ):
            d_shifted.addcmul_(d_y, tap)
            torch.sum(torch.mul(d_y, shifted, out=product), (0, 1), out=d_tap)
        return d_x, d_weight, d_y.sum((0, 1))


def _shifted(x: Tensor, taps: int) -> list[Tensor]:
    """The inputs of each tap: views `[B, T, C]` of x `[B, T + taps - 1, C]`."""
    return [x[:, i : x.shape[1] - taps + 1 + i] for i in range(taps)]


def _why_unsupported(x: Tensor, weight: Tensor, tail: Tensor | None) -> str | None:
    """Why the kernels cannot run; None if they can."""
    if len(weight) > MAX_TAPS:
        return f"weight has {len(weight)} taps, the kernels take up to {MAX_TAPS}"
    if tail is not None and tail.requires_grad and torch.is_grad_enabled():
        return "tail requires a gradient, which the kernels do not compute"
    return runtime.why_unsupported(x, "x")


BACKENDS = (Backend("triton", _by_kernels, needs_gpu=True, why_unsupported=_why_unsupported), Backend("plain", _plain))
"""Fastest first."""


def _check(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes [B, T, C]")
    if not x.is_floating_point():
        raise ValueError(f"x: got dtype {x.dtype}, takes floating-point numbers")
    channels = x.shape[2]
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != channels:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, takes [taps, {channels}], of one tap or more")
    if bias.shape != (channels,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, takes ({channels},)")
    if cu_seqlens is not None:
        check_borders(cu_seqlens, x.shape[0], x.shape[1])
    shape = (x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1, len(weight) - 1, channels)
    if tail is not None and tail.shape != shape:
        raise ValueError(f"tail: got shape {tuple(tail.shape)}, takes {shape}")
