"""A causal depthwise convolution over time that carries its tail, also over packed sequences and past padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from factorization_memory.ops.convolution import causal_convolution, last_inputs, window_convolution


class CausalConvolution(nn.Module):
    """`y_t = silu(sum_i w_i x_{t-i} + b)` per channel, each sequence preceded by its tail (zeros at its beginning).

    Its channels may be given in parts, which follow each other in its weights and its tail.

    Args:
        channels: width of input and output, of all parts together.
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
        self,
        parts: Sequence[Tensor],
        tail: Tensor | None = None,
        borders: Tensor | None = None,
        padding_mask: Tensor | None = None,
        residual: bool = False,
        keep_tail: bool = True,
        backend: str = "auto",
    ) -> tuple[list[Tensor], Tensor | None]:
        """The convolution of whole sequences.

        Args:
            parts: x `[B, T, channels of the part]`, of all channels together; taken in the first one's dtype.
            tail: the inputs before the first, `[B, taps - 1, channels]` (`[N, ...]` with `borders`), None for zeros.
            borders: the N + 1 borders of packed sequences (B = 1).
            padding_mask: bool `[B, T]`, False where a token is padding, which the convolution then does not see; not with
                `borders`.
            residual: whether the last part is added to what is made of it.
            keep_tail: whether to return the new tail.
            backend: as of `factorization_memory.ops.convolution.causal_convolution`.

        Returns:
            y of each part, shaped as it, and the new tail, shaped as `tail`, or None; all in the first part's dtype.
        """
        # Real tokens first, in their order; the padding behind them is convolved too, but goes nowhere.
        order = None if padding_mask is None else (~padding_mask).to(torch.int8).argsort(dim=1, stable=True)
        outputs, tails, channel = [], [], 0
        for part, x in enumerate(parts):
            x = x.to(parts[0].dtype)
            channels = slice(channel, channel + x.shape[2])
            channel += x.shape[2]
            weight, bias = self.weight[:, channels], self.bias[channels]
            before = None if tail is None else tail[..., channels]
            added = residual and part == len(parts) - 1
            if order is None or padding_mask is None:
                outputs.append(causal_convolution(x, weight, bias, before, borders, added, backend))
                if keep_tail:
                    tails.append(last_inputs(x, self.taps, before, borders))
                continue
            places = order[..., None].expand_as(x)
            x = x.gather(1, places)
            y = causal_convolution(x, weight, bias, before, None, added, backend)
            outputs.append(torch.zeros_like(y).scatter(1, places, y))
            before = x.new_zeros(x.shape[0], self.taps - 1, x.shape[2]) if before is None else before.to(x.dtype)
            last = padding_mask.sum(1, keepdim=True) + torch.arange(self.taps - 1, device=x.device)
            extended = torch.cat((before, x), dim=1)
            tails.append(extended.gather(1, last[..., None].expand(-1, -1, x.shape[2])))
        return outputs, torch.cat(tails, dim=2) if keep_tail else None

    def step(self, parts: Sequence[Tensor], tail: Tensor, residual: bool = False) -> list[Tensor]:
        """One token's parts, each `[B, channels of the part]`; `tail` `[B, taps - 1, channels]` is updated in place. Returns y
        of each; the last is added to what is made of it with `residual`."""
        x = torch.cat([part.to(parts[0].dtype) for part in parts], dim=1) if len(parts) > 1 else parts[0]
        window = torch.cat((tail.to(x.dtype), x[:, None]), dim=1)
        tail.copy_(window[:, 1:])
        y = window_convolution(window, self.weight, self.bias)[:, 0]
        outputs = list(y.split([part.shape[1] for part in parts], dim=1))
        if residual:
            outputs[-1] = outputs[-1] + parts[-1].to(x.dtype)
        return outputs
