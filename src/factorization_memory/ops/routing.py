"""Routing: from logits to the memory states that each token selects, and how strongly it updates and merges them.

For each token and head, with logits a of affinity, e of the update rate and m of the merge rate of every state:

    alpha = softmax(a / temperature) over the K states of the largest a        theta = sigmoid(e) alpha
                                                                               phi = sigmoid(m) alpha

Shapes: H heads, M memory states, K selected states, R rates of a head (M, or one for all states); any dimensions before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorization_memory.ops import triton

FEW = 2048
"""Logits that are sorted faster than they are made into keys."""
MOST_STATES, MOST_SELECTED = 16384, 256
"""M and K up to which the kernels route."""


def route(
    affinity_logits: Tensor,
    update_logits: Tensor,
    merge_logits: Tensor,
    top_k: int | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Affinities, update and merge weights, and the selected states. Gradients flow to the three logits.

    Args:
        affinity_logits: `[..., H, M]`.
        update_logits: `[..., H, R]`, R = M or 1.
        merge_logits: the same shape as `update_logits`.
        top_k: K, states that each token selects: those of the largest logits, the lower index first among equals; NaN counts
            as larger than any number. None takes all states, in their own order.
        temperature: divides the affinity logits.
        backend: "plain" (PyTorch), "triton" (kernels for GPUs; with `top_k`, not for float64), or "auto": triton where it can
            run, plain elsewhere.

    Returns:
        Affinity alpha, update weight theta and merge weight phi, `[..., H, K]` (K = M without `top_k`) in float32 (float64 if
        any logits are); the indices of the selected states in order of falling logit, int64 `[..., H, K]`, or None without
        `top_k`.

    Raises:
        ValueError: logits of the wrong shape, a top_k or temperature that cannot be, an unknown backend or one that cannot
            run here; names the argument, what it got and what it takes.
    """
    _check(affinity_logits, update_logits, merge_logits, top_k, temperature)
    kernels = triton.by_kernels(
        backend, affinity_logits, lambda: _obstacle(affinity_logits, update_logits, merge_logits, top_k)
    )
    if kernels and top_k is not None:
        from factorization_memory.ops.triton.routing import select

        affinity, update, merge, indices, *_ = select(affinity_logits, update_logits, merge_logits, top_k, temperature)
        return affinity, update, merge, indices
    return _plain(affinity_logits, update_logits, merge_logits, top_k, temperature)


def _plain(
    affinity_logits: Tensor, update_logits: Tensor, merge_logits: Tensor, top_k: int | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    indices = None
    if top_k is not None:
        indices = _largest(affinity_logits.detach(), top_k)
        affinity_logits = affinity_logits.gather(-1, indices)
        if update_logits.shape[-1] > 1:
            update_logits, merge_logits = (x.gather(-1, indices) for x in (update_logits, merge_logits))
    dtype = torch.float32
    for logits in (affinity_logits, update_logits, merge_logits):
        dtype = torch.promote_types(dtype, logits.dtype)
    affinity = (affinity_logits.to(dtype) / temperature).softmax(-1)
    update, merge = (logits.to(dtype).sigmoid() * affinity for logits in (update_logits, merge_logits))
    return affinity, update, merge, indices


def _largest(logits: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest logits of the last dimension, the lower index first among equals."""
    if logits.dtype == torch.float64 or logits.numel() <= FEW:
        logits = (logits + 0.0).masked_fill(logits.isnan(), torch.nan)  # zero has one sign, and so has NaN
        return torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :count]
    # Which of equals `topk` takes is not promised, so none are equal: bits that are in the order of the numbers, then the
    # falling index. Zero has one sign, and so has NaN.
    bits = (logits.float() + 0.0).view(torch.int32).masked_fill(logits.isnan(), 0x7FC00000)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (bits.long() << 32) - torch.arange(logits.shape[-1], device=logits.device)
    return keys.topk(count, dim=-1).indices


def _obstacle(affinity_logits: Tensor, update_logits: Tensor, merge_logits: Tensor, top_k: int | None) -> str | None:
    """Why the kernels cannot route; None if they can."""
    if top_k is None:
        return "top_k is None, and the kernels are for a selection"
    if affinity_logits.shape[-1] > MOST_STATES or top_k > MOST_SELECTED:
        return f"M = {affinity_logits.shape[-1]} and top_k = {top_k}, the kernels take up to {MOST_STATES} and {MOST_SELECTED}"
    named = {"affinity_logits": affinity_logits, "update_logits": update_logits, "merge_logits": merge_logits}
    for name, logits in named.items():
        if (reason := triton.obstacle(logits, name)) is not None:
            return reason
    return None


def _check(affinity_logits: Tensor, update_logits: Tensor, merge_logits: Tensor, top_k: int | None, temperature: float) -> None:
    if affinity_logits.dim() < 2 or affinity_logits.shape[-1] == 0:
        raise ValueError(f"affinity_logits: got shape {tuple(affinity_logits.shape)}, takes [..., H, M]")
    lead, states = affinity_logits.shape[:-1], affinity_logits.shape[-1]
    for name, logits in (("update_logits", update_logits), ("merge_logits", merge_logits)):
        if logits.dim() < 2 or logits.shape[:-1] != lead or logits.shape[-1] not in (1, states):
            raise ValueError(f"{name}: got shape {tuple(logits.shape)}, takes {(*lead, states)} or {(*lead, 1)}")
        if logits.device != affinity_logits.device:
            raise ValueError(f"{name}: is on {logits.device}, affinity_logits on {affinity_logits.device}; move them to one")
    if merge_logits.shape != update_logits.shape:
        raise ValueError(
            f"merge_logits: got shape {tuple(merge_logits.shape)}, takes that of update_logits, {tuple(update_logits.shape)}"
        )
    if top_k is not None and not 1 <= top_k <= states:
        raise ValueError(f"top_k: got {top_k}, takes 1 to M = {states}, or None for all states")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, takes a number above 0")
