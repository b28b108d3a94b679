"""What a whole model carries from one token to the next: the states of its layers.

A state that is stepped token by token can keep what its last steps overwrote, and be rolled back to the bit: for drafts that
are not accepted, and prefixes that are used again. That costs as much as the steps wrote: K states of M where memory is sparse.

Shapes: B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from factorization_memory.layers.state import GrowingState, MixerState, make_writable


def _alike(mine: MixerState, given: MixerState) -> bool:
    """Whether the states are of layers of one kind and size, whatever the number of sequences and the text read."""
    if isinstance(mine, GrowingState) and isinstance(given, GrowingState):
        capacity = max(mine.capacity, given.capacity)
        if mine.most != given.most:
            return False
        mine, given = mine.resized(capacity), given.resized(capacity)
    return type(mine) is type(given) and [x.shape[1:] for x in mine.tensors()] == [x.shape[1:] for x in given.tensors()]


class _Point:
    """A point that a state comes to by a step, or by being written to, itself alone. Not a number from a counter, on which a
    compiled model would depend, so that no call would find it compiled."""


@dataclass(frozen=True)
class Snapshot:
    """Where a `ModelState` stood."""

    point: _Point
    """The point."""
    copy: ModelState | None
    """A copy, if what steps overwrite is not kept."""


class ModelState:
    """The states of all layers of a model, first layer first. Every operation but `restore` and `rollback` leaves it as it
    is."""

    def __init__(self, layers: Iterable[MixerState]) -> None:
        self.layers = tuple(layers)
        self._point = _Point()
        self._before: list[_Point] = []  # the points that can be rolled back to, the latest last

    @property
    def undo_steps(self) -> int:
        """How many steps can be kept for `rollback`; 0 if none are (see `LanguageModel.keep_undo`)."""
        undo = self.layers[0].undo
        return 0 if undo is None else len(undo.rows)

    def step_done(self, replayed: bool = False) -> None:
        """A step of the model has changed all layers. `replayed` by a CUDA graph, which holds the GPU's part of this."""
        self._before.append(self._point)
        del self._before[: max(0, len(self._before) - self.undo_steps)]
        self._point = _Point()
        undo = self.layers[0].undo
        if undo is not None and not replayed:
            undo.position.add_(1).remainder_(len(undo.rows))

    @torch.no_grad()
    def load(self, state: ModelState, rows: Tensor | list[int] | None = None) -> None:
        """Copy `state` in, in place; steps done before cannot be rolled back.

        Args:
            state: of as many sequences, or of as many as there are `rows`.
            rows: its sequence i goes to sequence `rows[i]`, and the others stay as they are; None takes all in their order.

        Raises:
            ValueError: `state` is of another number of sequences, or not of the same model.
        """
        places = None if rows is None else torch.as_tensor(rows, device=self.device)
        expected = self.batch_size if places is None else len(places)
        if state.batch_size != expected:
            raise ValueError(f"state: got {state.batch_size} sequences, takes {expected}; use select or place first")
        if len(self) != len(state) or not all(map(_alike, self.layers, state.layers)):
            raise ValueError("state: it is not of this model; take one from its initial_state or forward")
        pairs: list[tuple[Tensor, Tensor]] = []
        for mine, given in zip(self.layers, state.layers, strict=True):
            make_writable(mine)
            if isinstance(mine, GrowingState) and isinstance(given, GrowingState):
                mine.reserve(given.capacity)
                given = given.resized(mine.capacity)
            pairs += zip(mine.tensors(), given.tensors(), strict=True)
        for target, source in pairs:
            if places is None:
                target.copy_(source)
            else:
                target.index_copy_(0, places, source.to(target))
        self.forget_steps()

    def forget_steps(self) -> None:
        """Steps done so far cannot be rolled back: other numbers were written into the tensors."""
        self._before.clear()
        self._point = _Point()

    def rollback(self, steps: int) -> None:
        """Take back the last `steps` steps, to the bit, in place.

        Raises:
            ValueError: so many are not kept.
        """
        if not 0 <= steps <= len(self._before):
            remedy = "keep more with LanguageModel.keep_undo" if self.undo_steps else "call LanguageModel.keep_undo first"
            raise ValueError(f"steps={steps}: the last {len(self._before)} steps can be rolled back; {remedy}")
        undo = self.layers[0].undo
        if steps and undo is not None:
            for layer in self.layers:
                assert layer.undo is not None, "all layers keep what steps overwrite, or none"
                make_writable(layer)
                layer.undo.roll_back(cast(Any, layer), steps)
            undo.position.sub_(steps).remainder_(len(undo.rows))
            self._point = self._before[-steps]
            del self._before[-steps:]

    def snapshot(self) -> Snapshot:
        """Where the state stands, for `restore`: the point alone if what steps overwrite is kept, otherwise a copy too."""
        return Snapshot(self._point, None if self.undo_steps else self.clone())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to where `snapshot` was taken of this state, to the bit, in place.

        Raises:
            ValueError: the point was left by more steps than are kept, or by a rollback, or is another state's.
        """
        if snapshot.copy is not None:
            self.load(snapshot.copy)
            self._point = snapshot.point
        elif snapshot.point in self._before:
            self.rollback(len(self._before) - self._before.index(snapshot.point))
        elif snapshot.point != self._point:
            raise ValueError(
                f"snapshot: it is not among the last {len(self._before)} steps of this state, which are kept; "
                "keep more with LanguageModel.keep_undo, or clone() the state"
            )

    def __repr__(self) -> str:
        """Sizes, not numbers."""
        lines = "".join(f"\n  ({i}): {layer!r}" for i, layer in enumerate(self.layers, start=1))
        return f"ModelState(batch_size={self.batch_size}, {self.num_bytes:,} bytes on {self.device}){lines}"

    def __iter__(self) -> Iterator[MixerState]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def batch_size(self) -> int:
        """B: sequences that the state belongs to."""
        return self.layers[0].batch_size

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.layers[0].tensors()[0].device

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
        rows = torch.as_tensor(indices, device=self.device)
        return self.apply(lambda tensor: tensor[rows])

    def place(self, indices: Tensor | list[int], size: int) -> ModelState:
        """A state of `size` sequences, zero except that sequence `indices[i]` is this state's sequence i."""
        rows = torch.as_tensor(indices, device=self.device)
        return self.apply(lambda tensor: tensor.new_zeros(size, *tensor.shape[1:]).index_copy(0, rows, tensor))

    def reset(self, rows: Tensor) -> ModelState:
        """The state with the sequences where `rows` (bool `[B]`) is True back at zero."""
        keep = ~rows.to(self.device)
        return self.apply(lambda tensor: tensor * keep.view(-1, *[1] * (tensor.dim() - 1)))
