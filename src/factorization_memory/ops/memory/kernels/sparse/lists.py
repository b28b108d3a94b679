"""Lists of the tokens that select each memory state, in order of time, from which a sparse memory is computed.

Time is split into slots of L tokens (the last of a sequence may have fewer). In each slot and head, an entry is one state
selected by one token, so there are at most L K of them; the list of a state is a run of entries, and all lists are
concatenated. Each token selects a state at most once, so one bit per token and state suffices: the index of an entry follows
from counting bits. There is no sort, and the atomic operation on bits gives the same result in any order.

Shapes: S slots, L tokens per slot, H heads, M memory states, K selected states; W = L / 32 words of bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorization_memory.ops.runtime.launcher import launch

WORD = 32
"""Tokens per word of bits."""
ENTRIES = 1024
"""Entries per program."""
COUNTED = 128
"""States per program of `count_kernel`."""


@dataclass(frozen=True)
class Lists:
    """The lists of all states."""

    begin: Tensor
    """int32 `[S, H, M]`: each state's first entry."""
    count: Tensor
    """int32 `[S, H, M]`: each state's number of entries."""
    origin: Tensor
    """int32 `[S, H, L K]`: an entry's position in the slot, times K, plus its index among the token's selected states."""
    update: Tensor
    """theta of each entry, float32 `[S, H, L K]`."""
    merge: Tensor
    """phi of each entry, same."""
    place: Tensor
    """int32 `[S, H, L, K]`: the entry of each token's selected state."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return self.begin, self.count, self.origin, self.update, self.merge, self.place


@triton.jit
def _count_bits(word):
    """Number of bits set in a uint32 word."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _entry(table, program, heads, L: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """For a program's entries: slot and head, position, index among the selected states, mask, and offset in
    `[tokens, H, K]`."""
    unit = program // tl.cdiv(L * K, BLOCK)
    entry = (program % tl.cdiv(L * K, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    slot, head = unit // heads, unit % heads
    position, choice = entry // K, entry % K
    there = position < tl.load(table + slot * 2 + 1)
    token = tl.load(table + slot * 2) + position
    return unit.to(tl.int64), position, choice, there, (token * heads + head) * K + choice


@triton.jit
def mark_kernel(
    indices,  # [tokens, H, K]
    bits,  # out, zero-initialised: int32 [S, H, W, M]
    table,  # int64 [S, 2]: first token and number of tokens
    heads,
    num_states,
    L: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets the bit of each (token, selected state)."""
    unit, position, _, there, source = _entry(table, tl.program_id(0), heads, L, K, BLOCK)
    state = tl.load(indices + source, mask=there, other=0).to(tl.int32)
    word = (unit * (L // 32) + position // 32) * num_states + state
    tl.atomic_or(bits + word, (1 << (position % 32)).to(tl.int32), mask=there, sem="relaxed")


@triton.jit
def count_kernel(
    bits,  # int32 [S, H, W, M]
    before,  # out: number of a state's entries in earlier words, int32 [S, H, W, M]
    count,  # out: int32 [S, H, M]
    num_states,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the entries of each state, in all and before each word of its bits."""
    unit = tl.program_id(0).to(tl.int64)
    state = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = state < num_states
    found = tl.zeros([BLOCK], tl.int32)
    for word in range(WORDS):
        at = (unit * WORDS + word) * num_states + state
        tl.store(before + at, found, mask=there)
        found += _count_bits(tl.load(bits + at, mask=there, other=0).to(tl.uint32))
    tl.store(count + unit * num_states + state, found, mask=there)


@triton.jit
def begin_kernel(
    count,  # int32 [S, H, M]
    begin,  # out: number of entries of all lower states, int32 [S, H, M]
    num_states,
    PADDED: tl.constexpr,
):
    """Place of the first entry of each state: an exclusive sum of the counts."""
    state = tl.arange(0, PADDED)
    there = state < num_states
    at = tl.program_id(0).to(tl.int64) * num_states + state
    found = tl.load(count + at, mask=there, other=0)
    tl.store(begin + at, tl.cumsum(found, 0) - found, mask=there)


@triton.jit
def fill_kernel(
    indices,  # [tokens, H, K]
    update,  # theta [tokens, H, K]
    merge,  # phi [tokens, H, K]
    bits,  # int32 [S, H, W, M]
    before,  # int32 [S, H, W, M]
    begin,  # int32 [S, H, M]
    origin_out,  # out: int32 [S, H, L K]
    update_out,  # out: theta by entry, float32 [S, H, L K]
    merge_out,  # out: phi by entry, float32 [S, H, L K]
    place_out,  # out: int32 [S, H, L, K]
    table,  # int64 [S, 2]
    heads,
    num_states,
    L: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes each entry to its place in the list of its state."""
    unit, position, choice, there, source = _entry(table, tl.program_id(0), heads, L, K, BLOCK)
    state = tl.load(indices + source, mask=there, other=0).to(tl.int32)
    word = (unit * (L // 32) + position // 32) * num_states + state
    earlier = tl.load(bits + word, mask=there, other=0).to(tl.uint32) & ((1 << (position % 32)).to(tl.uint32) - 1)
    entry = tl.load(begin + unit * num_states + state, mask=there, other=0)
    entry += tl.load(before + word, mask=there, other=0) + _count_bits(earlier)
    # Entries of missing tokens come last in the lists and are written too, so that results are deterministic.
    place = position * K + choice
    entry = tl.where(there, entry, place)
    target = unit * L * K + entry
    inside = position < L
    tl.store(origin_out + target, place, mask=inside)
    tl.store(update_out + target, tl.load(update + source, mask=there, other=0).to(tl.float32), mask=inside)
    tl.store(merge_out + target, tl.load(merge + source, mask=there, other=0).to(tl.float32), mask=inside)
    tl.store(place_out + unit * L * K + place, entry, mask=inside)


def lists_of(update: Tensor, merge: Tensor, indices: Tensor, num_states: int, table: Tensor, length: int) -> Lists:
    """The lists of all slots.

    Args:
        update: theta, contiguous `[B, T, H, K]`.
        merge: phi, same.
        indices: the distinct states of each token, int, contiguous `[B, T, H, K]`.
        num_states: M.
        table: int64 `[S, 2]`: first token of each slot, in the order of `[B, T]`, and number of tokens, at most L.
        length: L, a multiple of 32.
    """
    heads, chosen = indices.shape[2:]
    slots, words = len(table), length // WORD
    bits = torch.zeros(slots, heads, words, num_states, dtype=torch.int32, device=indices.device)
    before = torch.empty_like(bits)
    count = bits.new_empty(slots, heads, num_states)
    sizes = {"L": length, "K": chosen, "BLOCK": ENTRIES, "num_warps": 4}
    programs = (slots * heads * -(-length * chosen // ENTRIES),)
    launch(mark_kernel, programs, indices, bits, table, heads, num_states, **sizes)
    launch(
        count_kernel,
        (slots * heads, -(-num_states // COUNTED)),
        bits,
        before,
        count,
        num_states,
        WORDS=words,
        BLOCK=COUNTED,
        num_warps=4,
    )
    begin = torch.empty_like(count)
    launch(begin_kernel, (slots * heads,), count, begin, num_states, PADDED=triton.next_power_of_2(num_states), num_warps=4)
    origin = bits.new_empty(slots, heads, length * chosen)
    theta, phi = (torch.empty_like(origin, dtype=torch.float32) for _ in range(2))
    place = bits.new_empty(slots, heads, length, chosen)
    launch(
        fill_kernel,
        programs,
        indices,
        update,
        merge,
        bits,
        before,
        begin,
        origin,
        theta,
        phi,
        place,
        table,
        heads,
        num_states,
        **sizes,
    )
    return Lists(begin, count, origin, theta, phi, place)
