"""Routing in a layer: whole sequences and single tokens, with a lag and without; how it starts; one product for all logits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factorization_memory import FactorizationMemory
from factorization_memory.layers import projection
from factorization_memory.layers.routing import Routing, delayed, initialise_rates, route_sequences, route_token

FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse, heads": {"num_heads": 4, "top_k": 2},
    "rates of a head": {"rates": "head", "temperature": 0.5},
    "associative": {"update_lag": 1, "top_k": 3, "temperature": 0.7},
}


@pytest.fixture(params=FORMS, ids=lambda name: name.replace(" ", "-"))
def layer(request: pytest.FixtureRequest) -> FactorizationMemory:
    return FactorizationMemory(hidden_size=16, num_states=8, **FORMS[request.param]).double()


@pytest.fixture
def x() -> Tensor:
    return torch.nn.functional.rms_norm(torch.randn(3, 70, 16, dtype=torch.float64), (16,))


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("how", ["whole", "packed", "padded"])
def test_delayed_by_a_lag(lag: int, how: str) -> None:
    """Each sequence by itself, token by token; some are shorter than the lag, and one has no tokens."""
    borders = [0, 4, 4, 5, 11]
    mask = torch.rand(4, 11) > 0.4
    mask[0], mask[1, 1:] = False, False
    batch, sequences = (1, 4) if how == "packed" else (4, 4)
    x = torch.randn(batch, 11, 2, dtype=torch.float64, requires_grad=True)
    last = torch.randn(sequences, lag, 2, dtype=torch.float64, requires_grad=True)
    y, final = delayed(
        x, last, torch.tensor(borders) if how == "packed" else None, padding_mask=mask if how == "padded" else None
    )
    found, expected = [], []
    for n in range(sequences):
        row, places = (0, slice(*borders[n : n + 2])) if how == "packed" else (n, mask[n] if how == "padded" else slice(None))
        known = torch.cat((last[n], x[row, places]))
        found += [y[row, places], final[n]]
        expected += [known[: len(known) - lag], known[len(known) - lag :]]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    weights = [torch.randn_like(part) for part in expected]
    gradients = (
        torch.autograd.grad(sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)), (x, last))
        for parts in (found, expected)
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert final.untyped_storage().data_ptr() != last.untyped_storage().data_ptr()


def none_before(batch: int, lag: int, heads: int, chosen: int, sparse: bool) -> tuple[Tensor | None, Tensor | None]:
    """The selection that the initial state carries."""
    if not lag:
        return None, None
    shape = (batch, lag, heads, chosen)
    return torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64) if sparse else None


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("rates", [1, 6])
def test_a_sequence_is_routed_as_its_tokens_are(lag: int, top_k: int | None, rates: int) -> None:
    batch, length, heads, states = 2, 7, 2, 6
    logits = [torch.randn(batch, length, heads, width, dtype=torch.float64) for width in (states, rates, rates)]
    start = none_before(batch, lag, heads, top_k or states, top_k is not None)
    routing, *final = route_sequences(*logits, *start, None, None, top_k, 0.7, "plain")
    update, merge = routing.of_all_states()
    carried = [None if tensor is None else tensor.clone() for tensor in start]
    for t in range(length):
        theta, phi, updated, merged = route_token(*(part[:, t] for part in logits), *carried, top_k, 0.7, "plain")
        one = Routing(phi, theta, phi, merged, updated, states)
        found = one.of_all_states()
        torch.testing.assert_close(found, (update[:, t], merge[:, t]))
        assert (one.merge_indices is None) == (not lag or top_k is None)
    for tensor, expected in zip(carried, final, strict=True):
        assert (tensor is None) == (expected is None)
        if tensor is not None:
            torch.testing.assert_close(tensor, expected)


def test_padding_has_no_weight() -> None:
    logits = [torch.randn(2, 5, 1, 4, dtype=torch.float64) for _ in range(3)]
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    routing, *_ = route_sequences(*logits, None, None, None, mask, 2, 1.0, "plain")
    for weights in (routing.update, routing.merge):
        assert torch.equal((weights != 0).any(-1)[..., 0], mask)
    assert routing.padding_mask is mask


@pytest.mark.parametrize(("heads", "per_head"), [(1, 5), (3, 4), (3, 1), (1, 1)])
def test_initial_rates(heads: int, per_head: int) -> None:
    """The logits of the update rates are evenly spaced from the first to the last, over the states or else over the heads."""
    update, merge = nn.Linear(64, heads * per_head), nn.Linear(64, heads * per_head)
    initialise_rates(update, merge, heads, (0.1, 0.8))
    bias = update.bias.detach().view(heads, per_head)
    ends = torch.tensor([0.1, 0.8]).logit()
    if per_head > 1:
        assert torch.equal(bias, bias[:1].expand_as(bias))
        bias = bias[0]
    bias = bias.flatten()
    torch.testing.assert_close(bias[[0, -1]], ends if len(bias) > 1 else ends.mean().expand(2))
    assert all(abs(b - a - (ends[1] - ends[0]) / (len(bias) - 1)) < 1e-5 for a, b in pairwise(bias.tolist()))
    assert not merge.bias.any()


def test_one_product_routes_as_three(layer: FactorizationMemory, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training on a GPU does, one product with all weights, gives the same outputs and gradients, compiled too."""
    torch.nn.init.normal_(layer.update_rate.bias)
    mask = torch.rand(3, 70) > 0.2
    projections = [layer.affinity, layer.update_rate, layer.merge_rate]
    leaves = [x.requires_grad_(), *(p for each in projections for p in each.parameters())]

    def run(route: Any) -> list[Tensor]:
        routing, *_ = route(x, padding_mask=mask)
        loss = routing.affinity.square().sum() + routing.update.exp().sum() + (3 * routing.merge).exp().sum()
        return [routing.affinity, routing.update, routing.merge, *torch.autograd.grad(loss, leaves)]

    expected = run(layer.route)
    products = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(projection, "as_one", lambda x, projections: True)
    with monkeypatch.context() as counting:
        counting.setattr(torch.nn.functional, "linear", lambda *arguments: (products.append(1), linear(*arguments))[1])
        results = [run(layer.route)]
    assert len(products) == 1
    torch._dynamo.reset()
    results.append(run(torch.compile(layer.route, fullgraph=True, backend="aot_eager")))
    for result in results:
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_one_product_under_autocast(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, which keeps what it made of weights, notices that they have changed."""
    layer, x = FactorizationMemory(16, num_states=8), x.float()
    expected, *_ = layer.route(x)
    monkeypatch.setattr(projection, "as_one", lambda x, projections: True)
    with torch.autocast("cpu", torch.bfloat16):
        before, *_ = layer.route(x)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
        after, *_ = layer.route(x)
    torch.testing.assert_close(before.update, expected.update, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(after.update, torch.full_like(after.update, 0.5 / 8))


def test_when_one_product_routes(x: Tensor) -> None:
    layer = FactorizationMemory(16, num_states=8)
    projections = [layer.affinity, layer.update_rate, layer.merge_rate]
    assert not projection.as_one(x, projections)
    if torch.cuda.is_available():
        assert projection.as_one(x.cuda(), projections)
        with torch.no_grad():
            assert not projection.as_one(x.cuda(), projections)


def test_kept_affinities_sum_to_one(x: Tensor) -> None:
    for form in ({"top_k": 3}, {}):
        routing, *_ = FactorizationMemory(16, num_states=8, **form).double().route(x)
        torch.testing.assert_close(routing.affinity.sum(-1), torch.ones(3, 70, 1, dtype=torch.float64))
        assert (routing.update <= routing.affinity).all()


def test_initial_routing_and_time_scales() -> None:
    """Routing starts as sharp as asked for and on all states; update rates spread over the range asked for."""
    layer = FactorizationMemory(64, num_states=32, affinity_init=1.0, update_rate_init=(0.05, 0.95))
    x = torch.nn.functional.rms_norm(torch.randn(1, 4000, 64), (64,))
    assert abs(layer.affinity(x).std().item() - 1) < 0.1
    share = layer.route(x)[0].affinity.mean((0, 1))
    assert share.min() > 0.3 / 32
    assert share.max() < 3 / 32
    rates = layer.update_rate(x).sigmoid().mean((0, 1))
    torch.testing.assert_close(rates[[0, -1]], torch.tensor([0.05, 0.95]), atol=0.02, rtol=0)
    assert (rates.diff() > 0).all()


@pytest.mark.parametrize("lag", [1, 2])
def test_the_first_tokens_update_nothing(lag: int, x: Tensor) -> None:
    """Nor do they when they come after padding, or begin a packed sequence."""
    layer = FactorizationMemory(16, 8, top_k=3, update_lag=lag).double()
    for length in range(lag + 2):
        _, state = layer(x[:, :length])
        assert bool(state.memory.any()) == (length > lag)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, : 9 - lag] = False
    assert not layer(x[:, :9], padding_mask=mask)[1].memory.any()
    assert not layer(x[:1, : 3 * lag], cu_seqlens=torch.arange(0, 3 * lag + 1, lag))[1].memory.any()
