"""A causal depthwise convolution over time that carries its tail, also over packed sequences and past padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from factorization_memory.ops.convolution import convolution_unchecked, last_inputs, window_convolution


class CausalConvolution(nn.Module):
    """`y_t = silu(sum_i w_i x_{t-i} + b)` per channel, each sequence preceded by its tail (zeros at its beginning).

    Its channels may be given in parts, which follow each other in its weights and its tail, and are computed in the dtype of
    the first.

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

    def check_tail(self, tail: Tensor, name: str, sequences: int) -> None:
        """ValueError, which names it, unless `tail` is one of so many sequences."""
        shape = (sequences, self.taps - 1, self.weight.shape[1])
        if tail.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tail.shape)}, takes {shape}")

    def forward(
        self,
        parts: Sequence[Tensor],
        tail: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        residual: bool = False,
        keep_tail: bool = True,
        backend: str = "auto",
    ) -> tuple[list[Tensor], Tensor | None]:
        """The convolution of whole sequences.

        Args:
            parts: x `[B, T, channels of the part]`, of all channels together.
            tail: the inputs before the first, `[B, taps - 1, channels]` (`[N, ...]` with `cu_seqlens`), None for zeros.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1), checked by the layer around this one.
            padding_mask: bool `[B, T]`, False where a token is padding, which the convolution then does not see; not with
                `cu_seqlens`.
            residual: whether x of the last part is added to its y.
            keep_tail: whether to return the new tail.
            backend: as of `factorization_memory.ops.convolution.causal_convolution`.

        Returns:
            y of each part, shaped as it, and the new tail, shaped as `tail`, or None; all in the first part's dtype.

        Raises:
            ValueError: parts or a tail of other channels than these, an unknown backend or one that cannot run here.
        """
        widths = [x.shape[2] for x in parts]
        self._check_widths(widths)
        if tail is not None:
            self.check_tail(tail, "tail", len(parts[0]) if cu_seqlens is None else len(cu_seqlens) - 1)
        tails: Sequence[Tensor | None] = [None for _ in parts] if tail is None else tail.split(widths, dim=2)
        # Real tokens first, in their order; the padding behind them is convolved too, but goes nowhere.
        order = None if padding_mask is None else (~padding_mask).to(torch.int8).argsort(dim=1, stable=True)
        outputs: list[Tensor] = []
        new_tails: list[Tensor] = []
        for x, weight, bias, before in zip(
            parts, self.weight.split(widths, dim=1), self.bias.split(widths), tails, strict=True
        ):
            added = residual and len(outputs) == len(parts) - 1
            x = x.to(parts[0].dtype)
            places = None if order is None else order[..., None].expand_as(x)
            x = x if places is None else x.gather(1, places)
            y = convolution_unchecked(x, weight, bias, before, cu_seqlens, added, backend)
            outputs.append(y if places is None else torch.zeros_like(y).scatter(1, places, y))
            if not keep_tail:
                continue
            if padding_mask is None:
                new_tails.append(last_inputs(x, self.taps, before, cu_seqlens))
                continue
            before = x.new_zeros(len(x), self.taps - 1, x.shape[2]) if before is None else before.to(x.dtype)
            last = padding_mask.sum(1, keepdim=True) + torch.arange(self.taps - 1, device=x.device)
            new_tails.append(torch.cat((before, x), dim=1).gather(1, last[..., None].expand(-1, -1, x.shape[2])))
        return outputs, torch.cat(new_tails, dim=2) if keep_tail else None

    def step(self, parts: Sequence[Tensor], tail: Tensor, residual: bool = False) -> list[Tensor]:
        """One token's parts, each `[B, channels of the part]`; `tail` `[B, taps - 1, channels]` is updated in place. Returns y
        of each; x of the last part is added to its y with `residual`."""
        widths = [part.shape[1] for part in parts]
        self._check_widths(widths)
        x = torch.cat([part.to(parts[0].dtype) for part in parts], dim=1) if len(parts) > 1 else parts[0]
        window = torch.cat((tail.to(x.dtype), x[:, None]), dim=1)
        tail.copy_(window[:, 1:])
        outputs = list(window_convolution(window, self.weight, self.bias)[:, 0].split(widths, dim=1))
        if residual:
            outputs[-1] = outputs[-1] + parts[-1].to(x.dtype)
        return outputs

    def _check_widths(self, widths: list[int]) -> None:
        channels = self.weight.shape[1]
        if sum(widths) != channels:
            raise ValueError(f"parts: got {' + '.join(map(str, widths))} channels, takes {channels} in all")
