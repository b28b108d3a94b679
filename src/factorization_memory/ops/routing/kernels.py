"""Routing on a GPU: the operators `factorization_memory::route` and `factorization_memory::route_backward`, and
`factorization_memory::route_step` for one token that updates the states of an earlier one.

Forward processes a block of rows at once (a row is one token and head): finds the K-th largest logit bit by bit, as the
largest number that at least K logits reach; then gathers and sorts the logits above it and the first of those equal to it.
Only tensors of width K are saved for backward.

Shapes: N rows, H heads, M memory states, K selected states, R rates per head (M or 1), S saved rates (K, or 1 if R is), L
update lag.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.memory.kernels.step import check_shapes
from factorization_memory.ops.runtime import on_device_of
from factorization_memory.ops.runtime.launcher import dependent, launch

BLOCK, SELECTED_BLOCK = 1024, 256
"""Target logits, and selected logits, per program; a single row may have more."""
WARP_NUMBERS = 1024
"""Logits per warp, if a row has more."""
KEY_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}
"""Leading bits of a logit, cast to float32, that may be nonzero."""


@triton.jit
def _rows_of(count, heads, ROWS: tl.constexpr):
    """The rows of this program, their tokens and heads, and the mask of valid rows, each `[ROWS, 1]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, row // heads, row % heads, row < count


@triton.jit
def _reaching(key, least):
    """Count of keys `[ROWS, MP]` per row that are at least `least`, `[ROWS, 1]`."""
    return tl.sum((key >= least).to(tl.int32), 1)[:, None]


@triton.jit
def _softly(x, known, inside):
    """Softmax of x `[ROWS, KP]` over the columns inside; arbitrary for rows that are not known."""
    x = tl.where(known, tl.where(inside, x, float("-inf")), 0.0)
    power = tl.exp(x - tl.max(x, 1)[:, None])
    return power / tl.sum(power, 1)[:, None]


@triton.jit
def _rate(logits, start, index, mask):
    """Sigmoid of the logits at `start + index`."""
    x = tl.load(logits + start + index, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def forward_kernel(
    affinity_logits,  # a [tokens, H, M]
    update_logits,  # e [tokens, H, R]
    merge_logits,  # m [tokens, H, R]
    affinity,  # out without LAG: alpha [tokens, H, K]
    update,  # out with UPDATES: theta [tokens, H, K]
    merge,  # out: phi [tokens, H, K]
    indices,  # out: [tokens, H, K]
    update_rate,  # out with TRAINS: sigmoid(e) [tokens, H, S]
    merge_rate,  # out with TRAINS: sigmoid(m) [tokens, H, S]
    last_affinity,  # in and out with LAG: alpha of earlier tokens [tokens, LAG, H, K], oldest first
    last_indices,  # in and out with LAG: their states [tokens, LAG, H, K]
    update_indices,  # out with LAG: [tokens, H, K]
    count,  # N
    temperature,
    affinity_token,  # strides of the logits
    affinity_head,
    update_token,
    update_head,
    merge_token,
    merge_head,
    HEADS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    SELECTED: tl.constexpr,
    KP: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_RATE: tl.constexpr,
    BITS: tl.constexpr,
    UPDATES: tl.constexpr,
    LAG: tl.constexpr,
    TRAINS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ROWS rows. UPDATES: compute update weights; LAG: apply them to the states of the token LAG before; TRAINS: save rates
    for backward."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    LOWEST: tl.constexpr = -(2**31)
    MASK: tl.constexpr = -(2 ** (32 - BITS))
    row, token, head, known = _rows_of(count, HEADS, ROWS)
    state = tl.arange(0, PADDED)[None, :]
    there = known & (state < STATES)
    x = tl.load(
        affinity_logits + token * affinity_token + head * affinity_head + state, mask=there, other=0.0, cache_modifier=".cg"
    ).to(tl.float32)
    # Order-preserving integer keys: -0.0 equals 0.0, NaN is largest, padding is lowest.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FC00000, bits)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(state < STATES, key & MASK, LOWEST)
    # The largest number that at least K keys reach, bit by bit from the highest.
    least = tl.where(_reaching(key, 0) >= SELECTED, 0, LOWEST)
    for i in range(1, BITS):
        higher = least + (1 << (31 - i))
        least = tl.where(_reaching(key, higher) >= SELECTED, higher, least)
    above = (key > least).to(tl.int32)
    equal = (key == least).to(tl.int32)
    # Both counts in one integer: a row has fewer than 2^16 states.
    place = tl.cumsum(above + (equal << 16), 1)
    missing = SELECTED - tl.sum(above, 1)[:, None]
    taken = (above == 1) | ((equal == 1) & ((place >> 16) <= missing))
    place = (place & 0xFFFF) + tl.minimum(place >> 16, missing) - 1
    # `indices` serves as scratch for keys and indices; the second barrier keeps stores behind other threads' loads.
    room = indices + tl.program_id(0).to(tl.int64) * (ROWS * SELECTED)
    place += tl.arange(0, ROWS)[:, None] * SELECTED
    tl.store(room + place, (key.to(tl.int64) << 32) | (0xFFFF - state), mask=known & taken)
    tl.debug_barrier()
    column = tl.arange(0, KP)[None, :]
    here = known & (column < SELECTED)
    at = row * SELECTED + column
    chosen = tl.load(indices + at, mask=here, other=-(2**63))
    tl.debug_barrier()
    chosen = tl.sort(chosen, descending=True)
    index = 0xFFFF - (chosen & 0xFFFF)
    key = (chosen >> 32).to(tl.int32)
    bits = (key ^ ((key >> 31) & 0x7FFFFFFF)) & MASK
    alpha = _softly(bits.to(tl.float32, bitcast=True) / temperature, known, column < SELECTED)
    tl.store(indices + at, index, mask=here)
    written, share = index, alpha
    if LAG > 0:
        oldest = (token * LAG * HEADS + head) * SELECTED + column
        written = tl.load(last_indices + oldest, mask=here, other=0, cache_modifier=".cg")
        share = tl.load(last_affinity + oldest, mask=here, other=0.0, cache_modifier=".cg")
        for i in tl.static_range(LAG - 1):
            after = oldest + (i + 1) * HEADS * SELECTED
            moved_index = tl.load(last_indices + after, mask=here, other=0, cache_modifier=".cg")
            moved_share = tl.load(last_affinity + after, mask=here, other=0.0, cache_modifier=".cg")
            tl.debug_barrier()
            tl.store(last_indices + after - HEADS * SELECTED, moved_index, mask=here)
            tl.store(last_affinity + after - HEADS * SELECTED, moved_share, mask=here)
        tl.debug_barrier()
        newest = oldest + (LAG - 1) * HEADS * SELECTED
        tl.store(last_indices + newest, index, mask=here)
        tl.store(last_affinity + newest, alpha, mask=here)
        tl.store(update_indices + at, written, mask=here)
    else:
        tl.store(affinity + at, alpha, mask=here)
    if ONE_RATE:
        mu = _rate(merge_logits, token * merge_token + head * merge_head, 0, known)
        if TRAINS:
            tl.store(merge_rate + row, mu, mask=known)
    else:
        mu = _rate(merge_logits, token * merge_token + head * merge_head, index, here)
        if TRAINS:
            tl.store(merge_rate + at, mu, mask=here)
    tl.store(merge + at, mu * alpha, mask=here)
    if UPDATES:
        if ONE_RATE:
            eta = _rate(update_logits, token * update_token + head * update_head, 0, known)
            if TRAINS:
                tl.store(update_rate + row, eta, mask=known)
        else:
            eta = _rate(update_logits, token * update_token + head * update_head, written, here)
            if TRAINS:
                tl.store(update_rate + at, eta, mask=here)
        tl.store(update + at, eta * share, mask=here)


@triton.jit
def backward_kernel(
    affinity,  # alpha [N, K]
    indices,  # [N, K]
    update_rate,  # sigmoid(e) [N, S]
    merge_rate,  # sigmoid(m) [N, S]
    d_affinity,  # of alpha [N, K]
    d_update,  # of theta [N, K]
    d_merge,  # of phi [N, K]
    d_affinity_logits,  # out: of a [N, M]
    d_update_logits,  # out: of e [N, R]
    d_merge_logits,  # out: of m [N, R]
    count,  # N
    temperature,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    SELECTED: tl.constexpr,
    KP: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_RATE: tl.constexpr,
    UPDATES: tl.constexpr,
    HAS_AFFINITY: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_MERGE: tl.constexpr,
):
    """ROWS rows: zeros for all states, then the gradients of the selected ones."""
    row, _, _, known = _rows_of(count, 1, ROWS)
    state = tl.arange(0, PADDED)[None, :]
    there = known & (state < STATES)
    nothing = tl.zeros([ROWS, PADDED], tl.float32)
    tl.store(d_affinity_logits + row * STATES + state, nothing.to(d_affinity_logits.dtype.element_ty), mask=there)
    if not ONE_RATE:
        if UPDATES:
            tl.store(d_update_logits + row * STATES + state, nothing.to(d_update_logits.dtype.element_ty), mask=there)
        tl.store(d_merge_logits + row * STATES + state, nothing.to(d_merge_logits.dtype.element_ty), mask=there)
    column = tl.arange(0, KP)[None, :]
    here = known & (column < SELECTED)
    at = row * SELECTED + column
    index = tl.load(indices + at, mask=here, other=0)
    alpha = tl.load(affinity + at, mask=here, other=0.0)
    d_alpha = tl.zeros([ROWS, KP], tl.float32)
    d_eta = tl.zeros([ROWS, KP], tl.float32)
    d_mu = tl.zeros([ROWS, KP], tl.float32)
    rate_at = row if ONE_RATE else at
    rate_here = known if ONE_RATE else here
    if UPDATES:
        eta = tl.load(update_rate + rate_at, mask=rate_here, other=0.0)
    mu = tl.load(merge_rate + rate_at, mask=rate_here, other=0.0)
    if HAS_AFFINITY:
        d_alpha += tl.load(d_affinity + at, mask=here, other=0.0)
    if HAS_UPDATE:
        d_theta = tl.load(d_update + at, mask=here, other=0.0)
        d_alpha += d_theta * eta
        d_eta = d_theta * alpha
    if HAS_MERGE:
        d_phi = tl.load(d_merge + at, mask=here, other=0.0)
        d_alpha += d_phi * mu
        d_mu = d_phi * alpha
    d_logit = alpha * (d_alpha - tl.sum(alpha * d_alpha, 1)[:, None]) / temperature
    # Threads may overwrite zeros that others wrote.
    tl.debug_barrier()
    place = row * STATES + index
    tl.store(d_affinity_logits + place, d_logit.to(d_affinity_logits.dtype.element_ty), mask=here)
    if ONE_RATE:
        if UPDATES:
            d_eta = tl.sum(d_eta, 1)[:, None] * eta * (1.0 - eta)
            tl.store(d_update_logits + row, d_eta.to(d_update_logits.dtype.element_ty), mask=known)
        d_mu = tl.sum(d_mu, 1)[:, None] * mu * (1.0 - mu)
        tl.store(d_merge_logits + row, d_mu.to(d_merge_logits.dtype.element_ty), mask=known)
    else:
        if UPDATES:
            d_eta = d_eta * eta * (1.0 - eta)
            tl.store(d_update_logits + place, d_eta.to(d_update_logits.dtype.element_ty), mask=here)
        d_mu = d_mu * mu * (1.0 - mu)
        tl.store(d_merge_logits + place, d_mu.to(d_merge_logits.dtype.element_ty), mask=here)


def _sizes(states: int, selected: int) -> dict[str, int]:
    """Constants and warps of both kernels."""
    padded = triton.next_power_of_2(states)
    kept = triton.next_power_of_2(selected)
    rows = max(1, min(BLOCK // padded, SELECTED_BLOCK // kept))
    warps = max(1, padded // WARP_NUMBERS)
    return {"STATES": states, "PADDED": padded, "SELECTED": selected, "KP": kept, "ROWS": rows, "num_warps": warps}


def _by_token(logits: Tensor) -> Tensor:
    """Logits `[..., H, M]` as `[tokens, H, M]`, contiguous along M; copied only if necessary."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits.reshape(-1, *logits.shape[-2:])


@on_device_of
def _route(
    affinity_logits: Tensor, update_logits: Tensor | None, merge_logits: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Routing.

    Args:
        affinity_logits: `[..., H, M]`, bfloat16, float16 or float32; so are the others.
        update_logits: `[..., H, R]`; None omits update weights.
        merge_logits: `[..., H, R]`.
        top_k: K.
        temperature: divides the affinity logits.

    Returns:
        affinity, update and merge weights float32 `[..., H, K]`, indices int64 `[..., H, K]`; and for backward, the update and
        merge rates float32 `[..., H, S]`. Update weights and rates are empty without `update_logits`.
    """
    made = _fake_route(affinity_logits, update_logits, merge_logits, top_k, temperature)
    affinity, update, merge, indices, update_rate, merge_rate = made
    _launch_forward(
        affinity_logits,
        update_logits,
        merge_logits,
        (affinity, update, merge, indices, update_rate, merge_rate, None, None, None),
        top_k,
        temperature,
        lag=0,
    )
    return made


def _launch_forward(
    affinity_logits: Tensor,
    update_logits: Tensor | None,
    merge_logits: Tensor,
    results: tuple[Tensor | None, ...],
    top_k: int,
    temperature: float,
    lag: int,
) -> None:
    """Launches `forward_kernel`; `results` are its parameters affinity to update_indices, None if not requested."""
    heads, states = affinity_logits.shape[-2:]
    rows = affinity_logits.numel() // states
    if rows == 0:
        return
    # Without update weights, their logits are not read.
    logits = [_by_token(x) for x in (affinity_logits, merge_logits if update_logits is None else update_logits, merge_logits)]
    sizes = _sizes(states, top_k)
    launch(
        forward_kernel,
        (triton.cdiv(rows, sizes["ROWS"]),),
        *logits,
        *results,
        rows,
        float(temperature),
        *(stride for x in logits for stride in x.stride()[:2]),
        HEADS=heads,
        ONE_RATE=merge_logits.shape[-1] == 1,
        BITS=KEY_BITS[affinity_logits.dtype],
        UPDATES=update_logits is not None,
        LAG=lag,
        TRAINS=results[5] is not None,
        **sizes,
        **dependent(early=True),
    )


def _fake_route(
    affinity_logits: Tensor, update_logits: Tensor | None, merge_logits: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def made(width: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return affinity_logits.new_empty((*affinity_logits.shape[:-1], width) if wanted else 0, dtype=dtype)

    updates = update_logits is not None
    rates = 1 if merge_logits.shape[-1] == 1 else top_k
    return (
        made(top_k),
        made(top_k, updates),
        made(top_k),
        made(top_k, dtype=torch.int64),
        made(rates, updates),
        made(rates),
    )


@on_device_of
def _route_step(
    affinity_logits: Tensor,
    update_logits: Tensor,
    merge_logits: Tensor,
    last_affinity: Tensor,
    last_indices: Tensor,
    top_k: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Routes one token per sequence that updates the states of an earlier token. Not differentiable.

    Args:
        affinity_logits: `[B, H, M]`; update_logits, merge_logits: `[B, H, R]`.
        last_affinity: of the last L tokens, oldest first, contiguous float32 `[B, L, H, K]`; shifted in place.
        last_indices: their states, contiguous int64 `[B, L, H, K]`; shifted in place.
        top_k: K.
        temperature: divides the affinity logits.

    Returns:
        update and merge weights float32 `[B, H, K]`; the updated and the merged states, int64 `[B, H, K]`.
    """
    batch, heads, _ = affinity_logits.shape
    carried = (batch, last_affinity.shape[1], heads, top_k)
    shapes = {
        "last_affinity": (last_affinity, carried),
        "last_indices": (last_indices, carried),
        "update_logits": (update_logits, merge_logits.shape),
    }
    check_shapes(shapes, "affinity_logits", affinity_logits)
    made = _fake_route_step(affinity_logits, update_logits, merge_logits, last_affinity, last_indices, top_k, temperature)
    update, merge, update_indices, indices = made
    _launch_forward(
        affinity_logits,
        update_logits,
        merge_logits,
        (None, update, merge, indices, None, None, last_affinity, last_indices, update_indices),
        top_k,
        temperature,
        lag=last_affinity.shape[1],
    )
    return made


def _fake_route_step(
    affinity_logits: Tensor,
    update_logits: Tensor,
    merge_logits: Tensor,
    last_affinity: Tensor,
    last_indices: Tensor,
    top_k: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*affinity_logits.shape[:-1], top_k)
    update, merge = (affinity_logits.new_empty(shape, dtype=torch.float32) for _ in range(2))
    update_indices, indices = (affinity_logits.new_empty(shape, dtype=torch.int64) for _ in range(2))
    return update, merge, update_indices, indices


@on_device_of
def _route_backward(
    affinity: Tensor,
    indices: Tensor,
    update_rate: Tensor,
    merge_rate: Tensor,
    d_affinity: Tensor | None,
    d_update: Tensor | None,
    d_merge: Tensor | None,
    states: int,
    rates: int,
    temperature: float,
    dtype: torch.dtype,
    updates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three logits `[..., H, M]`, `[..., H, R]`, `[..., H, R]` in `dtype`, given those of affinity, update
    and merge weights (None means zero), the tensors saved by `route`, M = `states` and R = `rates`; that of update logits is
    empty unless `updates`."""
    made = _fake_route_backward(
        affinity, indices, update_rate, merge_rate, d_affinity, d_update, d_merge, states, rates, temperature, dtype, updates
    )
    if affinity.numel() > 0:
        selected = affinity.shape[-1]
        sizes = _sizes(states, selected)
        rows = affinity.numel() // selected
        launch(
            backward_kernel,
            (triton.cdiv(rows, sizes["ROWS"]),),
            affinity,
            indices,
            update_rate,
            merge_rate,
            *(None if x is None else x.contiguous() for x in (d_affinity, d_update, d_merge)),
            *made,
            rows,
            float(temperature),
            ONE_RATE=rates == 1,
            UPDATES=updates,
            HAS_AFFINITY=d_affinity is not None,
            HAS_UPDATE=updates and d_update is not None,
            HAS_MERGE=d_merge is not None,
            **sizes,
        )
    return made


def _fake_route_backward(
    affinity: Tensor,
    indices: Tensor,
    update_rate: Tensor,
    merge_rate: Tensor,
    d_affinity: Tensor | None,
    d_update: Tensor | None,
    d_merge: Tensor | None,
    states: int,
    rates: int,
    temperature: float,
    dtype: torch.dtype,
    updates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lead = affinity.shape[:-1]
    d_update_logits = affinity.new_empty((*lead, rates) if updates else 0, dtype=dtype)
    return affinity.new_empty(*lead, states, dtype=dtype), d_update_logits, affinity.new_empty(*lead, rates, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    affinity_logits, update_logits, merge_logits, _, ctx.temperature = inputs
    affinity, _, _, indices, update_rate, merge_rate = output
    ctx.mark_non_differentiable(indices, update_rate, merge_rate)
    ctx.save_for_backward(affinity, indices, update_rate, merge_rate)
    ctx.states, ctx.rates = affinity_logits.shape[-1], merge_logits.shape[-1]
    ctx.dtypes = affinity_logits.dtype, None if update_logits is None else update_logits.dtype, merge_logits.dtype
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(
    ctx: Any, d_affinity: Tensor | None, d_update: Tensor | None, d_merge: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    widest = reduce(torch.promote_types, [dtype for dtype in ctx.dtypes if dtype is not None])
    gradients = torch.ops.factorization_memory.route_backward.default(
        *ctx.saved_tensors,
        d_affinity,
        d_update,
        d_merge,
        ctx.states,
        ctx.rates,
        ctx.temperature,
        widest,
        ctx.dtypes[1] is not None,
    )
    return *(None if dtype is None else x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)), None, None


torch.library.define(
    "factorization_memory::route",
    "(Tensor affinity_logits, Tensor? update_logits, Tensor merge_logits, int top_k, float temperature)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "factorization_memory::route_step",
    "(Tensor affinity_logits, Tensor update_logits, Tensor merge_logits, Tensor(a!) last_affinity, Tensor(b!) last_indices,"
    " int top_k, float temperature) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "factorization_memory::route_backward",
    "(Tensor affinity, Tensor indices, Tensor update_rate, Tensor merge_rate, Tensor? d_affinity, Tensor? d_update,"
    " Tensor? d_merge, SymInt states, SymInt rates, float temperature, ScalarType dtype, bool updates)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("factorization_memory::route_step", ("cpu", "cuda"), _route_step)
torch.library.register_fake("factorization_memory::route_step", _fake_route_step)
torch.library.impl("factorization_memory::route", ("cpu", "cuda"), _route)
torch.library.impl("factorization_memory::route_backward", ("cpu", "cuda"), _route_backward)
torch.library.register_fake("factorization_memory::route", _fake_route)
torch.library.register_fake("factorization_memory::route_backward", _fake_route_backward)
torch.library.register_autograd("factorization_memory::route", _backward, setup_context=_setup_context)

select = torch.ops.factorization_memory.route.default
"""The operator; see `_route` for its arguments and results."""
route_step = torch.ops.factorization_memory.route_step.default
"""The operator; see `_route_step` for its arguments and results."""
