"""What stands between the products of a decoding step, and its step with routing, against PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from factorization_memory.layers.convolution import CausalConvolution
from factorization_memory.ops.decoding.rows import convolve, glu, normalise
from factorization_memory.ops.memory import reference
from factorization_memory.ops.memory.kernels import step
from factorization_memory.ops.memory.kernels.step import dense_step
from factorization_memory.ops.routing import route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW, FULL = torch.bfloat16, torch.float32
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def random(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize(
    ("inputs", "parts", "gated", "normed", "skips", "dtype"),
    [(40, 1, False, True, False, FULL), (75, 3, True, True, True, LOW), (75, 0, True, True, True, FULL),
     (33, 0, False, True, False, FULL), (40, 0, True, False, True, LOW), (1, 2, False, True, True, FULL)],
)  # fmt: skip
def test_normalise(inputs: int, parts: int, gated: bool, normed: bool, skips: bool, dtype: torch.dtype) -> None:
    """Rows of x, of the gate and of what skips the norm stand apart."""
    wide = random(5, 3 * inputs + 4)
    x, gate = wide[:, 1 : inputs + 1], wide[:, inputs + 2 : 2 * inputs + 2] if gated else None
    skipped, skip_weight = (wide[:, 2 * inputs + 3 : -1], random(inputs, dtype=dtype)) if skips else (None, None)
    added = random(parts, 5, inputs) if parts else None
    weight = random(inputs, dtype=dtype) if normed else None
    stream = x.clone() if added is None else x + added.sum(0)
    expected, around = stream, wide.clone()
    if weight is not None:
        expected = rms_norm(stream, (inputs,), eps=0.1) * weight.float()
    if skipped is not None and skip_weight is not None:
        expected = expected + skipped * skip_weight.float()
    if gate is not None:
        expected = expected * silu(gate)
    y = normalise(x, added, gate, weight, 0.1, dtype, skipped, skip_weight)
    assert y.dtype == dtype
    # The interpreter cuts to bfloat16 instead of rounding.
    torch.testing.assert_close(y.float(), expected, rtol=1e-5 if dtype == FULL else 8e-3, atol=1e-5)
    close(x, stream)
    assert torch.equal(wide[:, 0], around[:, 0])
    assert torch.equal(wide[:, inputs + 1 :], around[:, inputs + 1 :])


def test_glu() -> None:
    for width, dtype in ((7, FULL), (600, LOW)):
        gate_up = random(5, 2 * width)
        y = glu(gate_up, dtype)
        assert y.dtype == dtype
        expected = silu(gate_up[:, :width]) * gate_up[:, width:]
        torch.testing.assert_close(y.float(), expected, rtol=1e-5 if dtype == FULL else 8e-3, atol=1e-5)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolve(taps: int) -> None:
    layer = CausalConvolution(530, taps).to(DEVICE).requires_grad_(False)
    layer.bias.copy_(random(530))
    wide, tail = random(3, 540), random(3, taps - 1, 530)
    x, expected_tail = wide[:, 4:-6], tail.clone()
    expected = layer.step(x, expected_tail)
    close(convolve(x, tail, layer.weight, layer.bias), expected)
    assert torch.equal(tail, expected_tail)


@pytest.mark.parametrize(
    ("batch", "heads", "states", "width", "rates", "biased", "kept", "split"),
    [(5, 3, 6, 13, 6, True, True, 1), (2, 1, 21, 40, 1, True, False, 3), (1, 2, 9, 8, 9, False, True, 2)],
)
def test_dense_step(
    batch: int, heads: int, states: int, width: int, rates: int, biased: bool, kept: bool, split: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With more tiles than one, and parts of the states."""
    monkeypatch.setattr(step, "_tiles", lambda units, rows, width, device: (16, 4, split))
    sizes = [heads * states, heads * rates, heads * rates, heads * width]
    affinity, update, merge, value = (x.unflatten(1, (heads, -1)) for x in (3 * random(batch, sum(sizes))).split(sizes, 1))
    bias = random(2, heads, rates) if biased else None
    state, undo = random(batch, heads, states, width), random(3, batch, heads, states, width)
    before, untouched = state.clone(), undo.clone()
    first, second = (0, 0) if bias is None else bias
    _, theta, phi, _ = route(affinity, update + first, merge + second, None, 0.7, "plain")
    expected_state = state.clone()
    expected = reference.step(theta, phi, value, None, None, expected_state)
    y = dense_step(
        affinity, update, merge, None if bias is None else bias.flatten(), 0.7, value, state, undo if kept else None,
        torch.tensor([1], device=DEVICE) if kept else None,
    )  # fmt: skip
    close(y, expected)
    close(state, expected_state)
    if kept:
        untouched[1] = before
    assert torch.equal(undo, untouched)


def test_no_sequences() -> None:
    assert normalise(random(0, 8), None, None, None, 0.1, LOW).shape == (0, 8)
    assert glu(random(0, 8), LOW).shape == (0, 4)
    assert convolve(random(0, 8), random(0, 1, 8), random(2, 8), random(8)).shape == (0, 8)
    logits = random(0, 1, 4)
    assert dense_step(logits, logits, logits, None, 1.0, random(0, 1, 8), random(0, 1, 4, 8), None, None).shape == (0, 1, 8)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "states", "width"), [(1, 64, 2048), (64, 64, 2048), (5, 1024, 1920), (130, 100, 336)])
def test_dense_step_at_real_sizes(batch: int, states: int, width: int) -> None:
    logits, bias, value = random(batch, 3 * states), random(2 * states), random(batch, 1, width)
    affinity, update, merge = logits[:, None].split(states, 2)
    state = random(batch, 1, states, width)
    expected_state = state.double()
    rates = [x + y for x, y in zip((update.double(), merge.double()), bias.double().split(states), strict=True)]
    _, theta, phi, _ = route(affinity.double(), *rates, None, 1.0, "plain")
    expected = reference.step(theta, phi, value.double(), None, None, expected_state)
    runs = []
    for _ in range(2):
        mine = state.clone()
        if mine.is_cuda:
            torch.cuda.synchronize()  # it reads the state before what was launched in front of it has ended
        runs.append((dense_step(affinity, update, merge, bias, 1.0, value, mine, None, None), mine))
    torch.testing.assert_close(runs[0][0].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs[0][1].double(), expected_state, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_normalise_at_real_sizes() -> None:
    for inputs, parts in ((1024, 4), (2048, 1), (8190, 2)):
        x, added, weight = random(64, inputs), random(parts, 64, inputs), random(inputs)
        stream = x.double() + added.double().sum(0)
        expected = rms_norm(stream, (inputs,), eps=1e-6) * weight
        y = normalise(x, added, None, weight, 1e-6, FULL)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
