"""Losses compiled with `torch.compile`, with a budget for the activations saved for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def compiled_loss(loss: Callable[P, R], whole: bool = True, activation_memory_budget: float = 1.0) -> Callable[P, R]:
    """Compiles `loss` for each shape of its arguments (one graph for all shapes would be slower at each).

    Args:
        loss: a model or function from tensors to a differentiable scalar (and anything else).
        whole: raise if it does not compile to a single graph, instead of accepting graph breaks.
        activation_memory_budget: share, 0 to 1, of the activations that would be saved for speed; the rest is recomputed.
            PyTorch picks which by bytes and FLOPs. At 0.6 a model of 341 M parameters took a third less memory and 3 % more
            time (docs/kernels.md).
    """
    if not 0 <= activation_memory_budget <= 1:
        raise ValueError(f"activation_memory_budget={activation_memory_budget}: use a share from 0 to 1")
    compiled = torch.compile(loss, fullgraph=whole, dynamic=False)
    if activation_memory_budget == 1:
        return compiled
    from torch._functorch import config

    def within_budget(*args: P.args, **kwargs: P.kwargs) -> R:
        # Read when a graph is compiled, at the first call with a shape.
        with config.patch(activation_memory_budget=activation_memory_budget):
            return compiled(*args, **kwargs)

    return within_budget
