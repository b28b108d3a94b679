"""Routing: from logits to the memory states that each token selects, and their update and merge weights.

For each token and head, with affinity logits a, update rate logits e and merge rate logits m of every state:

    alpha = softmax(a / temperature) over the K states of the largest a        theta = sigmoid(e) alpha
                                                                               phi = sigmoid(m) alpha

With a lag, a token updates the states that an earlier token selected, at its own rates (`weigh`).

Shapes: H heads, M memory states, K selected states, R rates per head (M, or one for all states), L lag; any leading
dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from factorization_memory.ops import runtime
from factorization_memory.ops.runtime.backends import Backend, choose

MAX_SORTED_LOGITS = 2048
"""Number of logits up to which sorting is faster than `topk` of integer keys."""
MAX_STATES, MAX_SELECTED = 16384, 256
"""Largest M and K that the kernels support."""


def route(
    affinity_logits: Tensor,
    update_logits: Tensor | None,
    merge_logits: Tensor,
    top_k: int | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Affinities, update and merge weights, and the selected states. Gradients flow to the three logits.

    Args:
        affinity_logits: `[..., H, M]`.
        update_logits: `[..., H, R]`, R = M or 1; None omits update weights.
        merge_logits: `[..., H, R]`.
        top_k: K, states that each token selects: those with the largest logits, ties broken by lower index; NaN ranks above
            any number. None means all states, in order.
        temperature: divides the affinity logits.
        backend: "plain" (PyTorch), "triton" (kernels for GPUs; with `top_k`, not for float64), or "auto": triton where it can
            run, plain elsewhere.

    Returns:
        Affinity alpha, update weight theta (None without `update_logits`) and merge weight phi, `[..., H, K]` (K = M without
        `top_k`) in float32 (float64 if any logits are); the indices of the selected states by descending logit, int64
        `[..., H, K]`, or None without `top_k`.

    Raises:
        ValueError: logits of the wrong shape, an invalid top_k or temperature, an unknown backend or one that cannot run here;
            the message names the argument, the value and what is accepted.
    """
    _check(affinity_logits, update_logits, merge_logits, top_k, temperature)
    chosen = choose(BACKENDS, backend, affinity_logits, update_logits, merge_logits, top_k)
    return chosen.forward(affinity_logits, update_logits, merge_logits, top_k, temperature)


def weigh(rate_logits: Tensor, affinity: Tensor, indices: Tensor | None) -> Tensor:
    """Update or merge weights: rates of states times affinities, of the same token or of an earlier one.

    Args:
        rate_logits: `[..., H, R]`, R = M or 1.
        affinity: `[..., H, K]`, float32 or float64.
        indices: states of the affinities, int64 `[..., H, K]`; None means all M.

    Returns:
        `[..., H, K]`, in the dtype of `affinity`.
    """
    if indices is not None and rate_logits.shape[-1] > 1:
        rate_logits = rate_logits.gather(-1, indices)
    return rate_logits.to(affinity.dtype).sigmoid() * affinity


@torch.no_grad()
def route_step(
    affinity_logits: Tensor,
    update_logits: Tensor,
    merge_logits: Tensor,
    last_affinity: Tensor,
    last_indices: Tensor | None,
    top_k: int | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Routes one token per sequence that updates the states of the token L before it. Not differentiable.

    Args:
        affinity_logits: `[B, H, M]`; update_logits, merge_logits: `[B, H, R]`, as in `route`.
        last_affinity: affinities of the last L tokens, oldest first, contiguous `[B, L, H, K]`; shifted in place.
        last_indices: states of these affinities, int64 `[B, L, H, K]`, None in the dense form; shifted in place.
        top_k, temperature, backend: as in `route`.

    Returns:
        Update and merge weights `[B, H, K]`; the updated and the merged states, int64 `[B, H, K]`, None in the dense form.

    Raises:
        ValueError: as in `route`, or `last_affinity` or `last_indices` do not fit.
    """
    _check(affinity_logits, update_logits, merge_logits, top_k, temperature)
    _check_last(affinity_logits, last_affinity, last_indices, top_k)
    chosen = choose(BACKENDS, backend, affinity_logits, update_logits, merge_logits, top_k)
    return chosen.step(affinity_logits, update_logits, merge_logits, last_affinity, last_indices, top_k, temperature)


@dataclass(frozen=True, kw_only=True)
class RoutingBackend(Backend):
    """A backend of routing.

    Attributes:
        step: like `route_step`.
    """

    step: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


def _by_kernels(
    affinity_logits: Tensor, update_logits: Tensor | None, merge_logits: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    from factorization_memory.ops.routing.kernels import select

    affinity, update, merge, indices, *_ = select(affinity_logits, update_logits, merge_logits, top_k, temperature)
    return affinity, None if update_logits is None else update, merge, indices


def _step_by_kernels(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    from factorization_memory.ops.routing import kernels

    return kernels.route_step(*arguments)


def _plain_step(
    affinity_logits: Tensor,
    update_logits: Tensor,
    merge_logits: Tensor,
    last_affinity: Tensor,
    last_indices: Tensor | None,
    top_k: int | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    affinity, _, merge, indices = _plain(affinity_logits, None, merge_logits, top_k, temperature)
    updated = None if last_indices is None else last_indices[:, 0].clone()
    update = weigh(update_logits, last_affinity[:, 0].to(affinity.dtype), updated)
    for last, new in ((last_affinity, affinity), (last_indices, indices)):
        if last is not None and new is not None:
            last.copy_(torch.cat((last[:, 1:], new[:, None].to(last.dtype)), dim=1))
    return update, merge, updated, indices


def _plain(
    affinity_logits: Tensor, update_logits: Tensor | None, merge_logits: Tensor, top_k: int | None, temperature: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    dtype = torch.float32
    for logits in (affinity_logits, update_logits, merge_logits):
        dtype = dtype if logits is None else torch.promote_types(dtype, logits.dtype)
    indices = None
    if top_k is not None:
        indices = _largest(affinity_logits.detach(), top_k)
        affinity_logits = affinity_logits.gather(-1, indices)
    affinity = (affinity_logits.to(dtype) / temperature).softmax(-1)
    update = None if update_logits is None else weigh(update_logits, affinity, indices)
    return affinity, update, weigh(merge_logits, affinity, indices), indices


def _largest(logits: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest logits along the last dimension, ties broken by lower index."""
    few = not torch.compiler.is_compiling() and logits.numel() <= MAX_SORTED_LOGITS  # a compiled graph must serve any size
    if logits.dtype == torch.float64 or few:
        logits = (logits + 0.0).masked_fill(logits.isnan(), torch.nan)  # normalise -0.0 and NaN
        return torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :count]
    # `topk` does not specify how it breaks ties, so make keys distinct: order-preserving bits of the logit, then the
    # descending index. -0.0 and NaN are normalised.
    bits = (logits.float() + 0.0).view(torch.int32).masked_fill(logits.isnan(), 0x7FC00000)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (bits.long() << 32) - torch.arange(logits.shape[-1], device=logits.device)
    return keys.topk(count, dim=-1).indices


