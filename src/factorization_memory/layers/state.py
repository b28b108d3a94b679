"""What a mixer carries from one token to the next: of a memory, constant in the length read.

Shapes: B sequences, H heads, M memory states, K states that a token selects, D value width of a head, L lag of updates.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor

from factorization_memory import ops


class MixerState(Protocol):
    """What one layer carries for its sequences. Zero is empty: a sequence whose part of every tensor is zero has not begun."""

    @property
    def batch_size(self) -> int:
        """B: sequences that the state belongs to."""

    @property
    def undo(self) -> Undo | None:
        """Takes what steps overwrite, if that is kept; of this very state: copies have none."""

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the state, `[B, ...]` each."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> MixerState:
        """The state with `function` applied to each tensor."""


class LayerStateBase:
    """What the states of all mixers share, which are dataclasses of tensors `[B, ...]` and plain values."""

    undo: Undo | None = None

    @property
    def batch_size(self) -> int:
        """B: sequences that the state belongs to."""
        return self.tensors()[0].shape[0]

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the state, `[B, ...]` each."""
        return list(self._named_tensors().values())

    def apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The state with `function` applied to each tensor."""
        changed = {name: function(tensor) for name, tensor in self._named_tensors().items()}
        return dataclasses.replace(cast(Any, self), **changed)

    def _named_tensors(self) -> dict[str, Tensor]:
        # By fields: vars() breaks the graph of torch.compile in torch 2.11.
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(cast(Any, self))}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def __repr__(self) -> str:
        """Dtypes and sizes, not numbers."""
        fields = ((name, value) for name, value in vars(self).items() if value is not None)
        return f"{type(self).__name__}({', '.join(f'{name}={_size(value)}' for name, value in fields)})"

    def detach(self) -> Self:
        """The same numbers, cut off from the graph that made them."""
        return cast(Any, self).apply(torch.detach)


def _size(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{len(value.rows)} steps" if isinstance(value, Undo) else repr(value)


class GrowingState(LayerStateBase, ABC):
    """A `MixerState` whose tensors grow with the text read, as a cache of keys and values, up to `most` tokens if that is not
    None."""

    most: int | None

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Tokens that there are places for."""

    @abstractmethod
    def resized(self, capacity: int) -> Self:
        """The same state with places for so many tokens, not fewer than now."""

    @abstractmethod
    def reserve(self, capacity: int) -> None:
        """Have places for at least so many tokens. To be called whenever other numbers have been written into the tensors."""


@dataclass
class Undo:
    """What the last steps of one layer overwrote, in a ring of so many places.

    Attributes:
        rows: memory states as they were, `[places, B, H, K, D]`; K = M in the dense form.
        indices: which they are, int64 `[places, B, H, K]`; None in the dense form.
        rest: the other tensors of the state (see `LayerState.rest`) as they were, `[places, B, ...]` each.
        position: int64 `[1]`, where the next step goes: one tensor for all layers, so that a CUDA graph can hold the steps.
    """

    rows: Tensor
    indices: Tensor | None
    rest: list[Tensor]
    position: Tensor

    def put_aside(self, state: LayerState) -> None:
        """All but the memory, before a step."""
        for ring, tensor in zip(self.rest, state.rest(), strict=True):
            ring.index_copy_(0, self.position, tensor[None])

    def put_aside_selection(self, indices: Tensor | None) -> None:
        """The states that the step updates, `[B, H, K]`."""
        if self.indices is not None and indices is not None:
            self.indices.index_copy_(0, self.position, indices[None])

    def roll_back(self, state: LayerState, steps: int) -> None:
        """Take the last steps back; `position` still stands after them."""
        chosen = None if self.indices is None else self.indices[:, :, None]
        ops.recurrence_undo(state.memory, self.rows[:, :, None], chosen, None, self.position, steps)
        place = (self.position - steps) % len(self.rows)
        for ring, tensor in zip(self.rest, state.rest(), strict=True):
            tensor.copy_(ring.index_select(0, place)[0])


@dataclass(repr=False)
class LayerState(LayerStateBase):
    """The state of one memory layer.

    Attributes:
        memory: `[B, H, M, D]`, float32 (float64 in a float64 model).
        convolution: the last inputs that the causal convolution still needs, oldest first, `[B, taps - 1, channels]`; None
            without convolution.
        affinity: with `update_lag`, affinities of the last L tokens, which coming updates go by, oldest first,
            `[B, L, H, K]` (K = M in the dense form), of memory's dtype; None without. Zero is no token: nothing is written.
        indices: their states, int64 `[B, L, H, K]`; None without lag, and in the dense form.
        undo: takes what steps overwrite, if that is kept. Of this very state: copies have none.
    """

    memory: Tensor
    convolution: Tensor | None = None
    affinity: Tensor | None = None
    indices: Tensor | None = None
    undo: Undo | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.memory.shape[0]

    def apply(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """The state with `function` applied to each tensor, in the order of `tensors`."""
        memory, rest = function(self.memory), (self.convolution, self.affinity, self.indices)
        convolution, affinity, indices = (None if tensor is None else function(tensor) for tensor in rest)
        return LayerState(memory, convolution, affinity, indices)

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the state."""
        return [self.memory, *self.rest()]

    def rest(self) -> list[Tensor]:
        """The tensors beside the memory."""
        return [tensor for tensor in (self.convolution, self.affinity, self.indices) if tensor is not None]


def outside_inference_mode(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made under `torch.inference_mode()` and that has ended: it could neither be changed nor
    saved for backward."""
    made_there = not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled()
    return tensor.clone() if made_there else tensor


def make_writable(state: MixerState) -> None:
    """Puts copies in the place of those tensors of `state` that were made under `torch.inference_mode()`, if that has ended."""
    if torch.compiler.is_compiling():
        return
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(state, name, outside_inference_mode(value))
