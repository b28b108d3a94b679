"""What a memory layer carries from one token to the next, and what a whole model carries: constant in the length read.

Shapes: B sequences, H heads, M memory states, D value width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerState:
    """The state of one memory layer.

    Attributes:
        memory: `[B, H, M, D]`, float32 (float64 in a float64 model).
        convolution: the last values that the causal convolution still needs, oldest first, `[B, taps - 1, H * D]`; None
            without convolution.
    """

    memory: Tensor
    convolution: Tensor | None = None

    def apply(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """The state with `function` applied to each tensor."""
        return LayerState(function(self.memory), None if self.convolution is None else function(self.convolution))

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the state."""
        return [self.memory] if self.convolution is None else [self.memory, self.convolution]


class ModelState:
    """The states of all layers of a model, first layer first. Every operation but `copy_` leaves it as it is."""

    def __init__(self, layers: Iterable[LayerState]) -> None:
        self.layers = tuple(layers)

    def __iter__(self) -> Iterator[LayerState]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def batch_size(self) -> int:
        """B: sequences that the state belongs to."""
        return self.layers[0].memory.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors, layer by layer."""
        return [tensor for layer in self.layers for tensor in layer.tensors()]

    def apply(self, function: Callable[[Tensor], Tensor]) -> ModelState:
        """The state with `function` applied to each tensor."""
        return ModelState(layer.apply(function) for layer in self.layers)

    def clone(self) -> ModelState:
        """An independent copy."""
        return self.apply(torch.clone)

    def detach(self) -> ModelState:
        """The same numbers, cut off from the graph that made them."""
        return self.apply(torch.detach)

    def to(self, device: torch.device | str) -> ModelState:
        """The state on another device."""
        return self.apply(lambda tensor: tensor.to(device))

    def select(self, indices: Tensor | list[int]) -> ModelState:
        """The sequences at `indices` (in that order, repeats allowed), a copy: for beams, forks and reordering."""
        rows = torch.as_tensor(indices, device=self.layers[0].memory.device)
        return self.apply(lambda tensor: tensor[rows])

    def place(self, indices: Tensor | list[int], size: int) -> ModelState:
        """A state of `size` sequences, zero except that sequence `indices[i]` is this state's sequence i."""
        rows = torch.as_tensor(indices, device=self.layers[0].memory.device)
        return self.apply(lambda tensor: tensor.new_zeros(size, *tensor.shape[1:]).index_copy(0, rows, tensor))

    def reset(self, rows: Tensor) -> ModelState:
        """The state with the sequences where `rows` (bool `[B]`) is True back at zero."""
        keep = ~rows.to(self.layers[0].memory.device)
        return self.apply(lambda tensor: tensor * keep.view(-1, *[1] * (tensor.dim() - 1)))
