"""The key-value cache of attention, and the positions of the tokens of a call.

Shapes: B sequences, T tokens, G key and value heads, P head width, C cache entries, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from factorization_memory import ops
from factorization_memory.layers.state import GrowingState


@dataclass(repr=False)
class AttentionState(GrowingState):
    """Key-value cache. The token at position p, counted from 1, is in entry p - 1; with a window of W tokens, in entry (p - 1)
    modulo W, and C is at most W.

    Attributes:
        keys: rotated, `[B, G, C, P]`.
        values: `[B, G, C, P]`.
        positions: position of the token in each entry, int64 `[B, C]`; 0 marks an empty entry.
        length: tokens read, int64 `[B]`.
        most: limit W of C; None if the cache grows without limit.
        room: steps that fit without reading `length`; 0 if unknown.
        undo: always None; steps cannot be undone.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    length: Tensor
    most: int | None = None
    room: int = 0
    undo: None = None

    def apply(self, function: Callable[[Tensor], Tensor]) -> AttentionState:
        """The state with `function` applied to each tensor."""
        keys, values, positions, length = map(function, self.tensors())
        return AttentionState(keys, values, positions, length, self.most)

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the state."""
        return [self.keys, self.values, self.positions, self.length]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.length.shape[0]

    @property
    def capacity(self) -> int:
        """C."""
        return self.positions.shape[1]

    def resized(self, capacity: int) -> AttentionState:
        """The same tokens in a cache of `capacity` entries, at least the current number."""
        more = capacity - self.capacity
        if more == 0:
            return self
        keys, values = (functional.pad(tensor, (0, 0, 0, more)) for tensor in (self.keys, self.values))
        return AttentionState(keys, values, functional.pad(self.positions, (0, more)), self.length, self.most)

    def reserve(self, capacity: int) -> None:
        """Grows the cache to at least `capacity` entries."""
        if capacity > self.capacity:
            larger = self.resized(capacity)
            self.keys, self.values, self.positions = larger.keys, larger.values, larger.positions
        self.room = 0


@dataclass
class Stretch:
    """Positions of the tokens of one call.

    Attributes:
        position: of each token in its sequence, from 1, int64 `[B or 1, T]`.
        count: tokens of each sequence, int64 `[B]` or `[N]`.
        even: whether all sequences are known to have read the same number of tokens before.
        longest: upper bound of the tokens that a sequence has read before.
        most: upper bound of the new tokens of a sequence.
        borders: of packed sequences, int64 `[N + 1]`.
        cuts: `borders` as Python integers, if they can be read without synchronizing.
        sequence: packed sequence of each token, `[T]`.
        padding_mask: bool `[B, T]`.
    """

    position: Tensor
    count: Tensor
    even: bool
    longest: int
    most: int
    borders: Tensor | None = None
    cuts: list[int] | None = None
    sequence: Tensor | None = None
    padding_mask: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether there is neither padding nor packing."""
        return self.borders is None and self.padding_mask is None

    @classmethod
    def of(cls, x: Tensor, state: AttentionState | None, cu_seqlens: Tensor | None, padding_mask: Tensor | None) -> Stretch:
        """Positions of the input x `[B, T, d]`, continuing from `state`."""
        batch, length = x.shape[:2]
        token = torch.arange(length, device=x.device)
        even, longest = True, 0
        if state is not None and torch.compiler.is_compiling():
            even, longest = False, state.capacity  # reading the lengths would break the graph
        elif state is not None and state.batch_size:
            shortest, longest = torch.stack(state.length.aminmax()).tolist()
            even = shortest == longest
        if cu_seqlens is not None:
            borders = cu_seqlens.to(x.device, torch.long)
            sequence = torch.bucketize(token, borders[1:], right=True)
            position = token + 1 - borders[sequence]
            if state is not None:
                position = position + state.length[sequence]
            cuts = None if torch.compiler.is_compiling() else ops.read_borders(cu_seqlens)
            most = length if cuts is None else max(stop - start for start, stop in pairwise(cuts))
            return cls(position[None], borders.diff(), even, longest, most, borders, cuts, sequence)
        if padding_mask is not None:
            position, count = padding_mask.cumsum(1), padding_mask.sum(1)
        else:
            position, count = token[None] + 1, token.new_full((batch,), length)
        if state is not None:
            position = position + state.length[:, None]
        return cls(position, count, even, longest, length, padding_mask=padding_mask)
