"""A causal depthwise convolution over time that carries its tail, also over packed sequences and past padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.uniform_(self.weight, -(taps**-0.5), taps**-0.5)

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
            return self._convolve(extended), extended[:, extended.shape[1] - self.taps + 1 :]
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
        length = extended.shape[1] - self.taps + 1
        y = self.bias.to(extended.dtype) + extended[:, :length] * self.weight[0].to(extended.dtype)
        for i in range(1, self.taps):
            y = torch.addcmul(y, extended[:, i : i + length], self.weight[i].to(extended.dtype))
        return torch.nn.functional.silu(y)

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
