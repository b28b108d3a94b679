"""Several projections of one input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from factorization_memory.layers.calling import why_called


def project(x: Tensor, num_heads: int, *projections: nn.Linear) -> list[Tensor]:
    """Applies each projection to x `[..., d]`; each result is `[..., H, outputs per head]`."""
    if as_one(x, projections):
        weight = torch.cat([projection.weight for projection in projections])
        bias = torch.cat([p.weight.new_zeros(p.out_features) if p.bias is None else p.bias for p in projections])
        results = list(functional.linear(x, weight, bias).split([p.out_features for p in projections], dim=-1))
    else:
        results = [projection(x) for projection in projections]
    return [result.unflatten(-1, (num_heads, -1)) for result in results]


def as_one(x: Tensor, projections: tuple[nn.Linear, ...]) -> bool:
    """Whether to multiply x by the weights of all `projections` in one matmul: in training on a GPU, so that forward reads x
    once and backward accumulates one gradient of it. Not if one of them must be called, such as an adapter, or if the total
    width is one that GPU matmuls are slow with."""
    if not x.is_cuda or not torch.is_grad_enabled() or any(why_called(projection) for projection in projections):
        return False
    return sum(p.out_features for p in projections) % 8 == 0
