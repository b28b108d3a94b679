"""The causal convolution against a loop in float64: PyTorch and, on a GPU or in Triton's interpreter, the kernels."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factorization_memory.ops.convolution import _places, causal_convolution, last_inputs

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
KERNELS = GPU or os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["plain", *(["triton"] if KERNELS else [])]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def loop(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tail: torch.Tensor, borders: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, each row of x from one border to the next with a tail of its own, `[sequences, taps - 1, C]`."""
    taps = len(weight)
    outputs, tails = [], []
    for row, each in enumerate(x):
        parts = []
        for n, (start, stop) in enumerate(pairwise(borders)):
            known = torch.cat((tail[row + n], each[start:stop]))
            for token in range(stop - start):
                total = bias.clone()
                for tap in range(taps):
                    total = total + weight[tap] * known[token + tap]
                parts.append(total * torch.sigmoid(total))
            tails.append(known[len(known) - taps + 1 :])
        outputs.append(torch.stack(parts) if parts else each)
    return torch.stack(outputs), torch.stack(tails)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found = found.detach()
    if expected.numel() == 0 or not expected.any():
        return float(found.double().abs().sum())
    return float((found.double() - expected).norm() / expected.norm())


def compare(
    shape: tuple[int, int, int], taps: int, dtype: torch.dtype, backend: str, borders: list[int] | None = None,
    with_tail: bool = False, tail_gradient: bool = False,
) -> None:  # fmt: skip
    """Output, tail and every gradient, of an input whose rows stand apart in memory."""
    batch, length, channels = shape
    sequences = batch if borders is None else len(borders) - 1
    wide = torch.randn(batch, length, channels + 3, device=DEVICE, dtype=dtype)
    x = wide[..., 1 : channels + 1].detach().requires_grad_()
    weight = torch.randn(taps, channels, device=DEVICE).requires_grad_()
    bias = torch.randn(channels, device=DEVICE).requires_grad_()
    tail = torch.randn(sequences, taps - 1, channels, device=DEVICE, dtype=dtype).requires_grad_(tail_gradient)
    edges = None if borders is None else torch.tensor(borders, device=DEVICE, dtype=torch.int32)
    d_y = torch.randn(batch, channels, length, device=DEVICE, dtype=dtype).mT  # rows that are not contiguous either
    leaves = [x, weight, bias, *([tail] if tail_gradient else [])]

    exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
    exact_tail = exact[3] if tail_gradient else tail.detach().double().cpu() * with_tail
    y, last = loop(exact[0], exact[1], exact[2], exact_tail, borders or [0, length])
    y.backward(d_y.double().cpu())

    given_tail = tail if with_tail else None
    found = causal_convolution(x, weight, bias, given_tail, edges, backend)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    found.backward(d_y)
    assert error(found.cpu(), y.detach()) < TOLERANCE[dtype]
    for leaf, expected in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert expected.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert error(leaf.grad.cpu(), expected.grad) < (TOLERANCE[dtype] if backend == "triton" else 5 * TOLERANCE[dtype])
    tails = last_inputs(x.detach(), taps, given_tail, edges)
    assert torch.equal(tails.cpu().double(), last.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("with_tail", [False, True])
def test_sequences(taps: int, with_tail: bool, backend: str) -> None:
    compare((2, 7, 130), taps, torch.float32, backend, None, with_tail)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("with_tail", [False, True])
def test_packed_sequences(taps: int, with_tail: bool, backend: str) -> None:
    """Of one, two and more tokens than taps, and of none."""
    compare((1, 17, 5), taps, torch.float32, backend, [0, 1, 1, 3, 8, 10, 17, 17], with_tail)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 61, 62, 64, 65, 130])
