"""The dense recurrence in its quadratic form: the operators `factorization_memory::quadratic` and
`factorization_memory::quadratic_backward`.

A sequence that begins with no memory and leaves none needs no states: `y = P v`, P `[T, T]` lower triangular. Chunks give the
blocks on P's diagonal, and Q, K and G as in the other dense form; of two neighbouring runs of chunks the block below the
diagonal is `Q_later K_earlier^T`, Q decayed from the border between them on, K up to it. Runs double in length from level to
level, so that each pair of chunks meets once. A decay between is the product of the G of its own chunks, never a quotient.

That is T (M + D) operations a token where the other form has some 2 M D, and no states go through memory; it pays where M is
large and T is not.

Shapes: B sequences, T tokens, H heads, M memory states, D value width of a head; C tokens of a chunk, n chunks of a sequence,
L = n C, MP the padded number of states, S = B n slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from factorization_memory.ops.precision import wide_product
from factorization_memory.ops.triton.dense import on_device_of
from factorization_memory.ops.triton.gate_gradients import gates_backward
from factorization_memory.ops.triton.gates import gates_forward
from factorization_memory.ops.triton.launcher import launch
from factorization_memory.ops.triton.layout import Layout
from factorization_memory.ops.triton.plan import longest_chunk, operands, padded_states, power_of_two
from factorization_memory.ops.triton.sparse import causal_parts

GROUP_BYTES = 256 * 2**20
"""Bytes of P of the sequences that are computed together, if one's are not more."""
FACTOR_BLOCK, UNSCALE_BLOCK = 128, 32
"""States of a program of `factors_kernel` and of `unscale_kernel`."""


