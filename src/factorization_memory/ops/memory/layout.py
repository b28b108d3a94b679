"""Splits time into chunks for the chunked form, including packed sequences.

Shapes: B sequences, T tokens, H heads, L = B * H lanes, C tokens per chunk, M memory states, D value width of a head, N packed
sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from factorization_memory.ops.arguments import read_borders
from factorization_memory.ops.precision import state_dtype

MAX_CHUNK = 64
"""Longest chunk: work per token grows with C, while the sequential part shrinks."""
GROUP_TOKENS = 4096
"""Target tokens (over all lanes) of a group of chunks: enough for large matrix products, few enough to stay in cache. One
state per group is saved, and backward recomputes one group at a time."""


@dataclass(frozen=True)
class Layout:
    """The split of time into chunks and groups of chunks, and where sequences begin and end."""

    chunk: int
    group: int
    num_chunks: int
    starts: dict[int, int]
    """First chunk of a sequence -> that sequence."""
    ends: dict[int, int]
    """Last chunk of a sequence -> that sequence."""
    empty: list[int]
    """Empty sequences: their final state is the initial one."""
    lengths: list[int]
    state_shape: tuple[int, int, int, int]
    """`[N, L, M, D]`."""
    dtype: torch.dtype
    """Dtype of rates, states and arithmetic."""

    @classmethod
    def plan(cls, lengths: list[int], state_shape: tuple[int, int, int, int], dtype: torch.dtype) -> Layout:
        """The layout of sequences of `lengths`, concatenated in each lane."""
        _, lanes, num_states, _ = state_shape
        chunk = min(MAX_CHUNK, 1 << (max(max(lengths, default=1), 1) - 1).bit_length())
        # Every sequence is padded to whole chunks: with many short ones, smaller chunks save more padding than they cost.
        while chunk > 1 and sum(-(-length // chunk) for length in lengths) * chunk > 1.5 * sum(lengths):
            chunk //= 2
        starts, ends, empty, cursor = {}, {}, [], 0
        for sequence, length in enumerate(lengths):
            if length == 0:
                empty.append(sequence)
                continue
            starts[cursor] = sequence
            cursor += -(-length // chunk)
            ends[cursor - 1] = sequence
        # At least 4 M tokens, so that the states saved for backward take at most a quarter of the values' memory.
        group = min(max(GROUP_TOKENS // max(lanes * chunk, 1), 4 * num_states // chunk, 1), max(cursor, 1))
        return cls(chunk, group, cursor, starts, ends, empty, lengths, state_shape, dtype)

    def positions(self, cu_seqlens: list[int]) -> Tensor:
        """For packed sequences: the token at each position of the chunks, -1 for the padding of a last chunk."""
        slots = [torch.empty(0, dtype=torch.long)]
        for start, length in zip(cu_seqlens, self.lengths, strict=False):
            slots.append(torch.full((-(-length // self.chunk) * self.chunk,), -1))
            slots[-1][:length] = torch.arange(start, start + length)
        return torch.cat(slots)

    def slots(self, x: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
        """Views `[B, H, C, W]` of x `[B, T, H, W]`, one for each of `count` chunks from `first` on; the last may be
        shorter."""
        return x[:, first * self.chunk : (first + count) * self.chunk].transpose(1, 2).split(self.chunk, dim=2)

    def cut(self, x: Tensor, first: int, count: int) -> list[Tensor]:
        """`count` chunks from `first` on of x `[B, T, H, W]`, each `[L, C, W]` in the layout's dtype, zero-padded at the end,
        a view where possible."""
        chunks = [slot.to(self.dtype).flatten(0, 1) for slot in self.slots(x, first, count)]
        missing = self.chunk - chunks[-1].shape[1]
        if missing:
            chunks[-1] = torch.nn.functional.pad(chunks[-1], (0, 0, 0, missing))
        return chunks

    def groups(self) -> list[tuple[int, int]]:
        """First chunk and number of chunks of each group."""
        return [(first, min(self.group, self.num_chunks - first)) for first in range(0, self.num_chunks, self.group)]

    def initial_state(self, initial: Tensor | None, buffer: Tensor, chunk: int) -> Tensor:
        """Fills `buffer` `[L, M, D]` with the initial state of the sequence that begins with `chunk`."""
        return buffer.zero_() if initial is None else buffer.copy_(initial[self.starts[chunk]])


@dataclass(frozen=True)
class Packing:
    """Packed sequences, each padded to whole chunks. S = positions in all chunks.

    Attributes:
        position: the token at each position of the chunks, 0 for padding; int64 `[S]`.
        unused: whether a position is padding, bool `[S, 1, 1]`.
        slot: position of each token in the chunks, int64 `[T]`.
    """

    position: Tensor
    unused: Tensor
    slot: Tensor

    @classmethod
    def of(cls, layout: Layout, cu_seqlens: list[int], device: torch.device) -> Packing:
        """Packs sequences with these borders."""
        position = layout.positions(cu_seqlens).to(device)
        return cls(position.clamp(min=0), (position < 0)[:, None, None], (position >= 0).nonzero()[:, 0])

    def gather(self, x: Tensor) -> Tensor:
        """Moves x of tokens `[1, T, ...]` to chunks `[1, S, ...]`, zero in padding."""
        # Filled, not multiplied: inf in another sequence must not leak in as inf * 0.
        return x[:, self.position].masked_fill(self.unused, 0)


def lay_out(
    update: Tensor, value: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Layout, Packing | None, Tensor | None]:
    """The layout of arguments of `chunked.forward`, the packing of packed sequences, and the initial states `[N, L, M, D]`."""
    batch, length, heads, num_states = update.shape
    value_size, packing = value.shape[-1], None
    if cu_seqlens is None:
        lengths, shape = [length], (1, batch * heads, num_states, value_size)
        layout = Layout.plan(lengths, shape, state_dtype(value))
    else:
        borders = read_borders(cu_seqlens)
        lengths = [stop - start for start, stop in pairwise(borders)]
        shape = (len(lengths), heads, num_states, value_size)
        layout = Layout.plan(lengths, shape, state_dtype(value))
        packing = Packing.of(layout, borders, value.device)
    return layout, packing, None if state is None else state.to(layout.dtype).reshape(shape)
