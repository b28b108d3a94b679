"""A causal depthwise convolution over time that carries its tail, across packed sequences and padding too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from factorization_memory.layers.calling import device_of
from factorization_memory.ops.convolution import convolve, last_inputs, window_convolution


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
        """The tail of the initial state: zeros `[batch_size, taps - 1, channels]`."""
        shape = (batch_size, self.taps - 1, self.weight.shape[1])
        return torch.zeros(shape, dtype=self.weight.dtype, device=device_of(self))

    def check_tail(self, tail: Tensor, name: str, sequences: int) -> None:
        """Raises ValueError naming `name` unless `tail` fits this layer and holds `sequences` sequences."""
        shape = (sequences, self.taps - 1, self.weight.shape[1])
        if tail.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tail.shape)}, takes {shape}")

    def forward(
        self,
        x: Tensor,
        tail: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        keep_tail: bool = True,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor | None]:
        """Convolves whole sequences.

        Args:
            x: `[B, T, channels]`.
            tail: the inputs before the first, `[B, taps - 1, channels]` (`[N, ...]` with `cu_seqlens`), None means zeros.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1), checked by the layer around this one.
            padding_mask: bool `[B, T]`, False for padding, which the convolution skips; not with `cu_seqlens`.
            keep_tail: whether to return the new tail.
            backend: see `factorization_memory.ops.convolution.causal_convolution`.

        Returns:
            y `[B, T, channels]`, and the new tail, shaped as `tail`, or None; both in x's dtype.

        Raises:
            ValueError: x or a tail with the wrong number of channels, an unknown backend, or one that cannot run here.
        """
        self._check_channels(x)
        if tail is not None:
            self.check_tail(tail, "tail", len(x) if cu_seqlens is None else len(cu_seqlens) - 1)
        if padding_mask is None:
            y = convolve(x, self.weight, self.bias, tail, cu_seqlens, backend)
            return y, last_inputs(x, self.taps, tail, cu_seqlens) if keep_tail else None
        # Real tokens first, in order; padding after them is convolved too, but its output is dropped.
        places = (~padding_mask).to(torch.int8).argsort(dim=1, stable=True)[..., None].expand_as(x)
        x = x.gather(1, places)
        y = convolve(x, self.weight, self.bias, tail, None, backend)
        y = torch.zeros_like(y).scatter(1, places, y)
        if not keep_tail:
            return y, None
        before = x.new_zeros(len(x), self.taps - 1, x.shape[2]) if tail is None else tail.to(x.dtype)
        last = padding_mask.sum(1, keepdim=True) + torch.arange(self.taps - 1, device=x.device)
        return y, torch.cat((before, x), dim=1).gather(1, last[..., None].expand(-1, -1, x.shape[2]))

    def step(self, x: Tensor, tail: Tensor) -> Tensor:
        """One token x `[B, channels]` to y of the same shape; `tail` `[B, taps - 1, channels]` is updated in place. Raises
        ValueError for the wrong number of channels or a tail of another B."""
        self._check_channels(x)
        self.check_tail(tail, "tail", len(x))
        window = torch.cat((tail.to(x.dtype), x[:, None]), dim=1)
        tail.copy_(window[:, 1:])
        return window_convolution(window, self.weight, self.bias)[:, 0]

    def _check_channels(self, x: Tensor) -> None:
        channels = self.weight.shape[1]
        if x.shape[-1] != channels:
            raise ValueError(f"x: got {x.shape[-1]} channels, takes {channels}")