def test_lengths(length: int, backend: str) -> None:
    """At and around the tokens of a program, forward and backward."""
    compare((1, length, 3), 4, torch.float32, backend, with_tail=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    x = torch.randn(2, 0, 3, device=DEVICE, requires_grad=True)
    weight, bias = torch.randn(4, 3, device=DEVICE, requires_grad=True), torch.randn(3, device=DEVICE, requires_grad=True)
    tail = torch.randn(2, 3, 3, device=DEVICE)
    y = causal_convolution(x, weight, bias, tail, backend=backend)
    y.sum().backward()
    assert y.shape == x.shape
    assert torch.equal(last_inputs(x, 4, tail), tail)
    for leaf in (weight, bias):
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_low_precision(dtype: torch.dtype, backend: str) -> None:
    compare((2, 9, 20), 4, dtype, backend, with_tail=True)
    compare((1, 9, 20), 4, dtype, backend, [0, 4, 9])


def test_five_taps_and_the_gradient_of_a_tail() -> None:
    """What the kernels leave to PyTorch."""
    compare((2, 7, 6), 5, torch.float32, "auto", with_tail=True, tail_gradient=True)
    compare((1, 9, 6), 3, torch.float32, "auto", [0, 1, 5, 9], with_tail=True, tail_gradient=True)


@pytest.mark.gpu
def test_real_sizes() -> None:
    for dtype in TOLERANCE:
        compare((2, 1100, 1536), 4, dtype, "triton")
        compare((1, 1500, 1030), 4, dtype, "triton", [0, 700, 701, 1500], with_tail=True)


@pytest.mark.skipif(not KERNELS, reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("borders", [None, [0, 2, 5]])
def test_traced_as_one_graph(borders: list[int] | None) -> None:
    x, weight, bias = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((1, 5, 4), (4, 4), (4,)))
    cu_seqlens = None if borders is None else torch.tensor(borders, device=DEVICE)
    tail = torch.randn(1 if borders is None else len(borders) - 1, 3, 4, device=DEVICE)
    traced = torch.compile(causal_convolution, fullgraph=True, backend="aot_eager")
    results = []
    for function in (traced, causal_convolution):
        y = function(x, weight, bias, tail, cu_seqlens, "triton")
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_compiled_as_one_graph() -> None:
    """With the bits of the kernels called one by one."""
    x = torch.randn(2, 300, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(4, 256, device=DEVICE, requires_grad=True), torch.randn(256, device=DEVICE, requires_grad=True)
    gradients = []
    for function in (torch.compile(causal_convolution, fullgraph=True), causal_convolution):
        y = function(x, weight, bias)
        gradients.append(torch.autograd.grad(y.float().square().sum(), (x, weight, bias)))
    for compiled, eager in zip(*gradients, strict=True):
        assert torch.equal(compiled, eager)


def test_borders_that_are_not_looked_at() -> None:
    """A compiled model does not check them; what they point to is there all the same."""
    for borders in ([0, 5], [2, 7], [-3, 9], [0, 5, 3, 7]):
        positions, sequences = _places(torch.zeros(1, 7, 1), torch.tensor(borders), True)
        assert sequences is not None
        assert (positions >= 0).all()
        assert (positions <= torch.arange(7)).all()
        assert (sequences >= 0).all()
        assert (sequences < len(borders) - 1).all()


@pytest.mark.skipif(not KERNELS, reason="needs a GPU, or TRITON_INTERPRET=1")
def test_operator() -> None:
    from factorization_memory.ops.convolution.kernels import convolve

    x, weight, bias = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((2, 6, 10), (3, 10), (10,)))
    torch.library.opcheck(convolve, (x, weight, bias, None, None, None))
    tail = torch.randn(2, 2, 10, device=DEVICE)
    torch.library.opcheck(convolve, (x, weight, bias, tail, None, None))


@pytest.mark.skipif(not KERNELS, reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_what_is_not_finite_reaches_only_what_sees_it() -> None:
    """Not a sequence beside it, not a token too far behind, and no gradient of a token that does not see it."""
    x = torch.randn(1, 12, 4, device=DEVICE)
    x[0, 5, 1] = torch.inf
    x[0, 5, 2] = torch.nan
    borders = torch.tensor([0, 6, 12], device=DEVICE)
    x.requires_grad_()
    weight, bias = torch.randn(2, 4, device=DEVICE), torch.randn(4, device=DEVICE)
    y = causal_convolution(x, weight, bias, None, borders, backend="triton")
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    far = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert y[0, far].isfinite().all()
    assert not y[0, 5, 2].isfinite()
    assert x.grad[0, far][[0, 1, 2, 3, 5, 6, 7, 8, 9, 10]].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 5), st.sampled_from(BACKENDS))
def test_a_sequence_may_be_split_anywhere(first: int, second: int, taps: int, backend: str) -> None:
    if taps > 4:
        backend = "plain"
    x = torch.randn(2, first + second, 3, device=DEVICE)
    weight, bias = torch.randn(taps, 3, device=DEVICE), torch.randn(3, device=DEVICE)
    whole = causal_convolution(x, weight, bias, backend=backend)
    y = causal_convolution(x[:, :first], weight, bias, backend=backend)
    tail = last_inputs(x[:, :first], taps)
    z = causal_convolution(x[:, first:], weight, bias, tail, backend=backend)
    torch.testing.assert_close(torch.cat((y, z), dim=1), whole)
    assert torch.equal(last_inputs(x[:, first:], taps, tail), last_inputs(x, taps))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"x: got shape \(2, 4\), takes \[B, T, C\]"),
        ({"weight": torch.zeros(3, 5)}, r"weight: got shape \(3, 5\), takes \[taps, 4\]"),
        ({"weight": torch.zeros(0, 4)}, r"weight: got shape \(0, 4\), takes \[taps, 4\], of one tap or more"),
        ({"bias": torch.zeros(5)}, r"bias: got shape \(5,\), takes \(4,\)"),
        ({"tail": torch.zeros(2, 3, 4)}, r"tail: got shape \(2, 3, 4\), takes \(2, 2, 4\)"),
        ({"x": torch.zeros(2, 6, 4, dtype=torch.int64)}, r"x: got dtype torch\.int64, takes floating-point numbers"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens: got B = 2, takes B = 1 with packed sequences"),
        ({"x": torch.zeros(1, 6, 4), "cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens: got \[0, 5\], takes .* to T = 6"),
        ({"x": torch.zeros(1, 6, 4), "cu_seqlens": torch.tensor([0, 5, 3, 6])}, r"cu_seqlens: got \[0, 5, 3, 6\], takes"),
        (
            {"x": torch.zeros(1, 6, 4), "cu_seqlens": torch.tensor([0, 2, 6]), "tail": torch.zeros(1, 2, 4)},
            r"tail: got shape \(1, 2, 4\), takes \(2, 2, 4\)",
        ),
        ({"backend": "cudnn"}, "backend='cudnn': use one of auto, plain, triton"),
        ({"backend": "triton", "x": torch.zeros(2, 6, 4, dtype=torch.float64)}, "backend='triton': x has dtype torch.float64"),
        ({"backend": "triton", "weight": torch.zeros(5, 4)}, "backend='triton': weight has 5 taps, the kernels take up to 4"),
        (
            {"backend": "triton", "tail": torch.zeros(2, 2, 4, requires_grad=True)},
            "backend='triton': tail requires a gradient.*use 'auto', or 'plain', which runs everywhere",
        ),
    ],
)  # fmt: skip
def test_errors(changed: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 6, 4), "weight": torch.zeros(3, 4), "bias": torch.zeros(4)} | changed
    with pytest.raises(ValueError, match=message):
        causal_convolution(**arguments)
