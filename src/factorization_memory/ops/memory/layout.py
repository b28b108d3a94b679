"""How time is cut into chunks for the chunked form, packed sequences too.

Shapes: B sequences, T tokens, H heads, L = B * H lanes, C tokens of a chunk, M memory states, D value width of a head, N packed
sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CHUNK = 64
"""Longest chunk: within it work grows with C, across chunks one state follows another."""
GROUP_TOKENS = 4096
"""Tokens (over all lanes) that a group of chunks aims at: enough for full matrix products, few enough to stay in cache.
Backward keeps one state per group, and recomputes those of one group at a time."""


@dataclass(frozen=True)
class Layout:
    """How time is cut into chunks and groups of chunks, and where sequences begin and end."""

    chunk: int
    group: int
    num_chunks: int
    starts: dict[int, int]
    """Chunk -> sequence that begins with it."""
    ends: dict[int, int]
    """Chunk -> sequence that ends with it."""
    empty: list[int]
    """Sequences of no tokens: their final state is the initial one."""
    lengths: list[int]
    state_shape: tuple[int, int, int, int]
    """`[N, L, M, D]`."""
    dtype: torch.dtype
    """Of rates, states and arithmetic."""

    @classmethod
    def plan(cls, lengths: list[int], state_shape: tuple[int, int, int, int], dtype: torch.dtype) -> Layout:
        """The layout of sequences of `lengths`, one after the other in each lane."""
        _, lanes, num_states, _ = state_shape
        chunk = min(MAX_CHUNK, 1 << (max(max(lengths, default=1), 1) - 1).bit_length())
        # Every sequence fills whole chunks: with many short ones a smaller chunk wastes less than it costs.
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
        # At least 4 M tokens, so that the states kept for backward weigh no more than a quarter of the values.
        group = min(max(GROUP_TOKENS // max(lanes * chunk, 1), 4 * num_states // chunk, 1), max(cursor, 1))
        return cls(chunk, group, cursor, starts, ends, empty, lengths, state_shape, dtype)

    def positions(self, cu_seqlens: list[int]) -> Tensor:
        """For packed sequences: each chunk slot's token, -1 where a sequence's last chunk is not full."""
        slots = [torch.empty(0, dtype=torch.long)]
        for start, length in zip(cu_seqlens, self.lengths, strict=False):
            slots.append(torch.full((-(-length // self.chunk) * self.chunk,), -1))
            slots[-1][:length] = torch.arange(start, start + length)
        return torch.cat(slots)

    def slots(self, x: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
        """The place in x `[B, T, H, W]` of each of `count` chunks from `first` on: views `[B, H, C, W]`, the last one perhaps
        shorter."""
        return x[:, first * self.chunk : (first + count) * self.chunk].transpose(1, 2).split(self.chunk, dim=2)

    def cut(self, x: Tensor, first: int, count: int) -> list[Tensor]:
        """`count` chunks from `first` on of x `[B, T, H, W]`, each `[L, C, W]` in the layout's dtype, a view where that can be,
        zero-filled behind the end."""
        chunks = [slot.to(self.dtype).flatten(0, 1) for slot in self.slots(x, first, count)]
        missing = self.chunk - chunks[-1].shape[1]
        if missing:
            chunks[-1] = torch.nn.functional.pad(chunks[-1], (0, 0, 0, missing))
        return chunks

    def groups(self) -> list[tuple[int, int]]:
        """First chunk and number of chunks of each group."""
        return [(first, min(self.group, self.num_chunks - first)) for first in range(0, self.num_chunks, self.group)]

    def initial_state(self, initial: Tensor | None, buffer: Tensor, chunk: int) -> Tensor:
        """`buffer` `[L, M, D]`, filled with the state that the sequence beginning with `chunk` starts from."""
        return buffer.zero_() if initial is None else buffer.copy_(initial[self.starts[chunk]])


@dataclass(frozen=True)
class Packing:
    """Packed sequences, each moved to chunks of its own.

    Attributes:
        position: each chunk slot's token, 0 where there is none; int64 `[S]`.
        unused: whether there is none, bool `[S, 1, 1]`.
        slot: each token's slot, int64 `[T]`.
    """

    position: Tensor
    unused: Tensor
    slot: Tensor

    @classmethod
    def of(cls, layout: Layout, cu_seqlens: list[int], device: torch.device) -> Packing:
        """Of sequences with these borders."""
        position = layout.positions(cu_seqlens).to(device)
        return cls(position.clamp(min=0), (position < 0)[:, None, None], (position >= 0).nonzero()[:, 0])

    def gather(self, x: Tensor) -> Tensor:
        """x of tokens `[1, T, ...]` in slots `[1, S, ...]`, zero where there is none."""
        # Filled, not multiplied: what stands in another sequence must not come through, not even as inf * 0.
        return x[:, self.position].masked_fill(self.unused, 0)
