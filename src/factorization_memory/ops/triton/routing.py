"""Routing on a GPU: the operators `factorization_memory::route` and `factorization_memory::route_backward`.

Forward, a block of rows at once (a row is one token and head): the K-th largest logit is found bit by bit, as the largest
number that at least K logits reach; the logits above it, and of those equal to it the first, are gathered and sorted. Backward
keeps only what is K wide.

Shapes: N rows, H heads, M memory states, K selected states, R rates of a head (M or 1), S kept rates (K, or 1 if R is).
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from factorization_memory.ops.triton.dense import on_device_of
from factorization_memory.ops.triton.launcher import dependent, launch

BLOCK, SELECTED_BLOCK = 1024, 256
"""Logits of a program, and those among them that are selected, if not a row has more."""
WARP_NUMBERS = 1024
"""Logits of a warp, if a row has more."""
KEY_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}
"""Bits of a logit, seen as float32, that are not always zero."""


@triton.jit
def _rows_of(count, heads, ROWS: tl.constexpr):
    """The rows of this program, their tokens and heads, and which there are, each `[ROWS, 1]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, row // heads, row % heads, row < count


@triton.jit
def _reaching(key, least):
    """How many numbers of each row of key `[ROWS, MP]` are at least `least`, `[ROWS, 1]`."""
    return tl.sum((key >= least).to(tl.int32), 1)[:, None]


@triton.jit
def _softly(x, known, inside):
    """The softmax of x `[ROWS, KP]` over the columns inside; of rows that are not known, any numbers."""
    x = tl.where(known, tl.where(inside, x, float("-inf")), 0.0)
    power = tl.exp(x - tl.max(x, 1)[:, None])
    return power / tl.sum(power, 1)[:, None]


@triton.jit
def _rate(logits, start, index, mask):
    """The sigmoid of logits at `start + index`."""
    x = tl.load(logits + start + index, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def forward_kernel(
    affinity_logits, update_logits, merge_logits, affinity, update, merge, indices, update_rate, merge_rate, count, temperature,
    affinity_token, affinity_head, update_token, update_head, merge_token, merge_head,
    HEADS: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr, SELECTED: tl.constexpr, KP: tl.constexpr,
    ROWS: tl.constexpr, ONE_RATE: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS rows."""
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
    # Integers in the order of the numbers, where both zeros are equal and NaN is the largest; below all of them, what is none.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FC00000, bits)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(state < STATES, key & MASK, LOWEST)
    # The largest number that K keys reach, from its highest bit on.
    least = tl.where(_reaching(key, 0) >= SELECTED, 0, LOWEST)
    for i in range(1, BITS):
        higher = least + (1 << (31 - i))
        least = tl.where(_reaching(key, higher) >= SELECTED, higher, least)
    above = (key > least).to(tl.int32)
    equal = (key == least).to(tl.int32)
    # Both counts in one: a row has fewer than 2^16 states.
    place = tl.cumsum(above + (equal << 16), 1)
    missing = SELECTED - tl.sum(above, 1)[:, None]
    taken = (above == 1) | ((equal == 1) & ((place >> 16) <= missing))
    place = (place & 0xFFFF) + tl.minimum(place >> 16, missing) - 1
    # The room for indices holds keys and indices meanwhile; the second barrier is for threads that store what others load.
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
    tl.store(affinity + at, alpha, mask=here)
    if ONE_RATE:
        eta = _rate(update_logits, token * update_token + head * update_head, 0, known)
        mu = _rate(merge_logits, token * merge_token + head * merge_head, 0, known)
        tl.store(update_rate + row, eta, mask=known)
        tl.store(merge_rate + row, mu, mask=known)
    else:
        eta = _rate(update_logits, token * update_token + head * update_head, index, here)
        mu = _rate(merge_logits, token * merge_token + head * merge_head, index, here)
        tl.store(update_rate + at, eta, mask=here)
        tl.store(merge_rate + at, mu, mask=here)
    tl.store(update + at, eta * alpha, mask=here)
    tl.store(merge + at, mu * alpha, mask=here)


@triton.jit
def backward_kernel(
    affinity, indices, update_rate, merge_rate, d_affinity, d_update, d_merge, d_affinity_logits, d_update_logits,
    d_merge_logits, count, temperature,
    STATES: tl.constexpr, PADDED: tl.constexpr, SELECTED: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr,
    ONE_RATE: tl.constexpr, HAS_AFFINITY: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_MERGE: tl.constexpr,
):  # fmt: skip
    """ROWS rows: zeros for all states, then the gradients of the selected ones."""
    row, _, _, known = _rows_of(count, 1, ROWS)
    state = tl.arange(0, PADDED)[None, :]
    there = known & (state < STATES)
    nothing = tl.zeros([ROWS, PADDED], tl.float32)
    tl.store(d_affinity_logits + row * STATES + state, nothing.to(d_affinity_logits.dtype.element_ty), mask=there)
    if not ONE_RATE:
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
    # Threads may write to what others filled with zeros.
    tl.debug_barrier()
    place = row * STATES + index
    tl.store(d_affinity_logits + place, d_logit.to(d_affinity_logits.dtype.element_ty), mask=here)
    if ONE_RATE:
        d_eta = tl.sum(d_eta, 1)[:, None] * eta * (1.0 - eta)
        d_mu = tl.sum(d_mu, 1)[:, None] * mu * (1.0 - mu)
        tl.store(d_update_logits + row, d_eta.to(d_update_logits.dtype.element_ty), mask=known)
        tl.store(d_merge_logits + row, d_mu.to(d_merge_logits.dtype.element_ty), mask=known)
    else:
        d_eta = d_eta * eta * (1.0 - eta)
        d_mu = d_mu * mu * (1.0 - mu)
        tl.store(d_update_logits + place, d_eta.to(d_update_logits.dtype.element_ty), mask=here)
        tl.store(d_merge_logits + place, d_mu.to(d_merge_logits.dtype.element_ty), mask=here)


def _sizes(states: int, selected: int) -> dict[str, int]:
    """Constants of both kernels, and their warps."""
    padded = triton.next_power_of_2(states)
    kept = triton.next_power_of_2(selected)
    rows = max(1, min(BLOCK // padded, SELECTED_BLOCK // kept))
    warps = max(1, padded // WARP_NUMBERS)
    return {"STATES": states, "PADDED": padded, "SELECTED": selected, "KP": kept, "ROWS": rows, "num_warps": warps}


def _by_token(logits: Tensor) -> Tensor:
    """Logits `[..., H, M]` as `[tokens, H, M]` with M numbers in a row, copied only if their memory does not allow for it."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits.reshape(-1, *logits.shape[-2:])


@on_device_of
def _route(
    affinity_logits: Tensor, update_logits: Tensor, merge_logits: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Routing.

    Args:
        affinity_logits: `[..., H, M]`, bfloat16, float16 or float32; so are the others.
        update_logits: `[..., H, R]`.
        merge_logits: `[..., H, R]`.
        top_k: K.
        temperature: divides the affinity logits.

    Returns:
        affinity, update and merge weights float32 `[..., H, K]`, indices int64 `[..., H, K]`; and for backward, the update and
        merge rates float32 `[..., H, S]`.
    """
    made = _fake_route(affinity_logits, update_logits, merge_logits, top_k, temperature)
    affinity, update, merge, indices, update_rate, merge_rate = made
    if affinity.numel() > 0:
        logits = [_by_token(x) for x in (affinity_logits, update_logits, merge_logits)]
        heads, states = affinity_logits.shape[-2:]
        sizes = _sizes(states, top_k)
        rows = affinity.numel() // top_k
        launch(
            forward_kernel, (triton.cdiv(rows, sizes["ROWS"]),),
            *logits, affinity, update, merge, indices, update_rate, merge_rate, rows, float(temperature),
            *(stride for x in logits for stride in x.stride()[:2]),
            HEADS=heads, ONE_RATE=update_logits.shape[-1] == 1, BITS=KEY_BITS[affinity_logits.dtype], **sizes,
            **dependent(early=True),
        )  # fmt: skip
    return made


def _fake_route(
    affinity_logits: Tensor, update_logits: Tensor, merge_logits: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    lead = affinity_logits.shape[:-1]
    affinity, update, merge = (affinity_logits.new_empty(*lead, top_k, dtype=torch.float32) for _ in range(3))
    indices = affinity_logits.new_empty(*lead, top_k, dtype=torch.int64)
    rates = 1 if update_logits.shape[-1] == 1 else top_k
    update_rate, merge_rate = (affinity_logits.new_empty(*lead, rates, dtype=torch.float32) for _ in range(2))
    return affinity, update, merge, indices, update_rate, merge_rate


@on_device_of
def _route_backward(
    affinity: Tensor, indices: Tensor, update_rate: Tensor, merge_rate: Tensor, d_affinity: Tensor | None,
    d_update: Tensor | None, d_merge: Tensor | None, states: int, rates: int, temperature: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the three logits `[..., H, M]`, `[..., H, R]`, `[..., H, R]` in `dtype`, given those of affinity, update and
    merge weights (None for zero), what `route` kept, M = `states` and R = `rates`."""
    made = _fake_route_backward(
        affinity, indices, update_rate, merge_rate, d_affinity, d_update, d_merge, states, rates, temperature, dtype
    )
    if affinity.numel() > 0:
        selected = affinity.shape[-1]
        sizes = _sizes(states, selected)
        rows = affinity.numel() // selected
        launch(
            backward_kernel, (triton.cdiv(rows, sizes["ROWS"]),),
            affinity, indices, update_rate, merge_rate,
            *(None if x is None else x.contiguous() for x in (d_affinity, d_update, d_merge)), *made, rows, float(temperature),
            ONE_RATE=rates == 1, HAS_AFFINITY=d_affinity is not None, HAS_UPDATE=d_update is not None,
            HAS_MERGE=d_merge is not None, **sizes,
        )  # fmt: skip
    return made


def _fake_route_backward(
    affinity: Tensor, indices: Tensor, update_rate: Tensor, merge_rate: Tensor, d_affinity: Tensor | None,
    d_update: Tensor | None, d_merge: Tensor | None, states: int, rates: int, temperature: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lead = affinity.shape[:-1]
    d_update_logits, d_merge_logits = (affinity.new_empty(*lead, rates, dtype=dtype) for _ in range(2))
    return affinity.new_empty(*lead, states, dtype=dtype), d_update_logits, d_merge_logits


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    affinity_logits, update_logits, merge_logits, _, ctx.temperature = inputs
    affinity, _, _, indices, update_rate, merge_rate = output
    ctx.mark_non_differentiable(indices, update_rate, merge_rate)
    ctx.save_for_backward(affinity, indices, update_rate, merge_rate)
    ctx.states, ctx.rates = affinity_logits.shape[-1], update_logits.shape[-1]
    ctx.dtypes = affinity_logits.dtype, update_logits.dtype, merge_logits.dtype
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(
    ctx: Any, d_affinity: Tensor | None, d_update: Tensor | None, d_merge: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    widest = reduce(torch.promote_types, ctx.dtypes)
    gradients = torch.ops.factorization_memory.route_backward.default(
        *ctx.saved_tensors, d_affinity, d_update, d_merge, ctx.states, ctx.rates, ctx.temperature, widest
    )
    return *(x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)), None, None


torch.library.define(
    "factorization_memory::route",
    "(Tensor affinity_logits, Tensor update_logits, Tensor merge_logits, int top_k, float temperature)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "factorization_memory::route_backward",
    "(Tensor affinity, Tensor indices, Tensor update_rate, Tensor merge_rate, Tensor? d_affinity, Tensor? d_update,"
    " Tensor? d_merge, SymInt states, SymInt rates, float temperature, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("factorization_memory::route", ("cpu", "cuda"), _route)
torch.library.impl("factorization_memory::route_backward", ("cpu", "cuda"), _route_backward)
torch.library.register_fake("factorization_memory::route", _fake_route)
torch.library.register_fake("factorization_memory::route_backward", _fake_route_backward)
torch.library.register_autograd("factorization_memory::route", _backward, setup_context=_setup_context)

select = torch.ops.factorization_memory.route.default
"""The operator; `_route` says what it takes and returns."""
