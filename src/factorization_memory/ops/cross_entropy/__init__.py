"""Cross-entropy of a linear head in pieces, so that the logits of a long sequence are never in memory all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from factorization_memory.ops import runtime
from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.precision import has_autocast, no_autocast, wide_product
from factorization_memory.ops.runtime.backends import Backend, choose

IGNORE = -100
"""Target of a position without loss."""
PIECE_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits per piece: few enough for a CPU's cache, enough to fill a GPU. Pieces for kernels have the byte size of this many
float32 logits."""
TILE = 128
"""Rows of a GPU matmul tile: pieces for kernels are a multiple of it, unless smaller."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    """Cross-entropy in nats of the logits `hidden weight^T`.

    Args:
        hidden: `[N, d]`.
        weight: the head's weight, `[V, d]`.
        targets: int64 `[N]`; -100 means no loss.
        reduction: "mean" over the targets other than -100 (0 if there are none), or "none".
        backend: for the mean, "plain" (PyTorch), "triton" (kernels for GPUs; not for float64), or "auto": triton on a GPU
            where it can run, plain elsewhere.

    Returns:
        With "mean" a scalar in float32 (float64 for float64 `hidden`); with "none" float32 `[N]` (not differentiable), 0 where
        the target is -100. With kernels, an invalid target makes the mean and the gradient NaN, since checking would
        synchronize.

    Raises:
        ValueError: unknown reduction, an unknown backend or one that cannot run here.
        RuntimeError or IndexError: an invalid target, except for the mean with kernels.
    """
    kernels = choose(BACKENDS, backend, hidden).name == "triton"
    if reduction == "none":
        with torch.no_grad():
            wide = torch.promote_types(hidden.dtype, torch.float32)
            pieces = [
                functional.cross_entropy((h @ weight.T.to(h.dtype)).to(wide), t, ignore_index=IGNORE, reduction="none").float()
                for h, t in _pieces(hidden, targets, weight)
            ]
        return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)
    if reduction != "mean":
        raise ValueError(f"reduction={reduction!r}: use 'mean' or 'none'")
    if has_autocast(hidden.device) and torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = (x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, weight))
    needs = torch.is_grad_enabled()
    return torch.ops.factorization_memory.linear_cross_entropy.default(
        hidden, weight, targets, needs and hidden.requires_grad, needs and weight.requires_grad, kernels
    )[0]


def logits_cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits, for heads that are not a plain matmul with a weight.

    Args:
        logits: `[N, V]`.
        targets, reduction: as in `linear_cross_entropy`, which returns the same.

    Raises:
        ValueError: unknown reduction.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r}: use 'mean' or 'none'")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="none")
    return losses.sum() / (targets != IGNORE).sum().clamp(min=1) if reduction == "mean" else losses.float().detach()


def _pieces(hidden: Tensor, targets: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, PIECE_LOGITS.get(hidden.device.type, PIECE_LOGITS["cpu"]) // weight.shape[0])
    return list(zip(hidden.split(rows), targets.split(rows), strict=True)) if len(targets) else []


def _mean_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, for_hidden: bool, for_weight: bool, kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss and both gradients, computed piece by piece while its logits exist (empty if not requested)."""
    return (_by_kernels if kernels else _plain)(hidden, weight, targets, for_hidden, for_weight)


