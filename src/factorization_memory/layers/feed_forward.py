"""The SwiGLU feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from factorization_memory.ops.autograd import once_differentiable


class FeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))`, without biases.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width in between.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., hidden_size]` to the same shape."""
        gate_up = self.gate_up(x)
        if torch.compiler.is_compiling():  # the compiler fuses it better
            gate, up = gate_up.chunk(2, dim=-1)
            return self.down(functional.silu(gate) * up)
        return self.down(_SwiGLU.apply(gate_up))


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up` of the two halves of `[..., 2 I]`. Saves only its input for backward, and writes the gradients of both
    halves into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(d_y, functional.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_y * up, gate, grad_input=d_gate)
        return d_gate_up
