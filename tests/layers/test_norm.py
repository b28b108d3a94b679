"""RMS normalisation against its formula, with gradients, in the form for CPUs and in PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from factorization_memory.layers.norm import RMSNorm, rms_norm


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 0, 16), (2, 5, 16)])
def test_is_the_formula(shape: tuple[int, ...], eps: float) -> None:
    x, weight = torch.randn(*shape, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, eps), formula(x, weight, eps))


def test_gradients() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    x[0, 1] = 0  # a token without a direction: eps alone stands under the root
    inputs = x.requires_grad_(), torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 0.1), inputs)
    gradients = torch.autograd.grad(rms_norm(*inputs, 1e-6).sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_norm_takes_any_layout() -> None:
    x = torch.randn(7, 2, 16, dtype=torch.float64).transpose(0, 1).requires_grad_()
    norm = RMSNorm(16, 1e-6).double()
    expected = functional.rms_norm(x, (16,), norm.weight, 1e-6)
    torch.testing.assert_close(norm(x), expected)
    weight = torch.randn(2, 7, 16, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((norm(x) * weight).sum(), [x, norm.weight]),
        torch.autograd.grad((expected * weight).sum(), [x, norm.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_dtypes() -> None:
    """A weight of another dtype than x, as under autocast, is PyTorch's to handle; the result is as exact as x is."""
    x, weight = torch.randn(4, 16), torch.randn(16)
    expected = formula(x.double(), weight.double(), 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), expected, rtol=1e-5, atol=1e-6)
    low = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=0.05, atol=0.05)


def test_starts_with_ones() -> None:
    norm = RMSNorm(5, 1e-6)
    torch.nn.init.normal_(norm.weight)
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(5))
