"""How the kernels split time: rows of tokens into chunks, and chunks into segments.

A row is a sequence of the batch, or the concatenation of all packed sequences. A chunk of C tokens never crosses a sequence
border. A segment is a run of chunks that one program walks; if a row has several, their initial states are computed first.
Workspaces have one slot per chunk, segment by segment; every segment has the same number of slots, so the last ones of a row
may be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

VARYING = ("num_states", "length", "chunks", "segments", "segment_chunks", "first_segment", "first_slot")
"""Integers Triton must not specialize on: changing them does not recompile."""


@dataclass(frozen=True)
class Layout:
    """The layout of one call."""

    chunk: int
    """C, tokens per chunk: a power of two, at least 16."""
    rows: int
    """B, or 1 for packed sequences."""
    length: int
    """T, tokens per row."""
    chunks: int
    """Chunks per row; for packed sequences an upper bound."""
    segments: int
    """Segments per row."""
    segment_chunks: int
    """Chunks per segment; the last segment of a row may have fewer."""
    table: Tensor | None
    """For packed sequences, int64 `[chunks, 4]`: first token, number of tokens (0 for an unused chunk), the sequence that
    begins with the chunk or -1, the sequence that ends with it or -1."""

    @property
    def packed(self) -> bool:
        """Whether a row holds several sequences."""
        return self.table is not None

    @cached_property
    def slots(self) -> int:
        """Number of slots of a workspace for all chunks."""
        return self.rows * self.segments * self.segment_chunks


def packed_chunks(length: int, sequences: int, chunk: int) -> int:
    """Upper bound of the chunks of `sequences` sequences packed along `length` tokens: full ones, and a partial one for
    each."""
    return length // chunk + min(sequences, length)


def chunk_table(cu_seqlens: Tensor, length: int, chunk: int) -> Tensor:
    """`Layout.table` of packed sequences, computed on the device of `cu_seqlens` `[N + 1]` without synchronizing."""
    borders = cu_seqlens.long()
    starts, lengths = borders[:-1], borders.diff()
    counts = (lengths + chunk - 1).div(chunk, rounding_mode="floor")
    ends = counts.cumsum(0)
    index = torch.arange(packed_chunks(length, len(starts), chunk), device=borders.device)
    sequence = torch.searchsorted(ends, index, right=True)
    there = sequence < len(starts)
    sequence = sequence.clamp(max=len(starts) - 1)
    position = index - (ends - counts)[sequence]
    tokens = (lengths[sequence] - position * chunk).clamp(max=chunk) * there
    first = torch.where(there, starts[sequence] + position * chunk, 0)
    begins = torch.where(there & (position == 0), sequence, -1)
    finishes = torch.where(there & (position == counts[sequence] - 1), sequence, -1)
    return torch.stack((first, tokens, begins, finishes), dim=1)


@triton.jit
def locate(slot, table, length, chunks, segments, segment_chunks, C: tl.constexpr, PACKED: tl.constexpr):
    """The first token (int64) and the number of tokens (0 in an empty slot) of the chunk in a slot."""
    segment = slot // segment_chunks
    row = segment // segments
    chunk = (segment % segments) * segment_chunks + slot % segment_chunks
    return place(row, chunk, table, length, chunks, C, PACKED)


@triton.jit
def place(row, chunk, table, length, chunks, C: tl.constexpr, PACKED: tl.constexpr):
    """The first token (int64) and the number of tokens (0 beyond a row's end) of a row's chunk."""
    if PACKED:
        there = chunk < chunks
        first = tl.load(table + chunk * 4, mask=there, other=0)
        tokens = tl.load(table + chunk * 4 + 1, mask=there, other=0).to(tl.int32)
    else:
        first = row.to(tl.int64) * length + chunk * C
        tokens = tl.maximum(tl.minimum(length - chunk * C, C), 0)
    return first, tokens
