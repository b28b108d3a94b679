"""The linear layer of decoding against PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from factorization_memory.ops.decoding.small_linear import most_tokens, small_linear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LOW, FULL = torch.bfloat16, torch.float32


def truth(x: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """In float64, with the input rounded as said: before the product, to the weight's dtype."""
    o = {name: y.double() if isinstance(y, Tensor) else y for name, y in options.items()}
    low, (x, weight) = weight.dtype, (x.double(), weight.double())
    if o.get("norm_weight") is not None:
        x = x / (x.square().mean(-1, keepdim=True) + o["norm_eps"]).sqrt() * o["norm_weight"]
    if o.get("skipped") is not None:
        x = x + o["skipped"] * o["skip_weight"]
    if o.get("gate") is not None:
        x = x * silu(o["gate"])
    y = x.to(low).double() @ weight.T
    if o.get("bias") is not None:
        y = y + o["bias"]
    if o.get("glu"):
        first, second = y.chunk(2, dim=1)
        y = silu(first) * second
    return y if o.get("residual") is None else y + o["residual"]


def random(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def problem(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, form: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """x and options are of `dtype` where activations are, in the form "mixed" of float32."""
    active = FULL if form == "mixed" else dtype
    rows = 2 * outputs if form in ("glu", "all") else outputs
    options: dict[str, Any] = {}
    if form in ("norm", "mixed", "all"):
        options |= {"norm_weight": random(inputs) + 1, "norm_eps": 0.1}
    if form in ("bias", "all"):
        options["bias"] = random(rows, dtype=dtype)
    if form in ("residual", "mixed", "all"):
        options["residual"] = random(tokens, outputs, dtype=active)
    if form in ("skip", "mixed", "all"):
        options |= {"skipped": random(tokens, inputs, dtype=active), "skip_weight": random(inputs, dtype=dtype)}
    if form in ("gate", "all"):
        options["gate"] = random(tokens, inputs, dtype=active)
    if form in ("glu", "all"):
        options["glu"] = True
    weight = (random(rows, inputs) / inputs**0.5).to(dtype)
    return random(tokens, inputs, dtype=active), weight, options


def right(x: Tensor, weight: Tensor, options: dict[str, Any], out: Tensor) -> None:
    expected = truth(x, weight, options)
    assert small_linear(x, weight, out, **options) is out
    error = (out.double() - expected).norm() / expected.norm()
    # Where the norm multiplies, before rounding or after, is left open; and Triton's interpreter cuts instead of rounding.
    low = LOW in (weight.dtype, out.dtype)
    assert error <= ((4e-3 if CUDA else 1.2e-2) if low else 2e-6), f"{error:.1e}"


FORMS = ["plain", "norm", "bias", "residual", "skip", "gate", "glu", "mixed", "all"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [FULL, LOW])
@pytest.mark.parametrize("tokens", [1, 3])
def test_forms(tokens: int, dtype: torch.dtype, form: str) -> None:
    x, weight, options = problem(tokens, 75, 43, dtype, form)
    right(x, weight, options, torch.empty(tokens, 43, dtype=x.dtype, device=DEVICE))


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "form"),
    [
        (2, 300, 5, "all"), (4, 1, 1, "norm"), (1, 1030, 9, "norm"), (4, 40, 19, "all"), (2, 130, 65, "plain"),
        (3, 17, 1, "all"), (4, 16, 16, "gate"), (2, 1, 3, "all"),
    ],
)  # fmt: skip
def test_sizes(tokens: int, inputs: int, outputs: int, form: str) -> None:
    x, weight, options = problem(tokens, inputs, outputs, FULL, form)
    right(x, weight, options, torch.empty(tokens, outputs, device=DEVICE))


@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_apart_and_out_in_place(tokens: int) -> None:
    """All inputs and the residual stream as parts of larger tensors; the outputs are added to the stream."""
    wide, stream = random(tokens, 130), random(tokens, 50)
    x, gate, skipped, residual = wide[:, :40], wide[:, 41:81], wide[:, 85:125], stream[:, 3:30]
    weight, skip_weight = random(27, 40), random(40)
    options = {"gate": gate, "residual": residual, "skipped": skipped, "skip_weight": skip_weight}
    expected = truth(x, weight, options)
    before = stream.clone()
    small_linear(x, weight, residual, **options)
    torch.testing.assert_close(stream[:, 3:30].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(stream[:, :3], before[:, :3])
    assert torch.equal(stream[:, 30:], before[:, 30:])


def test_no_tokens() -> None:
    assert small_linear(random(0, 8), random(4, 8), random(0, 4)).shape == (0, 4)


def test_most_tokens() -> None:
    assert [most_tokens(inputs) for inputs in (1, 4096, 4097, 16384, 16385)] == [4, 4, 2, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 8), "out": torch.zeros(5, 4)}, "x: got 5 tokens of 8 inputs, takes up to 4"),
        ({"x": torch.zeros(8)}, r"x, weight, out: got shapes \(8,\)"),
        ({"weight": torch.zeros(4, 7)}, r"weight: got shape \(4, 7\), takes \(4, 8\)"),
        ({"weight": torch.zeros(8, 4).T}, r"weight: last dimension has stride 4"),
        ({"glu": True}, r"weight: got shape \(4, 8\), takes \(8, 8\)"),
        ({"bias": torch.zeros(4).half()}, r"bias: got dtype torch\.float16, takes bfloat16 or float32"),
        ({"gate": torch.zeros(2, 8, device="meta")}, r"gate: is on meta, x on cpu"),
        ({"skipped": torch.zeros(2, 8)}, r"skip_weight: got None, takes a tensor together with skipped"),
        ({"norm_weight": torch.zeros(7)}, r"norm_weight: got shape \(7,\), takes \(8,\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_linear(**({"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), "out": torch.zeros(2, 4)} | change))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 6000), (2048, 1024), (1920, 5120), (8190, 333)])
def test_large(tokens: int, inputs: int, outputs: int, form: str) -> None:
    if tokens > most_tokens(inputs):
        pytest.skip("more than one kernel takes")
    for dtype in (FULL, LOW):
        x, weight, options = problem(tokens, inputs, outputs, dtype, form)
        out = torch.empty(tokens, outputs, dtype=x.dtype, device=DEVICE)
        right(x, weight, options, out)
        again = torch.empty_like(out)
        small_linear(x, weight, again, **options)
        assert torch.equal(out, again)


@pytest.mark.gpu
def test_in_a_graph() -> None:
    x, weight, options = problem(1, 1024, 3000, LOW, "norm")
    out = torch.zeros(1, 3000, dtype=LOW, device=DEVICE)
    small_linear(x, weight, out, **options)
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        small_linear(x, weight, out, **options)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
