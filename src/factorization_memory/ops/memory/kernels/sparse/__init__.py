"""The sparse recurrence on a GPU: the operators `factorization_memory::sparse` and `factorization_memory::sparse_backward`.

Within a slot of up to thousands of tokens the output is `y = P v + Q h`, where P `[L, L]` has an entry per pair of tokens, the
sum over the states that both select. A pair shares K K / M states on average, so P is cheap to compute from the lists of the
states (`lists`, `weights`), whatever the width of values, and the cost of `P v` does not depend on M. A sequence that fits
into one slot and has no initial state needs no state at all, which is where this form saves most; longer ones pass states from
slot to slot, in products as large as the dense form's.

The n-th slots of all sequences form a wave: waves are computed one after the other, the slots of a wave together.

Shapes: B sequences, T tokens, H heads, M memory states, K selected states, D value width per head, N packed sequences; S
slots, L tokens per slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from factorization_memory.ops.arguments import read_borders
from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.memory.kernels.plan import operands
from factorization_memory.ops.memory.kernels.sparse.lists import WORD, Lists, lists_of
from factorization_memory.ops.memory.kernels.sparse.weights import border_weights, inner_weights, weight_gradients
from factorization_memory.ops.precision import wide_product
from factorization_memory.ops.runtime import on_device_of

LONGEST_ALONE = 4096
"""Longest sequence, in tokens, computed as one slot if no state is needed then."""
LONGEST_PASSING = 1024
"""Tokens per slot of sequences that pass states."""
GROUP_BYTES = 256 * 2**20
"""Bytes of float32 P in memory at a time, unless a single slot needs more."""
CAUSAL_PARTS = 4
"""Row blocks of a product with P, each of which skips the columns above the diagonal."""
LIST_DTYPES = (torch.int32, torch.int32, torch.int32, torch.float32, torch.float32, torch.int32)
"""Dtypes of the tensors of `Lists`."""
CAUSAL_LEAST = 512
"""Least tokens per slot for which splitting into row blocks pays."""


@dataclass(frozen=True)
class Cut:
    """The layout of one call in slots."""

    length: int
    """L, a multiple of 32."""
    table: Tensor
    """int64 `[S, 2]`: first token and number of tokens of each slot."""
    waves: list[tuple[slice | Tensor, int]]
    """Slots of each wave, and their number n; they belong to the first n sequences of `order`."""
    order: Tensor | None
    """For packed sequences: their indices, longest first."""
    tokens: Tensor | None
    """For packed sequences: token at each position of each slot, int64 `[S, L]`, -1 for padding."""
    positions: Tensor | None
    """For packed sequences: slot times L plus position of each token, int64 `[T]`."""

    def gather(self, rows: Tensor) -> Tensor:
        """`[B, T, H, D]` to slots `[S H, L, D]`, zero in padding."""
        batch, length, heads, width = rows.shape
        if self.tokens is None:
            missing = len(self.table) // batch * self.length - length
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows
            slots = rows.reshape(-1, self.length, heads, width)
        else:
            slots = rows[0][self.tokens.clamp(min=0)].masked_fill((self.tokens < 0)[..., None, None], 0)
        return slots.transpose(1, 2).reshape(-1, self.length, width)

    def scatter(self, slots: Tensor, shape: torch.Size) -> Tensor:
        """The inverse, to tokens `[B, T, H, D]`."""
        batch, length, heads, width = shape
        rows = slots.view(-1, heads, self.length, width).transpose(1, 2)
        if self.positions is None:
            return rows.reshape(batch, -1, heads, width)[:, :length].contiguous()
        return rows.reshape(-1, heads, width)[self.positions][None]


def slot_length(length: int, alone: bool) -> int:
    """L for sequences of up to `length` tokens; `alone` if they have no initial or final state."""
    longest = LONGEST_ALONE if alone and length <= LONGEST_ALONE else LONGEST_PASSING
    slots = -(-length // longest)
    return -(-length // (slots * WORD)) * WORD


def cut(batch: int, length: int, borders: list[int] | None, alone: bool, device: torch.device) -> Cut:
    """Lays out B rows of T tokens, or packed sequences with these borders."""
    if borders is None:
        # Tensors made while a CUDA graph is captured get their values only on replay.
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        make = _cut_of_rows.__wrapped__ if capturing else _cut_of_rows
        return make(batch, length, slot_length(length, alone), device)
    lengths = [end - start for start, end in pairwise(borders)]
    size = slot_length(max(lengths), alone)
    slots_of = [-(-tokens // size) for tokens in lengths]
    table = [
        (start + slot * size, min(size, tokens - slot * size))
        for start, tokens, slots in zip(borders, lengths, slots_of, strict=False)
        for slot in range(slots)
    ]
    before = torch.tensor([0, *slots_of]).cumsum(0)
    order = sorted(range(len(lengths)), key=lambda sequence: -slots_of[sequence])
    waves: list[tuple[slice | Tensor, int]] = []
    for wave in range(max(slots_of)):
        there = [sequence for sequence in order if slots_of[sequence] > wave]
        waves.append(((before[there] + wave).to(device), len(there)))
    first, count = torch.tensor(table).unbind(1)
    position = torch.arange(size)
    tokens = torch.where(position < count[:, None], first[:, None] + position, -1)
    positions = torch.empty(length, dtype=torch.int64)
    positions[tokens[tokens >= 0]] = torch.arange(tokens.numel()).view_as(tokens)[tokens >= 0]
    table_of_slots, longest_first, tokens, positions = (
        x.to(device, non_blocking=True) for x in (torch.stack((first, count), 1), torch.tensor(order), tokens, positions)
    )
    return Cut(size, table_of_slots, waves, longest_first, tokens, positions)


@lru_cache(maxsize=64)
def _cut_of_rows(batch: int, length: int, size: int, device: torch.device) -> Cut:
    slots = -(-length // size)
    first = torch.arange(slots, device=device) * size
    count = (length - first).clamp(max=size).repeat(batch)
    first = (first + torch.arange(batch, device=device)[:, None] * length).flatten()
    waves: list[tuple[slice | Tensor, int]] = [(slice(wave, None, slots), batch) for wave in range(slots)]
    return Cut(size, torch.stack((first, count), 1), waves, None, None, None)


def causal_parts(length: int) -> list[tuple[int, int]]:
    """Start and end of the row blocks of P."""
    parts = CAUSAL_PARTS if length >= CAUSAL_LEAST else 1
    size = -(-length // (parts * WORD)) * WORD
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _groups(slots: int, heads: int, length: int) -> Iterator[tuple[int, int]]:
    """First slot and number of slots of the groups whose P are in memory together."""
    size = max(1, GROUP_BYTES // (heads * length * length * 4))
    size = -(-slots // -(-slots // size))
    for first in range(0, slots, size):
        yield first, min(size, slots - first)


class _States:
    """Passes states from wave to wave."""

    def __init__(self, cut: Cut, lists: Lists, num_states: int, dtype: torch.dtype) -> None:
        self.cut, self.dtype = cut, dtype
        self.heads = lists.place.shape[1]
        self.read, self.write, self.total = border_weights(lists, num_states, dtype)

    def of(self, weights: Tensor, wave: int) -> Tensor:
        """Q or K `[n H, L, M]`, or G `[n H, M, 1]`, of a wave."""
        slots, count = self.cut.waves[wave]
        return weights[slots].reshape(count * self.heads, *weights.shape[2:])

    def rows(self, slots: Tensor, wave: int) -> Tensor:
        """Values `[S H, L, D]` of a wave, `[n H, L, D]`."""
        return self.of(slots.view(-1, self.heads, *slots.shape[1:]), wave)

    def store(self, target: Tensor, wave: int, x: Tensor) -> None:
        """Writes a wave's x `[n H, ...]` into `target` `[S H, ...]` of all slots."""
        view = target.view(-1, self.heads, *target.shape[1:])
        view[self.cut.waves[wave][0]] = x.view(-1, self.heads, *x.shape[1:]).to(target.dtype)

    def begin(self, state: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Copies states `[N, H, M, D]`, or zeros, to `[N H, M, D]` in the order of the waves."""
        if state is None:
            return like.new_zeros(shape[0] * shape[1], *shape[2:], dtype=torch.float32)
        state = state.float() if self.cut.order is None else state.float()[self.cut.order]
        return state.reshape(-1, *shape[2:]).clone()

    def end(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse, to `[N, H, M, D]`."""
        state = state.view(shape)
        return state if self.cut.order is None else torch.empty_like(state).index_copy_(0, self.cut.order, state)

    def step(self, state: Tensor, values: Tensor, wave: int) -> None:
        """Advances the states over a wave, in place."""
        now = state[: self.cut.waves[wave][1] * self.heads]
        written = wide_product(self.of(self.write, wave).mT, self.rows(values, wave))
        now.mul_(self.of(self.total, wave)[..., None]).add_(written)

    def entered(self, state: Tensor, wave: int) -> Tensor:
        """A copy of the initial states of a wave, in the operand dtype."""
        return state[: self.cut.waves[wave][1] * self.heads].to(self.dtype, copy=True)


def _borders(cu_seqlens: Tensor | None) -> list[int] | None:
    return None if cu_seqlens is None else read_borders(cu_seqlens)


def _keeps_inner(value: Tensor, cu_seqlens: Tensor | None, alone: bool) -> int:
    """L if P is saved for backward, which it is if no larger than values and outputs; otherwise 0."""
    size = slot_length(value.shape[1], alone)
    return size if cu_seqlens is None and size <= 2 * value.shape[3] else 0


def _state_shape(value: Tensor, num_states: int, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    sequences = value.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, value.shape[2], num_states, value.shape[3]


@on_device_of
def _sparse(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    num_states: int,
    keep_final: bool,
) -> tuple[Tensor, ...]:
    """The recurrence.

    Args:
        update: theta, `[B, T, H, K]`.
        merge: phi, same shape.
        value: v, `[B, T, H, D]`.
        indices: the distinct states of each token, int `[B, T, H, K]`.
        initial: h_0, `[B, H, M, D]` (`[N, H, M, D]` with `cu_seqlens`); None means zeros.
        cu_seqlens: `[N + 1]` integers, the borders of packed sequences (B = 1); reading them synchronizes.
        num_states: M.
        keep_final: whether to return the final state.

    Returns:
        y `[B, T, H, D]` in value's dtype; the final state in float32, empty unless requested; and for backward, each empty if
        recomputed there: P `[S, H, L, L]` and the six tensors of `Lists`.
    """
    dtype = operands(value.dtype, exact=True)[0]
    shape = _state_shape(value, num_states, cu_seqlens)
    alone = initial is None and not keep_final
    final = value.new_empty(0, dtype=torch.float32)
    if value.numel() == 0:
        kept = value.new_empty(0, dtype=dtype)
        if keep_final:
            final = value.new_zeros(shape, dtype=torch.float32) if initial is None else initial.float().clone()
        return torch.empty_like(value, memory_format=torch.contiguous_format), final, kept, *_no_lists(value)
    update, merge, indices = update.contiguous(), merge.contiguous(), indices.contiguous()
    made = cut(value.shape[0], value.shape[1], _borders(cu_seqlens), alone, value.device)
    lists = lists_of(update, merge, indices, num_states, made.table, made.length)
    values = made.gather(value.to(dtype))
    slots, heads, length = len(made.table), value.shape[2], made.length
    reads = initial is not None or len(made.waves) > 1
    output = torch.zeros_like(values) if reads else torch.empty_like(values)
    if reads or keep_final:
        passing = _States(made, lists, num_states, dtype)
        state = passing.begin(initial, value, shape)
        for wave in range(len(made.waves)):
            if wave or initial is not None:
                entered = passing.entered(state, wave)
                passing.store(output, wave, torch.bmm(passing.of(passing.read, wave), entered))
            if keep_final or wave + 1 < len(made.waves):
                passing.step(state, values, wave)
        final = passing.end(state, shape) if keep_final else final
    keeps = _keeps_inner(value, cu_seqlens, alone)
    kept = values.new_empty((slots, heads, keeps, keeps) if keeps else 0)
    for first, count in _groups(slots, heads, length):
        inner = inner_weights(lists, indices, num_states, made.table, first, count)
        inner = kept[first : first + count].copy_(inner) if keeps else inner.to(dtype)
        here = slice(first * heads, (first + count) * heads)
        weights, v, y = inner.view(-1, length, length), values[here], output[here]
        for start, end in causal_parts(length):
            _add_product(y[:, start:end], weights[:, start:end, :end], v[:, :end], reads)
    known = _no_lists(value) if cu_seqlens is not None else lists.tensors()
    return made.scatter(output, value.shape).to(value.dtype), final, kept, *known


def _no_lists(value: Tensor) -> tuple[Tensor, ...]:
    """Placeholders for `Lists` if backward recomputes them: for packed sequences, whose slots depend on their borders."""
    return tuple(value.new_empty(0, dtype=dtype) for dtype in LIST_DTYPES)


def _add_product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b."""
    if add:
        out.baddbmm_(a, b)
    else:
        torch.bmm(a, b, out=out)


def _fake_sparse(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    num_states: int,
    keep_final: bool,
) -> tuple[Tensor, ...]:
    final = value.new_empty(_state_shape(value, num_states, cu_seqlens) if keep_final else 0, dtype=torch.float32)
    output = torch.empty_like(value, memory_format=torch.contiguous_format)
    kept: Any = 0
    known = _no_lists(value)
    if value.numel() > 0 and cu_seqlens is None:
        alone = initial is None and not keep_final
        length, heads, chosen = slot_length(value.shape[1], alone), value.shape[2], indices.shape[3]
        slots = value.shape[0] * -(-value.shape[1] // length)
        if _keeps_inner(value, cu_seqlens, alone):
            kept = (slots, heads, length, length)
        states, entries = (slots, heads, num_states), (slots, heads, length * chosen)
        shapes = (states, states, entries, entries, entries, (slots, heads, length, chosen))
        known = tuple(value.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, LIST_DTYPES, strict=True))
    return output, final, value.new_empty(kept, dtype=operands(value.dtype, exact=True)[0]), *known


@on_device_of
def _sparse_backward(
    d_output: Tensor,
    d_final: Tensor | None,
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    num_states: int,
    alone: bool,
    kept: Tensor,
    begin: Tensor,
    count: Tensor,
    origin: Tensor,
    theta: Tensor,
    phi: Tensor,
    place: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of update, merge, value and initial states (empty without), given those of the outputs `[B, T, H, D]` and
    final states (None means zero), and the arguments and last seven results of `sparse`; `alone` as in forward's layout."""
    update, merge, indices = update.contiguous(), merge.contiguous(), indices.contiguous()
    d_update, d_merge = (torch.empty_like(x) if value.numel() > 0 else torch.zeros_like(x) for x in (update, merge))
    shape = _state_shape(value, num_states, cu_seqlens)
    nothing = value.new_empty(0, dtype=torch.float32)
    if value.numel() == 0:
        d_initial = nothing
        if initial is not None:
            d_initial = value.new_zeros(shape, dtype=torch.float32) if d_final is None else d_final.float().clone()
        return d_update, d_merge, torch.zeros_like(value), d_initial
    dtype, precision = operands(value.dtype, exact=True)
    made = cut(value.shape[0], value.shape[1], _borders(cu_seqlens), alone, value.device)
    lists = Lists(begin, count, origin, theta, phi, place)
    if begin.numel() == 0:
        lists = lists_of(update, merge, indices, num_states, made.table, made.length)
    values, d_outputs = made.gather(value.to(dtype)), made.gather(d_output.to(dtype))
    slots, heads, length = len(made.table), value.shape[2], made.length
    reads = initial is not None or len(made.waves) > 1
    writes = d_final is not None or len(made.waves) > 1
    passes = reads or writes
    d_values = torch.zeros_like(values) if writes else torch.empty_like(values)
    d_state, d_read, d_write, d_total = nothing, None, None, None
    if passes:
        passing = _States(made, lists, num_states, dtype)
        d_read, d_write = (x.new_zeros(x.shape, dtype=torch.float32) for x in (passing.read, passing.write))
        d_total = torch.zeros_like(passing.total)
        state = passing.begin(initial, value, shape)
        entered: list[Tensor | None] = []
        for wave in range(len(made.waves)):
            entered.append(passing.entered(state, wave) if wave or initial is not None else None)
            if wave + 1 < len(made.waves):
                passing.step(state, values, wave)
        d_state = passing.begin(d_final, value, shape)
        for wave in reversed(range(len(made.waves))):
            before, gradient = entered[wave], passing.rows(d_outputs, wave)
            d_left = d_state[: made.waves[wave][1] * heads]
            if d_final is not None or wave + 1 < len(made.waves):
                after = d_left.to(dtype)
                passing.store(d_values, wave, torch.bmm(passing.of(passing.write, wave), after))
                v = passing.rows(values, wave)
                passing.store(d_write.flatten(0, 1), wave, wide_product(v, after.mT))
                if before is not None:
                    passing.store(d_total.flatten(0, 1), wave, (before.float() * d_left).sum(-1))
            if before is not None:
                passing.store(d_read.flatten(0, 1), wave, wide_product(gradient, before.mT))
                read = wide_product(passing.of(passing.read, wave).mT, gradient)
                d_left.mul_(passing.of(passing.total, wave)[..., None]).add_(read)
    for first, number in _groups(slots, heads, length):
        here = slice(first * heads, (first + number) * heads)
        inner = kept[first : first + number]
        if kept.numel() == 0:
            inner = inner_weights(lists, indices, num_states, made.table, first, number).to(dtype)
        weights, v, dy, d_v = inner.reshape(-1, length, length), values[here], d_outputs[here], d_values[here]
        d_inner = values.new_empty(number, heads, length, length, dtype=torch.float32)
        for start, end in causal_parts(length):
            d_inner.flatten(0, 1)[:, start:end, :end] = wide_product(dy[:, start:end], v[:, :end].mT)
            _add_product(d_v[:, start:end], weights[:, start:, start:end].mT, dy[:, start:], writes)
        weight_gradients(
            lists,
            num_states,
            made.table,
            first,
            d_inner,
            d_read if reads else None,
            d_write if writes else None,
            d_total,
            d_update,
            d_merge,
            precision,
        )
    d_initial = nothing if initial is None else passing.end(d_state, shape)
    return d_update, d_merge, made.scatter(d_values, value.shape).to(value.dtype), d_initial


def _fake_sparse_backward(
    d_output: Tensor,
    d_final: Tensor | None,
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    num_states: int,
    alone: bool,
    kept: Tensor,
    begin: Tensor,
    count: Tensor,
    origin: Tensor,
    theta: Tensor,
    phi: Tensor,
    place: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (update, merge, value)]
    empty = value.new_empty(0 if initial is None else initial.shape, dtype=torch.float32)
    return like[0], like[1], like[2], empty


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    update, merge, value, indices, initial, cu_seqlens, num_states, keep_final = inputs
    ctx.save_for_backward(update, merge, value, indices, initial, cu_seqlens, *output[2:])
    ctx.num_states, ctx.keep_final = num_states, keep_final
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    update, merge, value, indices, initial, cu_seqlens, *kept = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(value)
    alone = initial is None and not ctx.keep_final
    d_update, d_merge, d_value, d_initial = torch.ops.factorization_memory.sparse_backward.default(
        d_output,
        d_final if ctx.keep_final else None,
        update,
        merge,
        value,
        indices,
        initial,
        cu_seqlens,
        ctx.num_states,
        alone,
        *kept,
    )
    d_start = None if initial is None else d_initial.to(initial.dtype)
    return d_update, d_merge, d_value, None, d_start, None, None, None


torch.library.define(
    "factorization_memory::sparse",
    "(Tensor update, Tensor merge, Tensor value, Tensor indices, Tensor? initial, Tensor? cu_seqlens, int num_states,"
    " bool keep_final) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "factorization_memory::sparse_backward",
    "(Tensor d_output, Tensor? d_final, Tensor update, Tensor merge, Tensor value, Tensor indices, Tensor? initial,"
    " Tensor? cu_seqlens, int num_states, bool alone, Tensor kept, Tensor begin, Tensor count, Tensor origin, Tensor theta,"
    " Tensor phi, Tensor place) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("factorization_memory::sparse", ("cpu", "cuda"), _sparse)
torch.library.impl("factorization_memory::sparse_backward", ("cpu", "cuda"), _sparse_backward)
torch.library.register_fake("factorization_memory::sparse", _fake_sparse)
torch.library.register_fake("factorization_memory::sparse_backward", _fake_sparse_backward)
torch.library.register_autograd("factorization_memory::sparse", _backward, setup_context=_setup_context)

sparse = torch.ops.factorization_memory.sparse.default
"""The operator; see `_sparse` for its arguments and results."""