@triton.jit
def factors_kernel(
    total,  # G [S, H, MP]
    factors,  # out [levels, S, H, MP]
    d_factors,  # gradients of `factors`
    d_total,  # out: gradients of `total`
    chunks,
    heads,
    padded,
    LEVELS: tl.constexpr,
    BACKWARD: tl.constexpr,
    BM: tl.constexpr,
):
    """The decay between each chunk and the border at which its run meets its neighbour, at each level; or the way back."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    state = tl.program_id(1) * BM + tl.arange(0, BM)
    there = state < padded
    size = tl.num_programs(0).to(tl.int64) * chunks * padded
    if BACKWARD:
        for chunk in range(chunks):
            tl.store(d_total + ((row * chunks + chunk) * heads + head) * padded + state, tl.zeros([BM], tl.float32), mask=there)
    for level in tl.static_range(LEVELS):
        for chunk in range(chunks):
            run = chunk >> level
            # Of a later run what comes before the chunk in it, of an earlier one what comes after.
            later = run % 2 == 1
            first = tl.where(later, run << level, chunk + 1)
            end = tl.where(later, chunk, tl.minimum((run + 1) << level, chunks))
            here = level * size + ((row * chunks + chunk) * heads + head) * padded + state
            if BACKWARD:
                d_factor = tl.load(d_factors + here, mask=there, other=0)
                for between in range(first, end):
                    others = d_factor
                    for other in range(first, end):
                        g = tl.load(total + ((row * chunks + other) * heads + head) * padded + state, mask=there, other=1)
                        others *= tl.where(other == between, 1.0, g)
                    target = d_total + ((row * chunks + between) * heads + head) * padded + state
                    tl.store(target, tl.load(target, mask=there, other=0) + others, mask=there)
            else:
                factor = tl.full([BM], 1.0, tl.float32)
                for between in range(first, end):
                    factor *= tl.load(total + ((row * chunks + between) * heads + head) * padded + state, mask=there, other=1)
                tl.store(factors + here, factor, mask=there)


@triton.jit
def unscale_kernel(
    d_scaled,  # gradients of Q or K times their factors, of one side of some pairs [rows, H, pairs, count C, MP]
    weights,  # P and Q, or P^T and K, side by side [S, H, C, C + MP]
    factors,  # of the level [S, H, MP]
    d_weights,  # in and out: float32 [S, H, C, MP]
    d_factors,  # out: of the level [S, H, MP]
    first_chunk,
    stride,
    pairs,
    count,
    chunks,
    heads,
    padded,
    C: tl.constexpr,
    BM: tl.constexpr,
):
    """Add a level's gradients of Q or K; and those of the factors of its chunks."""
    program = tl.program_id(0)
    place, pair = program % count, program // count % pairs
    head = program // (count * pairs) % heads
    row = (program // (count * pairs * heads)).to(tl.int64)
    slot = row * chunks + first_chunk + pair * stride + place
    state = tl.program_id(1) * BM + tl.arange(0, BM)
    there = state < padded
    token = tl.arange(0, C)[:, None]
    source = (((row * heads + head) * pairs + pair) * count + place) * C
    mask = there[None, :]
    d = tl.load(d_scaled + (source + token) * padded + state[None, :], mask=mask, other=0).to(tl.float32)
    unit = slot * heads + head
    w = tl.load(weights + (unit * C + token) * (C + padded) + C + state[None, :], mask=mask, other=0).to(tl.float32)
    factor = tl.load(factors + unit * padded + state, mask=there, other=0)
    target = d_weights + (unit * C + token) * padded + state[None, :]
    tl.store(target, tl.load(target, mask=mask, other=0) + d * factor[None, :], mask=mask)
    tl.store(d_factors + unit * padded + state, tl.sum(d * w, 0), mask=there)


@dataclass(frozen=True)
class _Shape:
    rows: int
    chunks: int
    heads: int
    chunk: int
    padded: int

    @property
    def length(self) -> int:
        """L."""
        return self.chunks * self.chunk

    @property
    def levels(self) -> int:
        """Times that runs of chunks meet."""
        return (self.chunks - 1).bit_length()

    def meetings(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Level, first chunk of the first pair, pairs, chunks of an earlier run, chunks of a later run: the whole pairs of a
        level together, and one whose later run is cut short by the end."""
        for level in range(self.levels):
            run = 1 << level
            pairs, rest = divmod(self.chunks, 2 * run)
            if pairs:
                yield level, 0, pairs, run, run
            if rest > run:
                yield level, pairs * 2 * run, 1, run, rest - run


def _side(x: Tensor, start: int, pairs: int, run: int, offset: int, count: int) -> Tensor:
    """Of x `[rows, n, ...]` the chunks of one side of some pairs, `[rows, pairs, count, ...]`."""
    if pairs == 1:
        return x[:, start + offset : start + offset + count][:, None]
    return x[:, start : start + pairs * 2 * run].unflatten(1, (pairs, 2 * run))[:, :, offset : offset + count]


def _scaled(
    weights: Tensor, factors: Tensor, shape: _Shape, start: int, pairs: int, run: int, offset: int, count: int
) -> Tensor:
    """Q or K of one side of some pairs, decayed to the border, `[rows H pairs, count C, MP]`."""
    rows, chunks, heads, chunk, padded = shape.rows, shape.chunks, shape.heads, shape.chunk, shape.padded
    sides = weights.view(rows, chunks, heads, chunk, chunk + padded)[..., chunk:]
    w = _side(sides, start, pairs, run, offset, count).permute(0, 3, 1, 2, 4, 5)
    f = _side(factors.view(rows, chunks, heads, padded), start, pairs, run, offset, count).permute(0, 3, 1, 2, 4)
    out = weights.new_empty(w.shape)
    torch.mul(w, f[..., None, :], out=out)
    return out.view(rows * heads * pairs, count * chunk, padded)


def _block(inner: Tensor, shape: _Shape, start: int, pairs: int, run: int, count: int) -> Tensor:
    """The blocks of P `[rows H, L, L]` where pairs meet, `[rows H, pairs, count C, run C]`, in place."""
    length, chunk = shape.length, shape.chunk
    at = inner.storage_offset() + (start + run) * chunk * length + start * chunk
    step = 2 * run * chunk * (length + 1)
    return inner.as_strided((inner.shape[0], pairs, count * chunk, run * chunk), (length * length, step, length, 1), at)


def _factors(total: Tensor, shape: _Shape) -> Tensor:
    """Decays between chunks and borders, float32 `[levels, slots, H, MP]`."""
    factors = total.new_empty(shape.levels, *total.shape)
    _launch_factors(total, factors, None, None, shape)
    return factors


def _launch_factors(
    total: Tensor, factors: Tensor | None, d_factors: Tensor | None, d_total: Tensor | None, shape: _Shape
) -> None:
    launch(
        factors_kernel, (shape.rows * shape.heads, -(-shape.padded // FACTOR_BLOCK)),
        total, factors, d_factors, d_total, shape.chunks, shape.heads, shape.padded,
        LEVELS=shape.levels, BACKWARD=d_factors is not None, BM=FACTOR_BLOCK, num_warps=4,
    )  # fmt: skip


def _inner(read: Tensor, write: Tensor, factors: Tensor, shape: _Shape) -> Tensor:
    """P of some sequences, `[rows H, L, L]`."""
    rows, chunks, heads, chunk, padded = shape.rows, shape.chunks, shape.heads, shape.chunk, shape.padded
    inner = read.new_zeros(rows * heads, shape.length, shape.length)
    diagonal = inner.view(rows, heads, chunks, chunk, chunks, chunk).diagonal(dim1=2, dim2=4)
    diagonal.copy_(read.view(rows, chunks, heads, chunk, chunk + padded)[..., :chunk].permute(0, 2, 3, 4, 1))
    for level, start, pairs, run, count in shape.meetings():
        later = _scaled(read, factors[level], shape, start, pairs, run, run, count)
        earlier = _scaled(write, factors[level], shape, start, pairs, run, 0, run)
        block = _block(inner, shape, start, pairs, run, count)
        block.copy_(torch.bmm(later, earlier.mT).view(block.shape))
    return inner


def _slots_of(rows: Tensor, length: int) -> Tensor:
    """`[B, T, H, D]` as `[B H, L, D]`, zero where there is no token."""
    missing = length - rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows
    return rows.transpose(1, 2).reshape(-1, length, rows.shape[3])


def _tokens_of(slots: Tensor, shape: torch.Size) -> Tensor:
    """The way back."""
    rows = slots.view(shape[0], shape[2], -1, shape[3]).transpose(1, 2)
    return rows[:, : shape[1]].contiguous()


def _groups(batch: int, shape: _Shape, size: int) -> Iterator[tuple[int, int]]:
    """First sequence and number of sequences that are computed together."""
    count = max(1, GROUP_BYTES // (shape.heads * shape.length * max(shape.length, 2 * shape.padded) * size))
    count = -(-batch // -(-batch // count))
    for first in range(0, batch, count):
        yield first, min(count, batch - first)


def _layout(update: Tensor, value: Tensor) -> tuple[Layout, int]:
    """The cut into chunks, and MP."""
    padded = padded_states(update.shape[3])
    batch, length = (int(size) for size in value.shape[:2])
    dtype = operands(value.dtype, exact=True)[0]
    chunk = min(longest_chunk(padded, dtype, backward=False), power_of_two(length, 16))
    chunks = -(-length // chunk)
    return Layout(chunk, batch, length, chunks, 1, chunks, None), padded


@on_device_of
def _quadratic(update: Tensor, merge: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence without states at the ends.

    Args:
        update: theta, `[B, T, H, M]`.
        merge: phi, likewise.
        value: v, `[B, T, H, D]`.

    Returns:
        y `[B, T, H, D]` in value's dtype; for backward P and Q, P^T and K, `[S, H, C, C + MP]`, and G `[S, H, MP]`.
    """
    dtype, precision = operands(value.dtype, exact=True)
    if value.numel() == 0:
        empty = value.new_empty(0, dtype=dtype)
        return torch.empty_like(value, memory_format=torch.contiguous_format), empty, empty.clone(), value.new_empty(0).float()
    layout, padded = _layout(update, value)
    update, merge = update.contiguous(), merge.contiguous()
    read, write, total = gates_forward(update, merge, layout, padded, dtype, precision)
    whole = _Shape(layout.rows, layout.chunks, value.shape[2], layout.chunk, padded)
    values = _slots_of(value.to(dtype), whole.length)
    output = torch.empty_like(values)
    for first, count in _groups(layout.rows, whole, dtype.itemsize):
        shape = _Shape(count, whole.chunks, whole.heads, whole.chunk, padded)
        slots = slice(first * shape.chunks, (first + count) * shape.chunks)
        inner = _inner(read[slots], write[slots], _factors(total[slots], shape), shape)
        here = slice(first * shape.heads, (first + count) * shape.heads)
        v, y = values[here], output[here]
        for start, end in causal_parts(shape.length):
            torch.bmm(inner[:, start:end, :end], v[:, :end], out=y[:, start:end])
    return _tokens_of(output, value.shape).to(value.dtype), read, write, total


@on_device_of
def _quadratic_backward(
    d_output: Tensor, update: Tensor, merge: Tensor, value: Tensor, read: Tensor, write: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of update, merge and value, given those of the output, and `quadratic`'s arguments and last three results."""
    update, merge = update.contiguous(), merge.contiguous()
    if value.numel() == 0:
        return torch.zeros_like(update), torch.zeros_like(merge), torch.zeros_like(value)
    dtype, precision = operands(value.dtype, exact=True)
    layout, padded = _layout(update, value)
    d_update, d_merge = torch.empty_like(update), torch.empty_like(merge)
    whole = _Shape(layout.rows, layout.chunks, value.shape[2], layout.chunk, padded)
    values, d_outputs = (_slots_of(x.to(dtype), whole.length) for x in (value, d_output))
    d_values = torch.empty_like(values)
    chunk, heads, chunks = whole.chunk, whole.heads, whole.chunks
    for first, count in _groups(layout.rows, whole, dtype.itemsize):
        shape = _Shape(count, chunks, heads, chunk, padded)
        slots = slice(first * chunks, (first + count) * chunks)
        here = slice(first * heads, (first + count) * heads)
        r, w, g = read[slots], write[slots], total[slots]
        factors = _factors(g, shape)
        inner = _inner(r, w, factors, shape)
        v, dy, d_v = values[here], d_outputs[here], d_values[here]
        d_inner = torch.zeros_like(inner)
        for start, end in causal_parts(shape.length):
            torch.bmm(dy[:, start:end], v[:, :end].mT, out=d_inner[:, start:end, :end])
            torch.bmm(inner[:, start:, start:end].mT, dy[:, start:], out=d_v[:, start:end])
        d_read, d_write = (total.new_zeros(count * chunks, heads, chunk, padded) for _ in range(2))
        d_factors = torch.zeros_like(factors)
        for level, start, pairs, run, later_count in shape.meetings():
            d_block = _block(d_inner, shape, start, pairs, run, later_count).reshape(-1, later_count * chunk, run * chunk)
            later = _scaled(r, factors[level], shape, start, pairs, run, run, later_count)
            earlier = _scaled(w, factors[level], shape, start, pairs, run, 0, run)
            sides = (
                (torch.bmm(d_block, earlier), r, d_read, start + run, later_count),
                (torch.bmm(d_block.mT, later), w, d_write, start, run),
            )
            for d_scaled, weights, d_weights, begin, number in sides:
                launch(
                    unscale_kernel, (count * heads * pairs * number, -(-padded // UNSCALE_BLOCK)),
                    d_scaled, weights, factors[level], d_weights, d_factors[level], begin, 2 * run, pairs, number, chunks,
                    heads, padded,
                    C=chunk, BM=UNSCALE_BLOCK, num_warps=4,
                )  # fmt: skip
        d_total = torch.empty_like(g)
        _launch_factors(g, None, d_factors, d_total, shape)
        # The diagonal's blocks once more, in float32: they count most.
        d_diagonal = wide_product(dy.reshape(-1, chunk, dy.shape[2]), v.reshape(-1, chunk, v.shape[2]).mT)
        d_diagonal = d_diagonal.view(count, heads, chunks, chunk, chunk).transpose(1, 2).contiguous().flatten(0, 1)
        gates_backward(
            update,
            merge,
            layout,
            (slots.start, count * chunks),
            d_diagonal,
            d_read,
            d_write,
            d_total,
            d_update,
            d_merge,
            precision,
        )
    return d_update, d_merge, _tokens_of(d_values, value.shape).to(value.dtype)


def _fake_quadratic(update: Tensor, merge: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = operands(value.dtype, exact=True)[0]
    output = torch.empty_like(value, memory_format=torch.contiguous_format)
    if value.numel() == 0:
        return output, value.new_empty(0, dtype=dtype), value.new_empty(0, dtype=dtype), value.new_empty(0, dtype=torch.float32)
    layout, padded = _layout(update, value)
    lead = (layout.slots, value.shape[2])
    side = (*lead, layout.chunk, layout.chunk + padded)
    read, write = (value.new_empty(side, dtype=dtype) for _ in range(2))
    return output, read, write, value.new_empty(*lead, padded, dtype=torch.float32)


def _fake_quadratic_backward(
    d_output: Tensor, update: Tensor, merge: Tensor, value: Tensor, read: Tensor, write: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (update, merge, value)]
    return like[0], like[1], like[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, d_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_output is None:
        return None, None, None
    return torch.ops.factorization_memory.quadratic_backward.default(d_output, *ctx.saved_tensors)


torch.library.define(
    "factorization_memory::quadratic", "(Tensor update, Tensor merge, Tensor value) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(
    "factorization_memory::quadratic_backward",
    "(Tensor d_output, Tensor update, Tensor merge, Tensor value, Tensor read, Tensor write, Tensor total)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("factorization_memory::quadratic", ("cpu", "cuda"), _quadratic)
torch.library.impl("factorization_memory::quadratic_backward", ("cpu", "cuda"), _quadratic_backward)
torch.library.register_fake("factorization_memory::quadratic", _fake_quadratic)
torch.library.register_fake("factorization_memory::quadratic_backward", _fake_quadratic_backward)
torch.library.register_autograd("factorization_memory::quadratic", _backward, setup_context=_setup_context)

quadratic = torch.ops.factorization_memory.quadratic.default
"""The operator; `_quadratic` says what it takes and returns."""