def _why_unsupported(
    affinity_logits: Tensor, update_logits: Tensor | None, merge_logits: Tensor, top_k: int | None
) -> str | None:
    """Why the kernels cannot run; None if they can."""
    if top_k is None:
        return "top_k is None, but the kernels need a selection"
    if affinity_logits.shape[-1] > MAX_STATES or top_k > MAX_SELECTED:
        return f"M = {affinity_logits.shape[-1]} and top_k = {top_k}, the kernels take up to {MAX_STATES} and {MAX_SELECTED}"
    named = {"affinity_logits": affinity_logits, "update_logits": update_logits, "merge_logits": merge_logits}
    for name, logits in named.items():
        if logits is not None and (reason := runtime.why_unsupported(logits, name)) is not None:
            return reason
    return None


BACKENDS = (
    RoutingBackend("triton", _by_kernels, needs_gpu=True, why_unsupported=_why_unsupported, step=_step_by_kernels),
    RoutingBackend("plain", _plain, step=_plain_step),
)
"""Fastest first."""


def _check_last(logits: Tensor, affinity: Tensor, indices: Tensor | None, top_k: int | None) -> None:
    """Checks the carried tensors of `route_step`, which kernels write to, against logits `[B, H, M]`."""
    (batch, heads, states), lag = logits.shape, affinity.shape[1] if affinity.dim() == 4 else 1
    shape = (batch, lag, heads, top_k or states)
    if (indices is None) != (top_k is None):
        raise ValueError(f"last_indices: got {'None' if indices is None else 'a tensor'}, top_k={top_k}; give both or neither")
    for name, tensor in (("last_affinity", affinity), ("last_indices", indices)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or lag < 1 or tensor.device != logits.device or not tensor.is_contiguous():
            got = f"{tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
            raise ValueError(f"{name}: got {got}, takes a contiguous [B, L, H, K] {shape} on {logits.device}")


def _check(
    affinity_logits: Tensor, update_logits: Tensor | None, merge_logits: Tensor, top_k: int | None, temperature: float
) -> None:
    if affinity_logits.dim() < 2 or affinity_logits.shape[-1] == 0:
        raise ValueError(f"affinity_logits: got shape {tuple(affinity_logits.shape)}, takes [..., H, M]")
    lead, states = affinity_logits.shape[:-1], affinity_logits.shape[-1]
    for name, logits in (("update_logits", update_logits), ("merge_logits", merge_logits)):
        if logits is None:
            continue
        if logits.dim() < 2 or logits.shape[:-1] != lead or logits.shape[-1] not in (1, states):
            raise ValueError(f"{name}: got shape {tuple(logits.shape)}, takes {(*lead, states)} or {(*lead, 1)}")
        if logits.device != affinity_logits.device:
            raise ValueError(
                f"{name}: is on {logits.device}, affinity_logits on {affinity_logits.device}; move them to one device"
            )
    if update_logits is not None and merge_logits.shape != update_logits.shape:
        raise ValueError(
            f"merge_logits: got shape {tuple(merge_logits.shape)}, takes update_logits' {tuple(update_logits.shape)}"
        )
    if top_k is not None and not 1 <= top_k <= states:
        raise ValueError(f"top_k: got {top_k}, takes 1 to M = {states}, or None for all states")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, takes a number above 0")
