"""Routing against a loop in float64: the plain form, and the kernels (in the interpreter where there is no GPU)."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from factorization_memory.layers import FactorizationMemory
from factorization_memory.ops.routing import route, route_step, weigh

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
BACKENDS = ["plain", pytest.param("triton", marks=needs_triton)]
both = pytest.mark.parametrize("backend", BACKENDS)


def truth(a: Tensor, e: Tensor, m: Tensor, top_k: int | None, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row by row, in Python, from float64 logits; differentiable."""
    states, rates = a.shape[-1], e.shape[-1]
    results: list[list[Tensor]] = [[], [], [], []]
    for x, update, merge in zip(a.reshape(-1, states), e.reshape(-1, rates), m.reshape(-1, rates), strict=True):
        order = list(range(states))
        if top_k is not None:
            order = sorted(order, key=lambda j: (-x[j].item(), j))[:top_k]
        chosen = torch.stack([x[j] for j in order]) / temperature
        power = (chosen - chosen.max()).exp()
        alpha = power / power.sum()
        rate = [torch.stack([1 / (1 + (-y[j if rates > 1 else 0]).exp()) for j in order]) for y in (update, merge)]
        for result, y in zip(results, (alpha, rate[0] * alpha, rate[1] * alpha, torch.tensor(order)), strict=True):
            result.append(y)
    lead = a.shape[:-1]
    alpha, theta, phi, indices = (torch.stack(result).reshape(*lead, -1) for result in results)
    return alpha, theta, phi, indices


def logits(lead: tuple[int, ...], states: int, rates: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(*lead, states), *[(*lead, rates or states)] * 2]
    return [(2 * torch.randn(shape)).to(dtype).to(DEVICE).requires_grad_() for shape in shapes]


