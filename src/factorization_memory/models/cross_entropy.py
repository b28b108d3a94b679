"""Cross-entropy of a linear head in pieces, so that the logits of a long sequence never stand in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from factorization_memory.ops.precision import no_autocast, outside_autocast

IGNORE = -100
"""The target of a position that has no loss."""
PIECE_LOGITS = 1 << 22
"""Logits computed at a time."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of the logits `hidden weight^T`.

    Args:
        hidden: `[N, d]`.
        weight: the head's weight, `[V, d]`.
        targets: int64 `[N]`; -100 has no loss.
        reduction: "mean" over the targets that count (0 if none do), or "none".

    Returns:
        float32 scalar, or `[N]` with "none" (not differentiable), 0 where the target is -100.

    Raises:
        ValueError: unknown reduction.
        RuntimeError or IndexError: a target that is no id.
    """
    if reduction == "none":
        with torch.no_grad():
            pieces = [
                functional.cross_entropy(h @ weight.T.to(h.dtype), t, ignore_index=IGNORE, reduction="none").float()
                for h, t in _pieces(hidden, targets, weight)
            ]
        return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)
    if reduction != "mean":
        raise ValueError(f"reduction={reduction!r}: use 'mean' or 'none'")
    if torch.amp.is_autocast_available(hidden.device.type) and torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = (x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, weight))
    return _LinearCrossEntropy.apply(hidden, weight, targets)


def _pieces(hidden: Tensor, targets: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, PIECE_LOGITS // weight.shape[0])
    return list(zip(hidden.split(rows), targets.split(rows), strict=True)) if len(targets) else []


class _LinearCrossEntropy(torch.autograd.Function):
    """The mean loss; both gradients are computed with the forward pass, while a piece's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        count = (targets != IGNORE).sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=total.dtype) if ctx.needs_input_grad[1] else None
        pieces = _pieces(hidden, targets, weight)
        # One buffer for all pieces: fresh memory for each costs more than what is computed in it.
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
                # Only -100 is without a loss: any other id that is none fails in the look-up, as in PyTorch.
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
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return total / count

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype),
            None if d_weight is None else d_weight * d_loss.to(d_weight.dtype),
            None,
        )
