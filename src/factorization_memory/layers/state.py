"""The state that a mixer carries from token to token; that of a memory layer has constant size.

Shapes: B sequences, H heads, M memory states, K states that a token selects, D value width per head, L update lag.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor

from factorization_memory import ops


class MixerState(Protocol):
    """The state of one layer. All zeros is the initial state, for each sequence separately."""

    @property
    def batch_size(self) -> int:
        """B, number of sequences."""

    @property
    def undo(self) -> Undo | None:
        """Record of what steps overwrite, if kept; copies of the state have none."""

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the state, `[B, ...]` each."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> MixerState:
        """The state with `function` applied to each tensor."""


class LayerStateBase:
    """Base of all mixer states, which are dataclasses of tensors `[B, ...]` and plain values."""

    undo: Undo | None = None

    @property
    def batch_size(self) -> int:
        """B, number of sequences."""
        return self.tensors()[0].shape[0]

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the state, `[B, ...]` each."""
        return list(self._named_tensors().values())

    def apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The state with `function` applied to each tensor."""
        changed = {name: function(tensor) for name, tensor in self._named_tensors().items()}
        return dataclasses.replace(cast(Any, self), **changed)

    def _named_tensors(self) -> dict[str, Tensor]:
        # Not vars(), which breaks the graph of torch.compile in torch 2.11.
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(cast(Any, self))}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def __repr__(self) -> str:
        """Dtypes and sizes, not values."""
        fields = ((name, value) for name, value in vars(self).items() if value is not None)
        return f"{type(self).__name__}({', '.join(f'{name}={_size(value)}' for name, value in fields)})"

    def detach(self) -> Self:
        """The state detached from the autograd graph."""
        return cast(Any, self).apply(torch.detach)


def _size(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{len(value.rows)} steps" if isinstance(value, Undo) else repr(value)


class GrowingState(LayerStateBase, ABC):
    """A `MixerState` whose tensors grow with the length read, such as a key-value cache, up to `most` tokens unless that is
    None."""

    most: int | None

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Tokens that fit in the tensors."""

    @abstractmethod
    def resized(self, capacity: int) -> Self:
        """The same state with room for `capacity` tokens, at least the current number."""

    @abstractmethod
    def reserve(self, capacity: int) -> None:
        """Makes room for at least `capacity` tokens. Must be called whenever the tensors have been overwritten."""


@dataclass
class Undo:
    """Ring buffer of what the last steps of one layer overwrote.

    Attributes:
        rows: the overwritten memory states, `[depth, B, H, K, D]`; K = M in the dense form.
        indices: indices of these states, int64 `[depth, B, H, K]`; None in the dense form.
        rest: previous values of the other tensors of the state (see `LayerState.rest`), `[depth, B, ...]` each.
        position: int64 `[1]`, ring entry of the next step: one tensor shared by all layers, so that steps can be captured in a
            CUDA graph.
    """

    rows: Tensor
    indices: Tensor | None
    rest: list[Tensor]
    position: Tensor

    def put_aside(self, state: LayerState) -> None:
        """Records everything but the memory, before a step."""
        for ring, tensor in zip(self.rest, state.rest(), strict=True):
            ring.index_copy_(0, self.position, tensor[None])

    def put_aside_selection(self, indices: Tensor | None) -> None:
        """Records the indices of the states that the step updates, `[B, H, K]`."""
        if self.indices is not None and indices is not None:
            self.indices.index_copy_(0, self.position, indices[None])

    def roll_back(self, state: LayerState, steps: int) -> None:
        """Undoes the last `steps` steps; `position` must still point past them."""
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
        convolution: tail of the causal convolution: its last inputs, oldest first, `[B, taps - 1, channels]`; None without
            convolution.
        affinity: with `update_lag`, affinities of the last L tokens, for the next updates, oldest first, `[B, L, H, K]` (K = M
            in the dense form), in memory's dtype; None without lag. Zero where there was no token: nothing is written.
        indices: states of these affinities, int64 `[B, L, H, K]`; None without lag, and in the dense form.
        undo: record of what steps overwrite, if kept. Copies of the state have none.
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

    def advance(
        self,
        update: Tensor,
        merge: Tensor,
        value: Tensor,
        update_indices: Tensor | None,
        merge_indices: Tensor | None,
        backend: str,
    ) -> Tensor:
        """One step of the recurrence: updates the memory in place, recording what it overwrites if that is kept.

        Args:
            update, merge: theta and phi, `[B, H, K]`.
            value: `[B, H, D]`.
            update_indices, merge_indices: states of theta and phi, int64 `[B, H, K]`; None in the dense form.
            backend: of the recurrence.

        Returns:
            The merged vectors `[B, H, D]`.
        """
        rows, position = None, None
        if self.undo is not None:
            self.undo.put_aside_selection(update_indices)
            rows, position = self.undo.rows, self.undo.position
        return ops.recurrence_step(
            update,
            merge,
            value,
            self.memory,
            update_indices,
            None if merge_indices is update_indices else merge_indices,
            undo=rows,
            position=position,
            backend=backend,
        )

    def apply(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """The state with `function` applied to each tensor, in the order of `tensors`."""
        memory, rest = function(self.memory), (self.convolution, self.affinity, self.indices)
        convolution, affinity, indices = (None if tensor is None else function(tensor) for tensor in rest)
        return LayerState(memory, convolution, affinity, indices)

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the state."""
        return [self.memory, *self.rest()]

    def rest(self) -> list[Tensor]:
        """All tensors except the memory."""
        return [tensor for tensor in (self.convolution, self.affinity, self.indices) if tensor is not None]


def outside_inference_mode(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made under `torch.inference_mode()` that has ended: an inference tensor can neither be
    modified nor saved for backward."""
    made_there = not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled()
    return tensor.clone() if made_there else tensor


def make_writable(state: MixerState) -> None:
    """Replaces those tensors of `state` that were made under `torch.inference_mode()` by copies, if that has ended."""
    if torch.compiler.is_compiling():
        return
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(state, name, outside_inference_mode(value))


def __getattr__(name: str) -> Any:
    """The state of a model, which had its place here in 0.1: saved states name it so."""
    if name in ("ModelState", "Snapshot", "_Point"):
        return getattr(import_module("factorization_memory.layers.model_state"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