def check(given: list[Tensor], top_k: int | None, temperature: float, backend: str, tolerance: float) -> None:
    """Results, and gradients of a random combination of them."""
    got = route(*given, top_k, temperature, backend)
    leaves = [x.detach().cpu().double().requires_grad_() for x in given]
    expected = truth(*leaves, top_k, temperature)
    if top_k is None:
        assert got[3] is None
    else:
        assert got[3].dtype == torch.int64
        assert torch.equal(got[3].cpu(), expected[3])
    upstream = [torch.randn(x.shape) for x in expected[:3]]
    for x, y in zip(got[:3], expected[:3], strict=True):
        assert x.dtype == torch.promote_types(given[0].dtype, torch.float32)
        assert x.shape == y.shape
        torch.testing.assert_close(x.detach().cpu().double(), y.detach(), rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(got[:3], given, [x.to(y) for x, y in zip(upstream, got, strict=False)])
    wanted = torch.autograd.grad(expected[:3], leaves, [x.double() for x in upstream])
    for x, y, leaf in zip(gradients, wanted, given, strict=True):
        assert x.dtype == leaf.dtype
        rounding = torch.finfo(x.dtype).eps if x.dtype in (torch.bfloat16, torch.float16) else tolerance
        torch.testing.assert_close(x.cpu().double(), y, rtol=max(rounding, tolerance), atol=tolerance)


@both
@pytest.mark.parametrize(
    ("lead", "states", "rates", "top_k", "temperature"),
    [
        ((2, 5, 2), 16, None, 4, 1.0),
        ((3, 1), 7, None, 3, 0.7),
        ((1,), 1, None, 1, 1.0),
        ((5, 3), 9, 1, 4, 2.0),
        ((2, 3), 20, None, 1, 1.0),
        ((2, 3), 20, 1, 1, 1.0),
        ((1, 2, 1), 70, None, 64, 1.0),
        ((1, 3), 130, None, 33, 1.5),
        ((2, 1), 1100, None, 20, 1.0),
        ((4, 2), 13, None, 13, 1.0),
        ((70, 1), 64, None, 16, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_loop(
    lead: tuple[int, ...], states: int, rates: int | None, top_k: int, temperature: float, dtype: torch.dtype, backend: str
) -> None:
    check(logits(lead, states, rates, dtype), top_k, temperature, backend, 1e-5)


@pytest.mark.parametrize("rates", [1, 9])
@pytest.mark.parametrize("top_k", [None, 4, 9])
def test_plain_gradients(rates: int, top_k: int | None) -> None:
    given = [torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True) for n in (9, rates, rates)]
    check(given, top_k, 0.7, "plain", 1e-10)
    assert torch.autograd.gradcheck(lambda *x: route(*x, top_k, 0.7)[:3], given)


@both
@pytest.mark.parametrize("rates", [1, 9])
def test_without_update_weights(rates: int, backend: str) -> None:
    """What is left is the same, with the same gradients."""
    a, e, m = logits((2, 3, 2), 9, rates)
    affinity, _, merge, indices = route(a, e, m, 4, 0.7, backend)
    same = route(a, None, m, 4, 0.7, backend)
    assert same[1] is None
    for x, y in zip((affinity, merge, indices), (same[0], *same[2:]), strict=True):
        assert torch.equal(x, y)
    expected, got = (
        torch.autograd.grad((x.square() + 3 * y.exp()).sum(), (a, m)) for x, y in ((affinity, merge), (same[0], same[2]))
    )
    for x, y in zip(expected, got, strict=True):
        torch.testing.assert_close(x, y)


@both
@pytest.mark.parametrize("rates", [1, 9])
@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_steps_with_a_lag(lag: int, top_k: int | None, rates: int, backend: str) -> None:
    """Each token updates the states of the one `lag` before it, at its own rates of them, and the first ones none."""
    if backend == "triton" and top_k is None:
        return
    a, e, m = (x.detach() for x in logits((6, 3, 2), 9, rates))  # six tokens of three sequences
    alpha, _, phi, chosen = truth(a.cpu().double(), e.cpu().double(), m.cpu().double(), top_k, 0.7)
    shape = (3, lag, 2, top_k or 9)
    last_affinity = torch.zeros(shape, device=DEVICE)
    last_indices = None if top_k is None else torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    for t in range(6):
        update, merge, updated, merged = route_step(a[t], e[t], m[t], last_affinity, last_indices, top_k, 0.7, backend)
        torch.testing.assert_close(merge.cpu().double(), phi[t], rtol=1e-5, atol=1e-6)
        expected = torch.zeros_like(phi[t])
        if t >= lag:
            before = chosen[t - lag]
            rate = e[t].cpu().double().expand(3, 2, 9).gather(-1, before).sigmoid()
            expected = rate * alpha[t - lag]
            assert top_k is None or torch.equal(updated.cpu(), before)
        torch.testing.assert_close(update.cpu().double(), expected, rtol=1e-5, atol=1e-6)
        assert top_k is None or torch.equal(merged.cpu(), chosen[t])


def test_weights_of_other_tokens() -> None:
    """`weigh` has a token's own rates of another's states."""
    rates = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    affinity = torch.rand(2, 1, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[[4, 0, 2]], [[1, 2, 3]]])
    expected = torch.stack([rates[b, 0, indices[b, 0]] for b in range(2)])[:, None].sigmoid() * affinity
    torch.testing.assert_close(weigh(rates, affinity, indices), expected)
    torch.testing.assert_close(weigh(rates[..., :3], affinity, None), rates[..., :3].sigmoid() * affinity)
    assert torch.autograd.gradcheck(lambda r, a: weigh(r, a, indices), (rates, affinity))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [3, 60])
def test_ties_go_to_the_lowest_index(dtype: torch.dtype, rows: int, backend: str) -> None:
    if dtype == torch.float64 and backend == "triton":
        return
    few = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 1.0, 2.0])[torch.randint(6, (rows, 2, 37))].to(dtype).to(DEVICE)
    _, _, _, indices = route(few, few, few, 11, 1.0, backend)
    expected = torch.sort(few.double(), dim=-1, descending=True, stable=True).indices[..., :11]
    assert torch.equal(indices, expected)
    _, _, _, indices = route(torch.zeros_like(few), few, few, 11, 1.0, backend)
    assert torch.equal(indices, torch.arange(11, device=DEVICE).expand_as(indices))


