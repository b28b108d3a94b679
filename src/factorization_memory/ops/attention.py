"""Causal attention with PyTorch's kernels: whole, packed and padded sequences, and sliding windows; and rotary position
embeddings (Su et al. 2021, arXiv 2104.09864).

Shapes: B sequences, T queries, S keys, H query heads, G key and value heads, each shared by H / G query heads, P head width, N
packed sequences.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from factorization_memory.ops.autograd import once_differentiable

MASK_NUMBERS = 1 << 26
"""Approximate maximum size of an attention mask, in elements; queries are split to stay below it."""
WINDOW_QUERIES = 128
"""Queries per piece without a kernel for sliding windows, unless the window is wider."""


def attend_evenly(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of q `[B, H, T, P]` to k and v `[B, G, S, P]`, in order; the last T keys are those of the queries' tokens.
    Each query sees `window` keys, itself included, or all before it."""
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    if window is not None and window >= keys:
        window = None
    if window is None and queries == keys:
        return _product(q, k, v, causal=True)
    if has_packed(q):
        one = torch.arange(batch + 1, device=q.device, dtype=torch.int32)
        return attend_packed(q, k, v, one * queries, one * keys, queries, keys, window)
    # A compiled graph must serve any length, so it uses one piece, not a number of pieces that depends on the length.
    whole = window is None or torch.compiler.is_compiling()
    size = max(1, MASK_NUMBERS // keys) if whole else max(window or 0, WINDOW_QUERIES)
    parts = []
    for start, stop in _pieces(queries, size):
        last = keys - queries + stop  # end of the keys that these queries see; then their first
        first = 0 if window is None else max(0, keys - queries + start + 1 - window)
        query = torch.arange(keys - queries + start, last, device=q.device)[:, None]
        key = torch.arange(first, last, device=q.device)
        seen = key <= query if window is None else (key <= query) & (key > query - window)
        parts.append(_product(q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], seen))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    key_position: Tensor,
    window: int | None,
    sequence: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Attention by positions, for keys in any order.

    Args:
        q: `[B, H, T, P]`.
        k, v: `[B, G, S, P]`; the last T are those of the queries' tokens.
        position: positions of the queries in their sequences, `[B or 1, T]`.
        key_position: positions of the keys, `[B or 1, S]`, from 1; 0 marks a key that nobody may attend to.
        window: tokens that each attends to, itself included; None means all before it.
        sequence: packed sequence of each token, `[T]` (B = 1, S = T); None means one per row.
        padding_mask: bool `[B, T]`, False for queries whose result is ignored.

    Returns:
        `[B, H, T, P]`.
    """
    queries, keys = q.shape[2], k.shape[2]
    size = max(1, MASK_NUMBERS // (keys * len(key_position)))
    parts = []
    for start, stop in _pieces(queries, size):
        part = slice(start, stop)
        here = position[:, part, None]
        seen = (key_position[:, None] > 0) & (key_position[:, None] <= here)
        if window is not None:
            seen = seen & (key_position[:, None] > here - window)
        if sequence is not None:
            seen = seen & (sequence == sequence[part, None])
        if padding_mask is not None:
            # Padding attends to itself: a softmax over nothing is NaN.
            token = torch.arange(keys - queries, keys, device=q.device)[part, None]
            alone = ~padding_mask[:, part, None] & (torch.arange(keys, device=q.device) == token)
            seen = seen | alone
        parts.append(_product(q[:, :, part], k, v, seen[:, None]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _pieces(count: int, size: int) -> list[tuple[int, int]]:
    """Start and end of pieces of up to `size`. One piece is not computed from the length, so a compiled graph does not depend
    on it."""
    return [(0, count)] if count <= size else [(start, min(start + size, count)) for start in range(0, count, size)]


def _product(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention of q `[B, H, T, P]` to k and v `[B, G, S, P]` under the mask `seen` `[..., T, S]`."""
    shared = q.shape[1] // k.shape[1]
    if q.is_meta:
        # Count what the kernels of real devices cost: on meta, PyTorch counts the plain form, which stores all pairs of
        # tokens.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, causal, attn_mask=seen)[0]
    if shared > 1 and q.is_cuda and (seen is not None or q.dtype not in (torch.bfloat16, torch.float16)):
        # No kernel shares heads here, and the plain form stores all pairs of tokens.
        k, v, shared = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1), 1
    return functional.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, enable_gqa=shared > 1)


def has_packed(q: Tensor) -> bool:
    """Whether there is a kernel for packed sequences and windows for queries `[B, H, T, P]`."""
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256
    return q.is_cuda and fits and _is_capable(q.device.index)


# Plain functions around cached ones: the compiler accepts only plain functions as constant.
@torch.compiler.assume_constant_result
def _is_capable(device: int | None) -> bool:
    """Whether this PyTorch has attention of packed sequences and the device runs it."""
    return torch.version.hip is None and _capability(device) >= (8, 0) and _shares_heads() is not None


@torch.compiler.assume_constant_result
def _shares_heads() -> bool | None:
    """Whether attention of packed sequences supports grouped-query heads; None if this PyTorch lacks it."""
    return _found()


@cache
def _capability(device: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _found() -> bool | None:
    try:  # not sooner: since about torch 2.12 this imports Triton
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, key_borders: Tensor, most: int, most_keys: int, window: int | None
) -> Tensor:
    """Attention of q `[B, H, T, P]` to k and v `[B, G, S, P]`, sequences of any lengths packed along B and T; the last keys of
    each are those of its queries' tokens. `borders` and `key_borders` `[N + 1]` are the sequences' borders in q and k; `most`
    and `most_keys` bound their lengths."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    shared, options = q.shape[1] // k.shape[1], {}
    if shared > 1 and _shares_heads():
        options = {"enable_gqa": True}
    elif shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    y = attend(
        *flat,
        borders.to(torch.int32),
        key_borders.to(torch.int32),
        most,
        most_keys,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return y.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def rotate(x: Tensor, position: Tensor, heads: int, head_size: int, theta: float) -> Tensor:
    """Applies rotary positions in place to the first `heads` heads of x `[B, T, all heads * P]`: rotates channels
    `i` and `i + P / 2` of a head by the angle `(position - 1) * theta^(-2 i / P)`. Angles are float32, the rest x's dtype.

    Args:
        x: projections of tokens.
        position: positions of the tokens, from 1, `[B or 1, T]`.
        heads: number of heads to rotate.
        head_size: P.
        theta: base of the wavelengths.
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32, device=x.device) / head_size)
    angle = (position - 1)[..., None, None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    if torch.compiler.is_compiling():  # the compiler fuses it better
        turned, rest = x.unflatten(-1, (-1, head_size)).tensor_split((heads,), dim=-2)
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((turned, rest), dim=-2).flatten(-2)
    return _Rotation.apply(x, cos, sin, heads, head_size)


class _Rotation(torch.autograd.Function):
    """`rotate`, in place, given cos and sin `[B or 1, T, 1, P / 2]` of the angles. Saves only these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int, head_size: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.sizes = heads, head_size
        _turn(x, cos, sin, heads, head_size, 1)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None, None, None]:
        d_x = d_y.clone(memory_format=torch.contiguous_format)
        cos, sin = ctx.saved_tensors
        heads, head_size = ctx.sizes
        _turn(d_x, cos, sin, heads, head_size, -1)
        return d_x, None, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, heads: int, head_size: int, sign: int) -> None:
    first, second = x.view(*x.shape[:-1], x.shape[-1] // head_size, head_size)[..., :heads, :].chunk(2, dim=-1)
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).addcmul_(before, sin, value=sign)
