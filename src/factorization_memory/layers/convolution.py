"""A causal depthwise convolution over time that carries its tail, also over packed sequences and past padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class CausalConvolution(nn.Module):
    """`y_t = silu(sum_i w_i x_{t-i} + b)` per channel, each sequence preceded by its tail (zeros at its beginning).

    Args:
        channels: width of input and output.
        taps: inputs that each output sees, itself included.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(taps, channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights: uniform within 1/sqrt(taps), no bias."""
        nn.init.uniform_(self.weight, -(self.taps**-0.5), self.taps**-0.5)
        nn.init.zeros_(self.bias)

    def initial_tail(self, batch_size: int) -> Tensor:
        """The tail of sequences that have not begun, `[batch_size, taps - 1, channels]`."""
        return self.weight.new_zeros(batch_size, self.taps - 1, self.weight.shape[1])

    def forward(
        self, x: Tensor, tail: Tensor | None = None, borders: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The convolution of whole sequences.

        Args:
            x: `[B, T, channels]`.
            tail: the inputs before the first, `[B, taps - 1, channels]` (`[N, ...]` with `borders`), None for zeros.
            borders: the N + 1 borders of packed sequences (B = 1).
            padding_mask: bool `[B, T]`, False where a token is padding, which the convolution then does not see; not with
                `borders`.

        Returns:
            y `[B, T, channels]` and the new tail, shaped as `tail`.
        """
        sequences = x.shape[0] if borders is None else borders.numel() - 1
        tail = self.initial_tail(sequences).to(x) if tail is None else tail.to(x.dtype)
        if borders is not None:
            return self._packed(x, tail, borders)
        if padding_mask is None:
            extended = torch.cat((tail, x), dim=1)
            # A copy: a view would keep the whole stretch alive for as long as the state is carried.
            return self._convolve(extended), extended[:, extended.shape[1] - self.taps + 1 :].clone()
        # Real tokens first, in their order; the padding behind them is convolved too, but goes nowhere.
        order = (~padding_mask).to(torch.int8).argsort(dim=1, stable=True)
        extended = torch.cat((tail, x.gather(1, order[..., None].expand_as(x))), dim=1)
        y = torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), self._convolve(extended))
        last = padding_mask.sum(1, keepdim=True) + torch.arange(self.taps - 1, device=x.device)
        return y, extended.gather(1, last[..., None].expand(-1, -1, x.shape[2]))

    def step(self, x: Tensor, tail: Tensor) -> Tensor:
        """One token x `[B, channels]`; `tail` `[B, taps - 1, channels]` is updated in place. Returns y `[B, channels]`."""
        window = torch.cat((tail.to(x.dtype), x[:, None]), dim=1)
        tail.copy_(window[:, 1:])
        return self._convolve(window)[:, 0]

    def _convolve(self, extended: Tensor) -> Tensor:
        weight, bias = self.weight.to(extended.dtype), self.bias.to(extended.dtype)
        if torch.compiler.is_compiling():  # the compiler fuses better than we do
            shifted = _shifted(extended, len(weight))
            return torch.nn.functional.silu(bias + sum(x * tap for x, tap in zip(shifted, weight, strict=True)))
        return _Convolution.apply(extended, weight, bias)

    def _packed(self, x: Tensor, tail: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
        """Each sequence is moved right to make room for its tail, so that one convolution serves all."""
        borders = borders.to(x.device, torch.long)
        room = self.taps - 1
        sequences = borders.numel() - 1
        token = torch.arange(x.shape[1], device=x.device)
        token = token + room * torch.bucketize(token, borders[1:], right=True) + room
        gap = (
            borders[:-1, None] + room * torch.arange(sequences, device=x.device)[:, None] + torch.arange(room, device=x.device)
        )
        extended = x.new_zeros(1, x.shape[1] + room * sequences, x.shape[2])
        extended = extended.index_copy(1, token, x).index_copy(1, gap.flatten(), tail.reshape(1, -1, x.shape[2]))
        y = self._convolve(extended)[:, token - room]
        ends = gap + (borders[1:] - borders[:-1])[:, None]
        return y, extended[0, ends]


class _Convolution(torch.autograd.Function):
    """`silu(sum_i w_i x_{t+i} + b)` of x `[B, T + taps - 1, channels]`, w `[taps, channels]` and b, as `[B, T, channels]`.

    Shifted products summed in place, both ways: autograd would give each tap's gradient a zero-filled tensor of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        first, *rest = _shifted(x, len(weight))
        y = torch.addcmul(bias, first, weight[0])
        for shifted, tap in zip(rest, weight[1:], strict=True):
            y.addcmul_(shifted, tap)
        ctx.save_for_backward(x, weight, y)
        return torch.nn.functional.silu(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, y = ctx.saved_tensors
        d_y = torch.ops.aten.silu_backward(d_output, y)
        d_x, d_weight, product = torch.zeros_like(x), torch.empty_like(weight), torch.empty_like(y)
        for d_shifted, shifted, tap, d_tap in zip(
            _shifted(d_x, len(weight)), _shifted(x, len(weight)), weight, d_weight, strict=True
        ):
            d_shifted.addcmul_(d_y, tap)
            torch.sum(torch.mul(d_y, shifted, out=product), (0, 1), out=d_tap)
        return d_x, d_weight, d_y.sum((0, 1))


def _shifted(x: Tensor, taps: int) -> list[Tensor]:
    """What each tap sees of x `[B, T + taps - 1, channels]`: views `[B, T, channels]`."""
    return [x[:, i : x.shape[1] - taps + 1 + i] for i in range(taps)]