@both
def test_all_selected_equals_dense(backend: str) -> None:
    given = logits((4, 2), 24)
    *dense, nothing = route(*given)
    assert nothing is None
    *sparse, indices = route(*given, 24, 1.0, backend)
    for x, y in zip(sparse, dense, strict=True):
        torch.testing.assert_close(torch.zeros_like(y).scatter(-1, indices, x), y, rtol=1e-6, atol=1e-7)


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, as Triton's interpreter, warns of them
@pytest.mark.parametrize("rows", [4, 110])
def test_what_is_not_finite(rows: int, backend: str) -> None:
    """Whatever the logits, the selected states are distinct; other rows are as they were."""
    given = [x.detach() for x in logits((rows, 1), 20)]
    expected = route(*given, 5, 1.0, backend)
    awkward = given[0].clone()
    nan = torch.tensor(-math.nan if rows == 4 else math.nan)
    awkward[0] = nan
    awkward[1, 0, 7], awkward[1, 0, 11] = nan, math.inf
    awkward[2] = -math.inf
    got = route(awkward, *given[1:], 5, 1.0, backend)
    assert got[3].min() >= 0
    assert got[3].max() < 20
    assert (got[3].sort(-1).values.diff(dim=-1) > 0).all()
    assert got[3][1, 0, :2].tolist() == [7, 11]
    assert got[3][2, 0].tolist() == [0, 1, 2, 3, 4]
    assert got[0][:3].isnan().all()
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x[3:], y[3:])


@both
def test_nothing_to_route(backend: str) -> None:
    given = [torch.randn(0, 5, 2, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
    results = route(*given, 3, 1.0, backend)
    assert all(x.shape == (0, 5, 2, 3) for x in results)
    results[1].sum().backward()
    assert given[0].grad.shape == given[0].shape


@needs_triton
def test_parts_of_one_projection_and_missing_gradients() -> None:
    """Logits are read where they stand, and only what has a gradient sends one back."""
    whole = torch.randn(6, 2 * (9 + 9 + 9), device=DEVICE, requires_grad=True)
    parts = [x.unflatten(-1, (2, 9)) for x in whole.split(18, dim=-1)]
    apart = whole.detach().clone().requires_grad_()
    same = [x.unflatten(-1, (2, 9)).contiguous() for x in apart.split(18, dim=-1)]
    results, expected = (route(*x, 4, 1.0, backend) for x, backend in ((parts, "triton"), (same, "plain")))
    for which in range(3):
        torch.testing.assert_close(results[which], expected[which], rtol=1e-5, atol=1e-6)
        seed = torch.randn_like(results[which])
        got, wanted = (
            torch.autograd.grad(x[which], y, seed, retain_graph=True)[0] for x, y in ((results, whole), (expected, apart))
        )
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    turned = torch.randn(9, 6, 2, device=DEVICE).permute(1, 2, 0)
    torch.testing.assert_close(
        route(turned, turned, turned, 4, 1.0, "triton")[1], route(turned, turned, turned, 4, 1.0, "plain")[1]
    )


@needs_triton
@pytest.mark.parametrize("rates", [1, 10])
def test_operator(rates: int) -> None:
    from factorization_memory.ops.routing.kernels import select

    torch.library.opcheck(select, (*logits((3, 2), 10, rates), 4, 0.7))


@needs_triton
def test_compiled_as_one_graph() -> None:
    given = logits((6, 1), 12)
    compiled = torch.compile(lambda *x: route(*x, 4, 1.0, "triton"), fullgraph=True, backend="aot_eager")
    results, expected = compiled(*given), route(*given, 4, 1.0, "triton")
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)
    got, wanted = (torch.autograd.grad(x[1].square().sum(), given, retain_graph=True) for x in (results, expected))
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)


