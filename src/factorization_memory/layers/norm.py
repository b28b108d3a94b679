"""RMS normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.precision import outside_autocast


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension.

    Args:
        size: length of the last dimension.
        eps: added under the root.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., size]` to the same shape."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x `[..., size]`, normalised over the last dimension and multiplied by weight `[size]`."""
    # PyTorch's kernel is fused on GPUs and when compiled; elsewhere it makes a dozen passes over memory and saves their
    # results.
    if x.is_cuda or torch.compiler.is_compiling() or x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """The normalisation in the fewest passes over x that PyTorch's operations allow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        product = (d_y * x).reshape(-1, size)
        d_weight = product.T.mv(scale.reshape(-1))
        along = product.mv(weight).view(scale.shape).mul_(scale.pow(3)).div_(-size)
        return (d_y * weight).mul_(scale).addcmul_(x, along), d_weight, None