def _plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    count = (targets != IGNORE).sum().clamp(min=1)
    total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    d_hidden = torch.empty_like(hidden) if for_hidden else None
    d_weight = torch.zeros_like(weight, dtype=total.dtype) if for_weight else None
    pieces = _pieces(hidden, targets, weight)
    # One buffer for all pieces: allocating memory for each costs more than the computation in it.
    buffer = total.new_empty(max((len(t) for _, t in pieces), default=0), weight.shape[0])
    start = 0
    with no_autocast(hidden.device):
        for h, t in pieces:
            logits = buffer[: len(t)]
            if h.dtype == logits.dtype:
                torch.mm(h, weight.T, out=logits)
            else:
                logits.copy_(h @ weight.T)
            counts = (t != IGNORE)[:, None]
            # Only -100 means no loss: any other invalid id fails in the gather, as in PyTorch.
            target = t.masked_fill(t == IGNORE, 0)[:, None]
            logits.sub_(logits.amax(-1, keepdim=True))
            chosen = logits.gather(1, target)
            exponentials = logits.exp_()
            partition = exponentials.sum(-1, keepdim=True)
            total += ((partition.log() - chosen) * counts).sum()
            if d_hidden is not None or d_weight is not None:
                share = counts.to(total.dtype) / count
                d_logits = exponentials.mul_(share / partition).scatter_add_(1, target, -share).to(h.dtype)
                if d_hidden is not None:
                    torch.mm(d_logits, weight, out=d_hidden[start : start + len(t)])
                if d_weight is not None and h.dtype == d_weight.dtype:
                    d_weight.addmm_(d_logits.T, h)
                elif d_weight is not None:
                    d_weight += d_logits.T @ h
            start += len(t)
    nothing = (total.new_empty(0) for _ in range(2))
    return (
        total / count,
        next(nothing) if d_hidden is None else d_hidden,
        next(nothing) if d_weight is None else d_weight.to(weight.dtype),
    )


def _by_kernels(
    hidden: Tensor, weight: Tensor, targets: Tensor, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with one kernel between the matmuls, which overwrites a piece's logits, in the dtype of `hidden`, with their
    gradient."""
    from factorization_memory.ops.cross_entropy.kernels import cross_entropy, row_size

    count = (targets != IGNORE).sum().clamp(min=1).float()
    share = count.reciprocal() if for_hidden or for_weight else None
    losses = count.new_empty(len(targets))
    d_hidden = torch.empty_like(hidden) if for_hidden else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
    rows = max(1, PIECE_LOGITS[hidden.device.type] * 4 // hidden.element_size() // len(weight))
    rows = rows // TILE * TILE or rows
    targets = targets.contiguous()
    buffer = hidden.new_empty(min(rows, len(targets)), row_size(len(weight)))[:, : len(weight)]
    with no_autocast(hidden.device):
        for start in range(0, len(targets), rows):
            piece = slice(start, start + rows)
            h, t = hidden[piece], targets[piece]
            logits = buffer[: len(t)]
            torch.mm(h, weight.T, out=logits)
            cross_entropy(logits, t, losses[piece], share, IGNORE)
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[piece])
            if d_weight is not None:
                _add_product(d_weight, logits.T, h)
    return (
        losses.sum() / count,
        count.new_empty(0) if d_hidden is None else d_hidden,
        count.new_empty(0) if d_weight is None else d_weight.to(weight.dtype),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a b` in place, in float32, whatever the dtypes of a and b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total.add_(wide_product(a, b))


BACKENDS = (
    Backend("triton", _by_kernels, needs_gpu=True, why_unsupported=lambda x: runtime.why_unsupported(x, "hidden")),
    Backend("plain", _plain),
)
"""Fastest first."""


def _fake_mean_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, for_hidden: bool, for_weight: bool, kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if for_hidden else hidden.new_empty(0, dtype=wide),
        torch.empty_like(weight) if for_weight else hidden.new_empty(0, dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.needed = inputs[3:5]
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients = (
        gradient * d_loss.to(gradient.dtype) if needed and d_loss is not None else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    )
    return *gradients, None, None, None, None


# One operator, opaque to the compiler.
torch.library.define(
    "factorization_memory::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, bool for_hidden, bool for_weight, bool kernels)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("factorization_memory::linear_cross_entropy", "default", _mean_loss)
torch.library.register_fake("factorization_memory::linear_cross_entropy", _fake_mean_loss)
torch.library.register_autograd("factorization_memory::linear_cross_entropy", _backward, setup_context=_setup_context)