@both
def test_autocast(backend: str) -> None:
    """Routing of bfloat16 logits is computed in float32, also where autocast is on."""
    given = logits((5, 2), 16, dtype=torch.bfloat16)
    expected = route(*given, 4, 1.0, backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        results = route(*given, 4, 1.0, backend)
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)


@needs_triton
def test_layer_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer, its padding and its gradients are the same whichever routes and convolves."""
    layer = FactorizationMemory(16, num_states=12, top_k=3, num_heads=2, conv_size=4, backend="chunked").to(DEVICE)
    x, mask = torch.randn(2, 9, 16, device=DEVICE), torch.rand(2, 9, device=DEVICE) > 0.3

    def run() -> list[Tensor]:
        layer.zero_grad()
        y, state = layer(x, padding_mask=mask)
        y[mask].square().sum().backward()
        return [y[mask].detach(), state.memory.detach(), *(p.grad.clone() for p in layer.parameters())]

    expected = run()
    monkeypatch.setattr(FactorizationMemory, "_backend_beside", lambda _: "triton")
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"affinity_logits": torch.zeros(4)}, r"affinity_logits: got shape \(4,\), takes \[\.\.\., H, M\]"),
        ({"update_logits": torch.zeros(3, 2, 5)}, r"update_logits: got shape \(3, 2, 5\), takes \(3, 2, 8\) or \(3, 2, 1\)"),
        ({"merge_logits": torch.zeros(3, 2, 1)}, r"merge_logits: got shape \(3, 2, 1\), takes update_logits' "),
        ({"update_logits": torch.zeros(3, 2, 8, device="meta")}, r"update_logits: is on meta, affinity_logits on cpu"),
        ({"top_k": 9}, r"top_k: got 9, takes 1 to M = 8"),
        ({"top_k": 0}, r"top_k: got 0"),
        ({"temperature": 0.0}, r"temperature: got 0\.0, takes a number above 0"),
        ({"backend": "fast"}, r"backend='fast': use one of auto, plain, triton"),
        ({"backend": "triton", "top_k": None}, r"backend='triton': top_k is None, .*; use 'auto', or 'plain'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {name: torch.zeros(3, 2, 8) for name in ("affinity_logits", "update_logits", "merge_logits")}
    with pytest.raises(ValueError, match=message):
        route(**(arguments | {"top_k": 3} | change))


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("states", "top_k"), [(64, 16), (1024, 16), (4096, 64), (16384, 256), (1000, 128)])
def test_large(states: int, top_k: int, dtype: torch.dtype) -> None:
    given = logits((4, 500, 2), states, dtype=dtype)
    results, expected = (route(*x, top_k, 0.7, b) for x, b in ((given, "triton"), ([x.double() for x in given], "plain")))
    assert torch.equal(results[3], expected[3])
    seeds = [torch.randn_like(x) for x in results[:3]]
    for x, y in zip(results[:3], expected[:3], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(results[:3], given, seeds, retain_graph=True)
    wanted = torch.autograd.grad(expected[:3], given, [x.double() for x in seeds])
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
    again = torch.autograd.grad(results[:3], given, seeds)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_in_its_own_dtype(backend: str) -> None:
    """Affinities in bfloat16 do not round the gradients of float32 rates."""
    affinity = torch.randn(6, 1, 9, device=DEVICE).to(torch.bfloat16).float()
    rates = [torch.randn(6, 1, 9, device=DEVICE) for _ in range(2)]
    weights = torch.randn(2, 6, 1, 3, device=DEVICE)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.detach().requires_grad_() for x in (affinity.to(dtype), *rates)]
        _, update, merge, _ = route(*leaves, 3, 1.0, backend if dtype == torch.bfloat16 else "plain")
        results.append(torch.autograd.grad((update * weights[0] + merge * weights[1]).sum(), leaves))
    assert results[0][0].dtype == torch.bfloat16
    for x, y in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
