"""The state of a whole model: the states of its layers.

A state that is stepped token by token can record what its last steps overwrote, for a bit-exact rollback: to drop rejected
drafts, or to reuse a prefix. This costs as much memory as the steps wrote: K of M states if sparse.

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
    """Whether the states belong to layers of the same kind and size, whatever their batch size and length read."""
    if isinstance(mine, GrowingState) and isinstance(given, GrowingState):
        capacity = max(mine.capacity, given.capacity)
        if mine.most != given.most:
            return False
        mine, given = mine.resized(capacity), given.resized(capacity)
    return type(mine) is type(given) and [x.shape[1:] for x in mine.tensors()] == [x.shape[1:] for x in given.tensors()]


class _Point:
    """Identity of a state's contents, new after each step or write. Not a counter: a compiled model would specialize on its
    value and recompile at every call."""


@dataclass(frozen=True)
class Snapshot:
    """A point in the history of a `ModelState`."""

    point: _Point
    """Identity of the contents."""
    copy: ModelState | None
    """A copy of the state, if it does not record what steps overwrite."""


class ModelState:
    """The states of all layers of a model, first layer first. Only `load`, `restore`, `rollback` and steps modify it in
    place."""

    def __init__(self, layers: Iterable[MixerState]) -> None:
        self.layers = tuple(layers)
        self._point = _Point()
        self._before: list[_Point] = []  # points that can be rolled back to, oldest first

    @property
    def undo_steps(self) -> int:
        """Number of steps kept for `rollback`; 0 if none (see `LanguageModel.keep_undo`)."""
        undo = self.layers[0].undo
        return 0 if undo is None else len(undo.rows)

    def step_done(self, replayed: bool = False) -> None:
        """Records that a step has updated all layers. `replayed`: by a CUDA graph, which has advanced the position on the GPU
        itself."""
        self._before.append(self._point)
        del self._before[: max(0, len(self._before) - self.undo_steps)]
        self._point = _Point()
        undo = self.layers[0].undo
        if undo is not None and not replayed:
            undo.position.add_(1).remainder_(len(undo.rows))

    @torch.no_grad()
    def load(self, state: ModelState, rows: Tensor | list[int] | None = None) -> None:
        """Copies `state` into this one, in place; earlier steps cannot be rolled back.

        Args:
            state: with the same number of sequences, or one per entry of `rows`.
            rows: its sequence i goes to sequence `rows[i]`, the others stay unchanged; None means all, in order.

        Raises:
            ValueError: `state` has another number of sequences, or belongs to another model.
        """
        places = None if rows is None else torch.as_tensor(rows, device=self.device)
        expected = self.batch_size if places is None else len(places)
        if state.batch_size != expected:
            raise ValueError(f"state: got {state.batch_size} sequences, takes {expected}; use select or place first")
        if len(self) != len(state) or not all(map(_alike, self.layers, state.layers)):
            raise ValueError("state: not from this model; take one from its initial_state or forward")
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
        """Discards the history: earlier steps cannot be rolled back once the tensors have been overwritten."""
        self._before.clear()
        self._point = _Point()

    def rollback(self, steps: int) -> None:
        """Undoes the last `steps` steps, bit for bit, in place.

        Raises:
            ValueError: fewer steps are kept.
        """
        if not 0 <= steps <= len(self._before):
            remedy = "keep more with LanguageModel.keep_undo" if self.undo_steps else "call LanguageModel.keep_undo first"
            raise ValueError(f"steps={steps}: only the last {len(self._before)} steps can be rolled back; {remedy}")
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
        """The current point, for `restore`; includes a copy of the state if it does not record what steps overwrite."""
        return Snapshot(self._point, None if self.undo_steps else self.clone())

    def restore(self, snapshot: Snapshot) -> None:
        """Returns to `snapshot` of this state, bit for bit, in place.

        Raises:
            ValueError: more steps have passed than are kept, the point was rolled back, or it belongs to another state.
        """
        if snapshot.copy is not None:
            self.load(snapshot.copy)
            self._point = snapshot.point
        elif snapshot.point in self._before:
            self.rollback(len(self._before) - self._before.index(snapshot.point))
        elif snapshot.point != self._point:
            raise ValueError(
                f"snapshot: not among the last {len(self._before)} steps that this state keeps; "
                "keep more with LanguageModel.keep_undo, or clone() the state"
            )

    def __repr__(self) -> str:
        """Sizes, not values."""
        lines = "".join(f"\n  ({i}): {layer!r}" for i, layer in enumerate(self.layers, start=1))
        return f"ModelState(batch_size={self.batch_size}, {self.num_bytes:,} bytes on {self.device}){lines}"

    def __iter__(self) -> Iterator[MixerState]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def batch_size(self) -> int:
        """B, number of sequences."""
        return self.layers[0].batch_size

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
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
        """The state detached from the autograd graph."""
        return self.apply(torch.detach)

    def to(self, device: torch.device | str) -> ModelState:
        """The state on another device."""
        return self.apply(lambda tensor: tensor.to(device))

    def select(self, indices: Tensor | list[int]) -> ModelState:
        """A copy of the sequences at `indices`, in that order, repeats allowed: for beams, forks and reordering."""
        rows = torch.as_tensor(indices, device=self.device)
        return self.apply(lambda tensor: tensor[rows])

    def place(self, indices: Tensor | list[int], size: int) -> ModelState:
        """A state of `size` sequences whose sequence `indices[i]` is this state's sequence i; the others are zero."""
        rows = torch.as_tensor(indices, device=self.device)
        return self.apply(lambda tensor: tensor.new_zeros(size, *tensor.shape[1:]).index_copy(0, rows, tensor))

    def reset(self, rows: Tensor) -> ModelState:
        """The state with the sequences where `rows` (bool `[B]`) is True reset to zero."""
        keep = ~rows.to(self.device)
        return self.apply(lambda tensor: tensor.masked_fill(~keep.view(-1, *[1] * (tensor.dim() - 1)), 0))
