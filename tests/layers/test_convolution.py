"""The layer of the causal convolution: the tail that it carries over cuts, steps, packed sequences and padding."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from factorization_memory.layers.convolution import CausalConvolution

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
KERNELS = GPU or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=[1, 2, 4], ids=lambda taps: f"{taps} taps")
def layer(request: pytest.FixtureRequest) -> CausalConvolution:
    layer = CausalConvolution(6, request.param).double()
    torch.nn.init.normal_(layer.bias)
    return layer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 9, 6, dtype=torch.float64)


def test_is_the_formula(layer: CausalConvolution, x: Tensor) -> None:
    tail = torch.randn(3, layer.taps - 1, 6, dtype=torch.float64)
    known = torch.cat((tail, x), 1)
    expected = torch.stack([(layer.weight * known[:, t : t + layer.taps]).sum(1) + layer.bias for t in range(9)], 1)
    y, after = layer(x, tail)
    torch.testing.assert_close(y, torch.nn.functional.silu(expected))
    assert torch.equal(after, known[:, 9:])


@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_any_cut_and_steps_give_the_whole(layer: CausalConvolution, x: Tensor, cut: int) -> None:
    whole, final = layer(x)
    first, tail = layer(x[:, :cut])
    second, after = layer(x[:, cut:], tail)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    assert torch.equal(after, final)
    with torch.no_grad():
        steps = [layer.step(x[:, t], tail) for t in range(cut, 9)]
    torch.testing.assert_close(torch.stack([*first.unbind(1), *steps], 1), whole)
    assert torch.equal(tail, final)


@pytest.mark.parametrize("keep_tail", [False, True])
def test_packed_and_padded_sequences_are_separate_ones(layer: CausalConvolution, x: Tensor, keep_tail: bool) -> None:
    tail = torch.randn(3, layer.taps - 1, 6, dtype=torch.float64)
    mask = torch.rand(3, 9) > 0.4
    mask[0], mask[1, 1:] = False, False
    y, after = layer(x.masked_fill(~mask[..., None], 7.0), tail, padding_mask=mask, keep_tail=keep_tail)
    assert (after is None) == (not keep_tail)
    for n in range(3):
        one, final = layer(x[n : n + 1, mask[n]], tail[n : n + 1])
        torch.testing.assert_close(y[n, mask[n]], one[0])
        assert not keep_tail or torch.equal(after[n], final[0])
    borders = [0, 7, 7, 9]
    y, after = layer(x[:1], tail, torch.tensor(borders), keep_tail=keep_tail)
    assert (after is None) == (not keep_tail)
    for n, (start, stop) in enumerate(pairwise(borders)):
        one, final = layer(x[:1, start:stop], tail[n : n + 1])
        torch.testing.assert_close(y[:, start:stop], one)
        assert not keep_tail or torch.equal(after[n], final[0])


def test_how_it_starts(layer: CausalConvolution) -> None:
    layer.reset_parameters()
    assert layer.weight.abs().max() <= layer.taps**-0.5
    assert not layer.bias.any()
    tail = layer.initial_tail(2)
    assert (tail.shape, tail.dtype) == ((2, layer.taps - 1, 6), torch.float64)
    assert not tail.any()


PACKED, PADDED = {"cu_seqlens": torch.tensor([0, 2, 2, 6])}, {"padding_mask": torch.ones(2, 6, dtype=torch.bool)}
PADDED["padding_mask"][0, :3] = PADDED["padding_mask"][1, 2:4] = False


@pytest.mark.skipif(not KERNELS, reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("what", [{}, PACKED, PADDED], ids=["whole", "packed", "padded"])
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("with_tail", [False, True])
def test_kernels(what: dict[str, Tensor], low: torch.dtype, with_tail: bool) -> None:
    """By kernels what PyTorch makes in float32 of the same numbers."""
    what = {name: value.to(DEVICE) for name, value in what.items()}
    layer = CausalConvolution(11, 4).to(DEVICE)
    torch.nn.init.normal_(layer.bias)
    batch, sequences = (1, 3) if "cu_seqlens" in what else (2, 2)
    x = torch.randn(batch, 6, 15, device=DEVICE, dtype=low)[..., 3:14]
    tail = torch.randn(sequences, 3, 11, device=DEVICE) if with_tail else None
    y, kept = layer(x, tail, **what, backend="triton")
    rounded = None if tail is None else tail.to(low).float()
    expected, expected_tail = layer(x.float(), rounded, **what, backend="plain")
    assert y.dtype == kept.dtype == low
    assert torch.equal(kept.float(), expected_tail)
    real = what.get("padding_mask", torch.ones(batch, 6, dtype=torch.bool, device=DEVICE))
    close = {"rtol": 8e-3 if low == torch.bfloat16 else 1e-5, "atol": 1e-6}  # the interpreter cuts to bfloat16
    torch.testing.assert_close(y[real].float(), expected[real], **close)
    assert layer(x, tail, **what, keep_tail=False, backend="triton")[1] is None


def test_channels_that_do_not_fit() -> None:
    layer = CausalConvolution(12, 4)
    with pytest.raises(ValueError, match=r"x: got 7 channels, takes 12"):
        layer(torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match=r"x: got 13 channels, takes 12"):
        layer.step(torch.zeros(2, 13), layer.initial_tail(2))
    with pytest.raises(ValueError, match=r"tail: got shape \(2, 3, 20\), takes \(2, 3, 12\)"):
        layer(torch.zeros(2, 5, 12), torch.zeros(2, 3, 20))
    with pytest.raises(ValueError, match=r"tail: got shape \(1, 3, 12\), takes \(2, 3, 12\)"):
        layer.step(torch.zeros(2, 12), layer.initial_tail(1))
