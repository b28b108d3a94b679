"""In-place steps of one or a few tokens, for decoding: the operators `factorization_memory::step` and
`factorization_memory::undo`.

A step reads and writes little more than the states it touches: all M in the dense form, K in the sparse one. It can save them
to a ring before overwriting them, for a bit-exact undo.

Shapes: B sequences, T tokens of each, H heads, M memory states, K states that a token updates (M in the dense form), R that it
merges if different, D value width per head; S slots of a pooled state.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from factorization_memory.ops.memory.kernels.plan import power_of_two
from factorization_memory.ops.runtime import on_device_of
from factorization_memory.ops.runtime.launcher import dependent, launch

TILE = 4096
"""Elements of a tile of states."""
WIDEST = 512
"""Most columns of a tile."""
NARROWEST = 32
"""Least columns of a tile, unless the state is narrower: 128 bytes."""
PROGRAMS = 2
"""Target programs per multiprocessor."""


def check_shapes(shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]], first: str, of: Tensor) -> None:
    """Raises ValueError for a tensor whose shape differs from the one given, which a kernel would access out of bounds;
    `first` names the tensor `of` that determines the shapes."""
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, takes {shape} with {first} {tuple(of.shape)}")


@triton.jit
def step_kernel(
    update,  # theta [B, T, H, K]
    merge,  # phi [B, T, H, K], or [B, T, H, R] with `merge_indices`
    value,  # v [B, T, H, D], token stride `value_row`
    state,  # in and out: h [S, H, M, D]
    indices,  # [B, T, H, K]
    merge_indices,  # [B, T, H, R]
    places,  # slot of each sequence in `state` [B]; -1 marks a padding row
    undo,  # out: ring of overwritten states [depth, B, T, H, K, D]
    position,  # ring entry to write [1]
    seed,  # of stochastic rounding, int64 [1]
    output,  # out: partial sums of y [splits, B, T, H, D]
    batch,
    tokens,
    heads,
    num_states,
    chosen,  # K
    merged_states,  # R
    width,  # D
    split_rows,
    value_row,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    SPARSE: tl.constexpr,
    APART: tl.constexpr,  # whether merged and updated states differ; a program then has all rows
    HAS_PLACES: tl.constexpr,
    HAS_UNDO: tl.constexpr,
    ROUNDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The tokens of one sequence and head, one after the other, for a block of columns and a split of the rows."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.cdiv(width, BD)
    column = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    unit = tl.program_id(0) // blocks
    sequence, head = (unit // heads).to(tl.int64), unit % heads
    there = column < width
    split = tl.program_id(1)
    slot = sequence
    if HAS_PLACES:
        slot = tl.load(places + sequence).to(tl.int64)
    memory = state + (slot * heads + head) * num_states * width
    first, end = split * split_rows, tl.minimum((split + 1) * split_rows, chosen)
    for t in range(tokens):
        token = (sequence * tokens + t) * heads + head
        merged = tl.zeros([BD], tl.float32)
        if slot >= 0:
            v = tl.load(
                value + (sequence * tokens + t) * value_row + head * width + column, mask=there, other=0, cache_modifier=".cg"
            ).to(tl.float32)
            for start in range(first, end, ROWS):
                row = start + tl.arange(0, ROWS)
                real = row < end
                theta = tl.load(update + token * chosen + row, mask=real, other=0, cache_modifier=".cg").to(tl.float32)
                chosen_state = row.to(tl.int64)
                if SPARSE:
                    chosen_state = tl.load(indices + token * chosen + row, mask=real, other=0, cache_modifier=".cg").to(
                        tl.int64
                    )
                at = chosen_state[:, None] * width + column[None, :]
                both = real[:, None] & there[None, :]
                held = tl.load(memory + at, mask=both, other=0, cache_modifier=".cg")
                if HAS_UNDO:
                    entry = tl.load(position, cache_modifier=".cg").to(tl.int64) * batch * tokens * heads
                    aside = ((entry + token) * chosen + row[:, None]) * width + column[None, :]
                    tl.store(undo + aside, held, mask=both)
                new = held.to(tl.float32) * (1 - theta[:, None]) + theta[:, None] * v[None, :]
                if ROUNDS:
                    # Stochastic rounding to one of the two nearest bfloat16 numbers: exact on average.
                    number = ((token * chosen + row[:, None]) * width + column[None, :]).to(tl.int32)
                    noise = tl.randint(tl.load(seed), number).to(tl.uint32, bitcast=True) >> 16
                    bits = (new.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
                    rounded = bits.to(tl.float32, bitcast=True)
                    new = tl.where(tl.abs(new) < float("inf"), rounded, new)
                tl.store(memory + at, new.to(state.dtype.element_ty), mask=both)
                if not APART:
                    phi = tl.load(merge + token * chosen + row, mask=real, other=0, cache_modifier=".cg").to(tl.float32)
                    merged += tl.sum(tl.where(real[:, None], phi[:, None] * new, 0.0), 0)
            if APART:
                tl.debug_barrier()  # merged states may just have been written
                for start in range(0, merged_states, ROWS):
                    row = start + tl.arange(0, ROWS)
                    real = row < merged_states
                    at = token * merged_states + row
                    phi = tl.load(merge + at, mask=real, other=0, cache_modifier=".cg").to(tl.float32)
                    read = tl.load(merge_indices + at, mask=real, other=0, cache_modifier=".cg").to(tl.int64)
                    both = real[:, None] & there[None, :]
                    held = tl.load(
                        memory + read[:, None] * width + column[None, :], mask=both, other=0, cache_modifier=".cg"
                    ).to(tl.float32)
                    merged += tl.sum(tl.where(real[:, None], phi[:, None] * held, 0.0), 0)
        target = (split.to(tl.int64) * batch * tokens * heads + token) * width + column
        tl.store(output + target, merged.to(output.dtype.element_ty), mask=there)
        tl.debug_barrier()  # the next token may read what this one wrote


@triton.jit
def undo_kernel(
    state,  # in and out: h [S, H, M, D]
    undo,  # ring of overwritten states [depth, B, T, H, K, D]
    indices,  # their indices [depth, B, T, H, K]
    places,  # slot of each sequence in `state` [B]; -1 marks a padding row
    position,  # ring entry after the last one written [1]
    count,  # steps to undo
    depth,
    batch,
    tokens,
    heads,
    num_states,
    chosen,  # K
    width,  # D
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    SPARSE: tl.constexpr,
    HAS_PLACES: tl.constexpr,
):
    """Copies the overwritten rows back, the latest step first, for one sequence, head and block of columns."""
    blocks = tl.cdiv(width, BD)
    column = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    unit = tl.program_id(0) // blocks
    sequence, head = (unit // heads).to(tl.int64), unit % heads
    there = column < width
    slot = sequence
    if HAS_PLACES:
        slot = tl.load(places + sequence).to(tl.int64)
    if slot >= 0:
        memory = state + (slot * heads + head) * num_states * width
        last = tl.load(position).to(tl.int64) + depth - 1
        for back in range(count):
            entry = (last - back) % depth
            for reverse in range(tokens):
                token = ((entry * batch + sequence) * tokens + tokens - 1 - reverse) * heads + head
                for start in range(0, chosen, ROWS):
                    row = start + tl.arange(0, ROWS)
                    real = row < chosen
                    chosen_state = row.to(tl.int64)
                    if SPARSE:
                        chosen_state = tl.load(indices + token * chosen + row, mask=real, other=0).to(tl.int64)
                    both = real[:, None] & there[None, :]
                    aside = (token * chosen + row[:, None]) * width + column[None, :]
                    held = tl.load(undo + aside, mask=both, other=0)
                    tl.store(memory + chosen_state[:, None] * width + column[None, :], held, mask=both)
                tl.debug_barrier()


@triton.jit
def _rate(logits, bias, at, mask, HAS_BIAS: tl.constexpr):
    """Sigmoid of the logits at `at` plus their bias."""
    x = tl.load(logits + at, mask=mask, other=0, cache_modifier=".cg").to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + at, mask=mask, other=0).to(tl.float32)
    return tl.sigmoid(x)


@triton.jit
def dense_step_kernel(
    affinity,  # logits a [B, H, M], sequence stride `logits_row`
    update,  # logits e [B, H, R], same stride
    merge,  # logits m [B, H, R], same stride
    rate_bias,  # added to e and m [2, H, R]
    value,  # v [B, H, D], sequence stride `value_row`
    state,  # in and out: h [B, H, M, D]
    undo,  # out: ring of overwritten states [depth, B, H, M, D]
    position,  # ring entry to write [1]
    output,  # out: partial sums of y [splits, B, H, D]
    batch,
    temperature,
    width,  # D
    split_rows,
    logits_row,
    value_row,
    HEADS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    RATES: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_UNDO: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`step_kernel` for one token in the dense form, from logits: each program computes the softmax itself."""
    blocks = tl.cdiv(width, BD)
    column = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    unit = tl.program_id(0).to(tl.int64) // blocks
    sequence, head = unit // HEADS, unit % HEADS
    there = column < width
    split = tl.program_id(1)
    memory = state + unit * STATES * width
    first, end = split * split_rows, tl.minimum((split + 1) * split_rows, STATES)
    # Load the first tile during the softmax, and each next one while the current one is computed.
    row = first + tl.arange(0, ROWS)
    both = (row < end)[:, None] & there[None, :]
    held = tl.load(memory + row[:, None] * width + column[None, :], mask=both, other=0, cache_modifier=".cg")
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    affinity += sequence * logits_row + head * STATES
    update += sequence * logits_row
    merge += sequence * logits_row
    v = tl.load(value + sequence * value_row + head * width + column, mask=there, other=0, cache_modifier=".cg").to(tl.float32)
    every = tl.arange(0, PADDED)
    all_logits = tl.load(affinity + every, mask=every < STATES, other=-float("inf"), cache_modifier=".cg").to(tl.float32)
    all_logits /= temperature
    top = tl.max(all_logits, 0)
    total = tl.sum(tl.exp(all_logits - top), 0)
    merged = tl.zeros([ROWS, BD], tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < end
        logits = tl.load(affinity + row, mask=real, other=-float("inf"), cache_modifier=".cg").to(tl.float32) / temperature
        share = tl.exp(logits - top) / total
        rate = head * RATES + tl.minimum(row, RATES - 1)
        theta = share * _rate(update, rate_bias, rate, real, HAS_BIAS)
        phi = share * _rate(merge, rate_bias + HEADS * RATES if HAS_BIAS else rate_bias, rate, real, HAS_BIAS)
        at = row[:, None] * width + column[None, :]
        both = (row + ROWS < end)[:, None] & there[None, :]
        after = tl.load(memory + ROWS * width + at, mask=both, other=0, cache_modifier=".cg")
        both = real[:, None] & there[None, :]
        if HAS_UNDO:
            entry = tl.load(position, cache_modifier=".cg").to(tl.int64) * batch * HEADS
            tl.store(undo + (entry + unit) * STATES * width + at, held, mask=both)
        new = held * (1 - theta[:, None]) + theta[:, None] * v[None, :]
        tl.store(memory + at, new, mask=both)
        merged += phi[:, None] * new
        held = after
    target = (split.to(tl.int64) * batch * HEADS + unit) * width + column
    tl.store(output + target, tl.sum(merged, 0), mask=there)


@on_device_of
def dense_step(
    affinity: Tensor,
    update: Tensor,
    merge: Tensor,
    rate_bias: Tensor | None,
    temperature: float,
    value: Tensor,
    state: Tensor,
    undo: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    """One token of each sequence in the dense form, with its routing; `state` is updated in place. Not differentiable.

    The previously launched kernel must not write `state`, which may be read while it still runs.

    Args:
        affinity: logits `[B, H, M]`; the batch may be strided, equally for all three logits.
        update: logits of the update rates, `[B, H, R]`; R is M or 1.
        merge: logits of the merge rates, same shape.
        rate_bias: added to the logits of the update and the merge rates, contiguous `[2 * H * R]`; None for no bias.
        temperature: divides the affinity logits.
        value: v, `[B, H, D]`; the batch may be strided.
        state: h, contiguous float32 `[B, H, M, D]`.
        undo: ring that receives the overwritten states, contiguous `[depth, B, H, M, D]`.
        position: int `[1]`, ring entry to write.

    Returns:
        y, float32 `[B, H, D]`.
    """
    batch, heads, states, width = state.shape
    rates, depth = update.shape[-1], 0 if undo is None else len(undo)
    shapes = {
        "affinity": (affinity, (batch, heads, states)),
        "update": (update, (batch, heads, rates)),
        "merge": (merge, (batch, heads, rates)),
        "value": (value, (batch, heads, width)),
        "rate_bias": (rate_bias, (2 * heads * rates,)),
        "undo": (undo, (depth, *state.shape)),
    }
    check_shapes(shapes, "state", state)
    assert affinity.stride(0) == update.stride(0) == merge.stride(0), "they are parts of one tensor"
    if batch == 0:
        return state.new_empty(batch, heads, width)
    columns, rows, splits = _tiles(batch * heads, states, width, value.device)
    rows = max(1, rows // 2)  # two tiles are on chip at once
    parts = state.new_empty(splits, batch, heads, width)
    launch(
        dense_step_kernel,
        (batch * heads * -(-width // columns), splits),
        affinity,
        update,
        merge,
        rate_bias,
        value,
        state,
        undo,
        position,
        parts,
        batch,
        float(temperature),
        width,
        -(-states // (splits * rows)) * rows,
        affinity.stride(0),
        value.stride(0),
        HEADS=heads,
        STATES=states,
        PADDED=power_of_two(states, 16),
        RATES=update.shape[2],
        ROWS=rows,
        BD=columns,
        HAS_BIAS=rate_bias is not None,
        HAS_UNDO=undo is not None,
        num_warps=4,
        **dependent(early=True),
    )
    return parts[0] if splits == 1 else parts.sum(0)


@lru_cache(maxsize=256)
def _tiles(units: int, rows: int, width: int, device: torch.device) -> tuple[int, int, int]:
    """Columns and rows of a tile, and number of splits of the rows, such that programs fill the GPU."""
    wanted = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    columns = min(WIDEST, power_of_two(width, 16))
    while columns > NARROWEST and units * -(-width // columns) < wanted:
        columns //= 2
    high = min(power_of_two(max(rows, 1), 1), TILE // columns)
    programs = units * -(-width // columns)
    splits = max(1, min(-(-rows // high), wanted // programs))
    return columns, high, splits


@on_device_of
def _step(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    state: Tensor,
    indices: Tensor | None,
    merge_indices: Tensor | None,
    places: Tensor | None,
    undo: Tensor | None,
    position: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """A few tokens of each sequence; `state` is updated in place.

    Args:
        update: theta, `[B, T, H, K]`.
        merge: phi, same shape, or `[B, T, H, R]` with `merge_indices`.
        value: v, `[B, T, H, D]`.
        state: h, contiguous `[S, H, M, D]`, float32 or bfloat16.
        indices: the distinct states that each token updates, int `[B, T, H, K]`; None means the dense form.
        merge_indices: the distinct states that it merges, int `[B, T, H, R]`; None means those that it updates.
        places: slot of each sequence in `state`, int `[B]`; -1 marks a padding row (output 0). None means b for sequence b.
        undo: ring that receives the overwritten states, contiguous `[depth, B, T, H, K, D]` in state's dtype.
        position: int `[1]`, ring entry to write.
        seed: int64 `[1]`, seed of stochastic rounding to a bfloat16 state.

    Returns:
        y `[B, T, H, D]` in value's dtype.
    """
    update, merge = update.contiguous(), merge.contiguous()
    indices, merge_indices, places = (None if x is None else x.contiguous() for x in (indices, merge_indices, places))
    batch, tokens, heads, chosen = update.shape
    num_states, width = state.shape[2:]
    lead, depth = (batch, tokens, heads), 0 if undo is None else len(undo)
    shapes = {
        "state": (state, (batch if places is None else len(state), heads, num_states, width)),
        "value": (value, (*lead, width)),
        "merge": (merge, (*lead, merge.shape[-1])),
        "indices": (indices, (*lead, chosen)),
        "merge_indices": (merge_indices, merge.shape),
        "places": (places, (batch,)),
        "undo": (undo, (depth, *lead, chosen, width)),
    }
    check_shapes(shapes, "update", update)
    if tokens > 1 or value.stride(3) != 1 or (heads > 1 and value.stride(2) != width):
        value = value.contiguous()
    output = torch.empty_like(value, memory_format=torch.contiguous_format)
    if value.numel() == 0:
        return output
    columns, rows, splits = _tiles(batch * heads, chosen, width, value.device)
    if merge_indices is not None or (tokens > 1 and indices is not None):
        splits = 1  # one program might read what another writes: to merge it, or for the next token
    parts = output if splits == 1 else value.new_empty(splits, *value.shape, dtype=torch.float32)
    split_rows = -(-chosen // (splits * rows)) * rows
    value_row = value.stride(1) if tokens > 1 else value.stride(0)
    launch(
        step_kernel,
        (batch * heads * -(-width // columns), splits),
        update,
        merge,
        value,
        state,
        indices,
        merge_indices,
        places,
        undo,
        position,
        seed,
        parts,
        batch,
        tokens,
        heads,
        num_states,
        chosen,
        merge.shape[3],
        width,
        split_rows,
        value_row,
        ROWS=rows,
        BD=columns,
        SPARSE=indices is not None,
        APART=merge_indices is not None,
        HAS_PLACES=places is not None,
        HAS_UNDO=undo is not None,
        ROUNDS=seed is not None,
        num_warps=4,
        **dependent(early=True),
    )
    return output if splits == 1 else parts.sum(0).to(value.dtype)


def _fake_step(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    state: Tensor,
    indices: Tensor | None,
    merge_indices: Tensor | None,
    places: Tensor | None,
    undo: Tensor | None,
    position: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@on_device_of
def _undo(state: Tensor, undo: Tensor, indices: Tensor | None, places: Tensor | None, position: Tensor, count: int) -> None:
    """Undoes the last `count` steps, latest first.

    Args:
        state: h, contiguous `[S, H, M, D]`, updated in place.
        undo: ring of overwritten states, contiguous `[depth, B, T, H, K, D]`.
        indices: their indices, contiguous int `[depth, B, T, H, K]`; None for dense steps.
        places: those of the steps.
        position: int `[1]`, ring entry of the next step.
        count: at most depth.
    """
    depth, batch, tokens, heads, chosen, width = undo.shape
    shapes = {
        "state": (state, (batch if places is None else len(state), heads, state.shape[2], width)),
        "indices": (indices, (depth, batch, tokens, heads, chosen)),
        "places": (places, (batch,)),
    }
    check_shapes(shapes, "undo", undo)
    indices = None if indices is None else indices.contiguous()
    places = None if places is None else places.contiguous()
    if undo.numel() == 0 or count == 0:
        return
    columns, rows, _ = _tiles(batch * heads, chosen, width, state.device)
    launch(
        undo_kernel,
        (batch * heads * -(-width // columns),),
        state,
        undo,
        indices,
        places,
        position,
        count,
        depth,
        batch,
        tokens,
        heads,
        state.shape[2],
        chosen,
        width,
        ROWS=rows,
        BD=columns,
        SPARSE=indices is not None,
        HAS_PLACES=places is not None,
        num_warps=4,
    )


torch.library.define(
    "factorization_memory::step",
    "(Tensor update, Tensor merge, Tensor value, Tensor(a!) state, Tensor? indices, Tensor? merge_indices, Tensor? places,"
    " Tensor(b!)? undo, Tensor? position, Tensor? seed) -> Tensor",
)
torch.library.define(
    "factorization_memory::undo",
    "(Tensor(a!) state, Tensor undo, Tensor? indices, Tensor? places, Tensor position, int count) -> ()",
)
torch.library.impl("factorization_memory::step", ("cpu", "cuda"), _step)
torch.library.impl("factorization_memory::undo", ("cpu", "cuda"), _undo)
torch.library.register_fake("factorization_memory::step", _fake_step)
torch.library.register_fake("factorization_memory::undo", lambda *arguments: None)

step = torch.ops.factorization_memory.step.default
"""The operator; see `_step` for its arguments and results."""
undo = torch.ops.factorization_memory.undo.default
"""The operator; see `_undo` for its arguments."""
