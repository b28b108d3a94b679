"""The layer: every form of it keeps the laws of a recurrence, and starts as it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from factorization_memory import FactorizationMemory
from factorization_memory.config import ConfigError
from factorization_memory.layers import LayerState, ModelState, projection
from factorization_memory.layers import factorization_memory as layer_module

FORMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "sparse": {"top_k": 3},
    "threshold": {"affinity_threshold": 0.1, "rates": "head"},
    "heads": {"num_heads": 4, "top_k": 2, "norm": "head"},
    "convolution": {"conv_size": 4, "output_gate": True, "top_k": 4, "num_heads": 2},
    "convolved input": {"conv_size": 4, "conv_input": "layer", "top_k": 4, "num_heads": 2},
    "both convolved": {"conv_size": 4, "conv_input": "both", "top_k": 4, "num_heads": 2, "output_gate": True},
    "values skip": {"value_skip": True, "conv_size": 3, "conv_input": "both", "top_k": 3, "num_heads": 2, "norm": "head"},
    "values skip, paper": {"value_skip": True, "norm": "none"},
    "state norm": {"norm": "state", "top_k": 3, "conv_size": 2},
    "no norm": {"norm": "none", "temperature": 0.5},
    "separate query": {"query": "separate", "top_k": 3, "num_heads": 2, "temperature": 0.7},
    "separate query, threshold": {"query": "separate", "affinity_threshold": 0.1, "rates": "head"},
    "own selection": {"query": "separate", "top_k": 2, "merge_top_k": 3, "num_heads": 2, "temperature": 0.7},
    "own selection, all touched": {"query": "separate", "top_k": 4, "merge_top_k": 6, "rates": "head"},
    "own selection, linear": {"query": "linear", "top_k": 3, "merge_top_k": 2, "conv_size": 3, "conv_input": "both"},
    "linear query": {"query": "linear", "affinity_threshold": 0.1},
    "gated linear attention": {"affinity": "none", "query": "linear", "num_heads": 2, "norm": "head", "output_gate": True},
    "rates alone": {"affinity": "none"},
}


@pytest.fixture(params=FORMS, ids=lambda name: name.replace(" ", "-"))
def layer(request: pytest.FixtureRequest) -> FactorizationMemory:
    return FactorizationMemory(hidden_size=16, num_states=8, **FORMS[request.param]).double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.nn.functional.rms_norm(torch.randn(3, 70, 16, dtype=torch.float64), (16,))


def assert_same_state(a: LayerState, b: LayerState) -> None:
    for p, q in zip(a.tensors(), b.tensors(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 2, 33, 69])
def test_prefill_and_steps_equal_the_whole(layer: FactorizationMemory, x: torch.Tensor, cut: int) -> None:
    whole, final = layer(x)
    y, state = layer(x[:, :cut])
    parts = [y]
    state = state.apply(torch.detach)
    for t in range(cut, min(cut + 5, 70)):
        parts.append(layer.step(x[:, t], state)[:, None])
    if cut + 5 < 70:
        y, state = layer(x[:, cut + 5 :], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    assert_same_state(state, final)


def test_packed_equals_separate(layer: FactorizationMemory, x: torch.Tensor) -> None:
    borders = [0, 1, 1, 40, 43, 70]
    _, start = layer(x[:1].expand(5, -1, -1)[:, :9])
    y, final = layer(x[1:2], start, torch.tensor(borders, dtype=torch.int32))
    for n in range(5):
        part = slice(borders[n], borders[n + 1])
        one, one_final = layer(x[1:2, part], start.apply(lambda s, n=n: s[n : n + 1]))
        torch.testing.assert_close(y[:, part], one, rtol=1e-10, atol=1e-12)
        assert_same_state(final.apply(lambda s, n=n: s[n : n + 1]), one_final)


def test_padding_anywhere_is_exact(layer: FactorizationMemory, x: torch.Tensor) -> None:
    mask = torch.rand(3, 70) > 0.4
    mask[0, :20], mask[1, 50:] = False, False
    mask[2] = False
    mask[2, 30] = True
    y, final = layer(x, padding_mask=mask)
    for b in range(3):
        one, one_final = layer(x[b : b + 1, mask[b]])
        torch.testing.assert_close(y[b, mask[b]], one[0], rtol=1e-10, atol=1e-12)
        assert_same_state(final.apply(lambda s, b=b: s[b : b + 1]), one_final)


def test_gradients_reach_every_parameter_and_the_state(layer: FactorizationMemory, x: torch.Tensor) -> None:
    state = LayerState(*(s.requires_grad_() for s in layer.initial_state(3).apply(lambda s: s + 0.1).tensors()))
    y, _ = layer(x, state)
    names = [name for name, _ in layer.named_parameters()]
    leaves = [*layer.parameters(), *state.tensors()]
    for name, gradient in zip([*names, *("state",) * 2], torch.autograd.grad(y.square().sum(), leaves), strict=False):
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, name


def test_one_product_routes_as_three(layer: FactorizationMemory, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training on a GPU does, one product with all weights, gives the same outputs and gradients, compiled too."""
    torch.nn.init.normal_(layer.update_rate.bias)
    mask = torch.rand(3, 70) > 0.2
    every = (layer.affinity, layer.update_rate, layer.merge_rate, layer.query)
    projections = [each for each in every if each is not None]
    leaves = [x.requires_grad_(), *(p for each in projections for p in each.parameters())]

    def run(route: Any) -> list[torch.Tensor]:
        routing = route(x, mask)
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


def test_one_product_under_autocast(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, which keeps what it made of weights, notices that they have changed."""
    layer, x = FactorizationMemory(16, num_states=8), x.float()
    expected = layer.route(x)
    monkeypatch.setattr(projection, "as_one", lambda x, projections: True)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer.route(x)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
        after = layer.route(x)
    torch.testing.assert_close(before.update, expected.update, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(after.update, torch.full_like(after.update, 0.5 / 8))


def test_when_one_product_routes(x: torch.Tensor) -> None:
    layer = FactorizationMemory(16, num_states=8)
    every = (layer.affinity, layer.update_rate, layer.merge_rate, layer.query)
    projections = [each for each in every if each is not None]
    assert not projection.as_one(x, projections)
    if torch.cuda.is_available():
        assert projection.as_one(x.cuda(), projections)
        with torch.no_grad():
            assert not projection.as_one(x.cuda(), projections)


def test_backends_agree(layer: FactorizationMemory, x: torch.Tensor) -> None:
    y, _ = layer(x)
    layer.backend = "reference"
    torch.testing.assert_close(layer(x)[0], y, rtol=1e-10, atol=1e-12)


def test_all_states_kept_equals_dense(x: torch.Tensor) -> None:
    dense = FactorizationMemory(16, num_states=8).double()
    for form in ({"top_k": 8}, {"affinity_threshold": 0.0}):
        same = FactorizationMemory(16, num_states=8, **form).double()
        same.load_state_dict(dense.state_dict())
        torch.testing.assert_close(same(x)[0], dense(x)[0], rtol=1e-12, atol=1e-13)


def test_kept_affinities_sum_to_one(x: torch.Tensor) -> None:
    for form in ({"top_k": 3}, {"affinity_threshold": 0.2}, {}):
        routing = FactorizationMemory(16, num_states=8, **form).double().route(x)
        torch.testing.assert_close(routing.affinity.sum(-1), torch.ones(3, 70, 1, dtype=torch.float64))
        assert (routing.update <= routing.affinity).all()


def test_threshold_keeps_at_least_one_state(x: torch.Tensor) -> None:
    routing = FactorizationMemory(16, num_states=8, affinity_threshold=1.0).double().route(x)
    assert ((routing.affinity > 0).sum(-1) == 1).all()


def test_initial_routing_and_time_scales() -> None:
    """Routing starts as sharp as asked for and on all states; update rates spread over the range asked for."""
    layer = FactorizationMemory(64, num_states=32, affinity_init=1.0, update_rate_init=(0.05, 0.95))
    x = torch.nn.functional.rms_norm(torch.randn(1, 4000, 64), (64,))
    assert abs(layer.affinity(x).std().item() - 1) < 0.1
    share = layer.route(x).affinity.mean((0, 1))
    assert share.min() > 0.3 / 32
    assert share.max() < 3 / 32
    rates = layer.update_rate(x).sigmoid().mean((0, 1))
    torch.testing.assert_close(rates[[0, -1]], torch.tensor([0.05, 0.95]), atol=0.02, rtol=0)
    assert (rates.diff() > 0).all()


def test_padding_mask_with_packing_is_refused(x: torch.Tensor) -> None:
    layer = FactorizationMemory(16, num_states=8).double()
    with pytest.raises(ValueError, match="padding_mask: not together with cu_seqlens"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 70]), padding_mask=torch.ones(1, 70, dtype=torch.bool))


def test_state_container() -> None:
    layer = FactorizationMemory(16, num_states=8, conv_size=4)
    _, one = layer(torch.randn(3, 5, 16))
    state = ModelState([one.apply(torch.detach), layer.initial_state(3)])
    assert (state.batch_size, len(state)) == (3, 2)
    assert state.num_bytes == 2 * 4 * (3 * 8 * 32 + 3 * 3 * 32)
    copy = state.clone()
    copy.layers[0].memory.zero_()
    assert state.layers[0].memory.abs().sum() > 0
    chosen = state.select([2, 0, 0])
    for a, b in zip(chosen.tensors(), state.tensors(), strict=True):
        assert torch.equal(a, b[[2, 0, 0]])
    for a, b in zip(state.place([4, 1, 0], 5).tensors(), state.tensors(), strict=True):
        assert torch.equal(a[[4, 1, 0]], b)
        assert not a[2:4].any()
    for a, b in zip(state.reset(torch.tensor([True, False, False])).tensors(), state.tensors(), strict=True):
        assert not a[0].any()
        assert torch.equal(a[1:], b[1:])
    assert not state.detach().layers[0].memory.requires_grad
    assert state.to("cpu").layers[0].memory.device.type == "cpu"


def test_a_state_holds_no_more_than_its_bytes(layer: FactorizationMemory, x: torch.Tensor) -> None:
    """However long the stretch that made it, a carried state keeps nothing else alive, and is nobody else's."""
    _, state = layer(x)
    for tensor in state.tensors():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    _, same = layer(x[:, :0], state)
    for a, b in zip(same.tensors(), state.tensors(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_a_step_between_forward_and_backward(layer: FactorizationMemory, x: torch.Tensor) -> None:
    y, state = layer(x)
    layer.step(x[:, 0], state.apply(torch.detach))
    y.sum().backward()


def test_padding_may_hold_anything(layer: FactorizationMemory, x: torch.Tensor) -> None:
    mask = torch.rand(3, 70) > 0.4
    y, _ = layer(x, padding_mask=mask)
    spoiled = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    again, final = layer(spoiled, padding_mask=mask)
    torch.testing.assert_close(again[mask], y[mask])
    assert all(torch.isfinite(s).all() for s in final.tensors())
    for gradient in torch.autograd.grad(again[mask].sum(), [spoiled, *layer.parameters()], allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


@pytest.mark.parametrize("conv_input", ["value", "both"])
@pytest.mark.parametrize("where", ["forward", "forward and backward"])
def test_autocast(where: str, conv_input: str, x: torch.Tensor) -> None:
    """Backward may stand inside the autocast block or outside; both give the gradients of float32 to bfloat16's precision."""
    layer = FactorizationMemory(16, num_states=8, top_k=3, num_heads=2, conv_size=3, conv_input=conv_input, output_gate=True)
    x = x.float()
    layer(x)[0].square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x)[0].float().square().sum()
        if where == "forward and backward":
            loss.backward()
    if where == "forward":
        loss.backward()
    for (name, p), e in zip(layer.named_parameters(), expected, strict=True):
        if "affinity" not in name:  # a token whose selection flips under bfloat16 has other gradients there
            assert (p.grad - e).norm() <= 0.2 * e.norm(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3, 5])}, r"cu_seqlens: got \[0, 3, 5\], takes .* from 0 to T = 70"),
        ({"cu_seqlens": torch.tensor([2, 70])}, r"cu_seqlens: got \[2, 70\]"),
        ({"padding_mask": torch.ones(1, 70)}, r"padding_mask: got torch\.float32 \(1, 70\), takes torch\.bool \(1, 70\)"),
        ({"padding_mask": torch.ones(1, 1, dtype=torch.bool)}, r"padding_mask: got torch\.bool \(1, 1\)"),
        (
            {"state": FactorizationMemory(16, num_states=8).double().initial_state(2)},
            r"state\.memory: got shape \(2, 1, 8, 32\)",
        ),
        ({"state": FactorizationMemory(16, num_states=8).initial_state(1)}, r"state\.memory: got dtype torch\.float32"),
        (
            {"state": FactorizationMemory(16, num_states=8, conv_size=2).double().initial_state(1)},
            r"state\.convolution: the state is not of this layer",
        ),
        ({"x": torch.zeros(70, 16)}, r"x: got shape \(70, 16\), takes \[B, T, 16\]"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, x: torch.Tensor) -> None:
    layer = FactorizationMemory(16, num_states=8).double()
    with pytest.raises(ValueError, match=message):
        layer(**({"x": x[:1]} | arguments))
    with pytest.raises(ValueError, match="cu_seqlens: B = 3"):
        layer(x, cu_seqlens=torch.tensor([0, 70]))


def test_a_separate_query_starts_as_a_copy_of_the_affinities() -> None:
    torch.manual_seed(0)
    layer = FactorizationMemory(16, 8, top_k=3, query="separate")
    x = torch.randn(2, 5, 16)
    own = layer.route(x)
    layer.query = None
    torch.testing.assert_close(own.merge, layer.route(x).merge)


def test_a_linear_query_is_of_either_sign_and_rates_alone_are_the_update() -> None:
    torch.manual_seed(0)
    layer = FactorizationMemory(16, 8, affinity="none", query="linear")
    routing = layer.route(x := torch.randn(2, 5, 16))
    assert bool((routing.merge < 0).any())
    torch.testing.assert_close(routing.update.squeeze(-2), layer.update_rate(x).sigmoid())
    for options in ({"top_k": 2}, {"query": "separate"}, {"rates": "head"}, {"affinity_threshold": 0.1}):
        with pytest.raises(ConfigError, match="affinity='none'"):
            FactorizationMemory(16, 8, affinity="none", **options)  # type: ignore[arg-type]


def test_a_selection_of_its_own_reads_what_its_query_asks_for() -> None:
    """Against weights worked out one by one; and it begins as the selection of the update."""
    torch.manual_seed(0)
    layer = FactorizationMemory(16, 8, top_k=2, num_heads=2, query="separate", merge_top_k=3, temperature=0.7).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    shared = FactorizationMemory(16, 8, top_k=3, num_heads=2, temperature=0.7).double()
    shared.load_state_dict({name: weight for name, weight in layer.state_dict().items() if not name.startswith("query")})
    begun = layer.route(x)
    expected = shared.route(x)
    torch.testing.assert_close(begun.of_all_states()[1], expected.of_all_states()[1])
    torch.nn.init.normal_(layer.query.weight)
    routing = layer.route(x)
    assert routing.indices.shape[-1] == 2
    assert routing.merge_indices.shape[-1] == 3
    update, merge = routing.of_all_states()
    logits = {
        name: getattr(layer, name)(x).unflatten(-1, (2, 8)) for name in ("affinity", "query", "update_rate", "merge_rate")
    }
    for name, rate, weights, count in (
        ("affinity", "update_rate", update, 2),
        ("query", "merge_rate", merge, 3),
    ):
        for place in torch.cartesian_prod(*(torch.arange(size) for size in weights.shape[:3])).tolist():
            of_states = logits[name][tuple(place)]
            chosen = sorted(range(8), key=lambda m, of_states=of_states: -of_states[m].item())[:count]
            share = torch.zeros(8, dtype=torch.float64)
            share[chosen] = (of_states[chosen] / 0.7).softmax(-1)
            torch.testing.assert_close(weights[tuple(place)], share * logits[rate][tuple(place)].sigmoid())


def test_a_linear_query_selects_by_size() -> None:
    torch.manual_seed(0)
    layer = FactorizationMemory(16, 8, top_k=2, query="linear", merge_top_k=3)
    routing = layer.route(x := torch.randn(2, 5, 16))
    query = layer.query(x).unflatten(-1, (1, 8))
    least = query.abs().sort(-1, descending=True).values[..., 2:3]
    torch.testing.assert_close(routing.of_all_states()[1], query * (query.abs() >= least))


def test_the_tail_of_another_convolution_is_refused(x: torch.Tensor) -> None:
    both = FactorizationMemory(16, num_states=8, conv_size=3, conv_input="both").double()
    value = FactorizationMemory(16, num_states=8, conv_size=3).double()
    for layer, other, message in (
        (value, both, r"shape \(3, 2, 48\), takes \(3, 2, 32\)"),
        (both, value, r"takes \(3, 2, 48\)"),
    ):
        with pytest.raises(ValueError, match=rf"state\.convolution: got .*{message}"):
            layer(x, other.initial_state(3))


def test_values_that_skip_the_memory_are_added_to_what_was_normalised(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    with_skip = FactorizationMemory(hidden_size=16, num_states=8, top_k=3, conv_size=3, value_skip=True).double()
    without = FactorizationMemory(hidden_size=16, num_states=8, top_k=3, conv_size=3).double()
    assert (with_skip.skip == 1).all()
    torch.nn.init.normal_(with_skip.skip)
    weights = with_skip.state_dict()
    skip = weights.pop("skip")
    without.load_state_dict(weights)
    (value,), _ = without.convolution([without.value(x)])
    torch.testing.assert_close(with_skip(x)[0], without(x)[0] + without.output(value * skip), rtol=1e-10, atol=1e-12)


def test_a_step_touches_no_other_state() -> None:
    """Those that are neither updated nor read may even hold what is not finite; those that are read alone stay as they are."""
    torch.manual_seed(0)
    layer = FactorizationMemory(16, 32, top_k=2, query="separate", merge_top_k=3)
    torch.nn.init.normal_(layer.query.weight)
    x, state = torch.randn(3, 16), layer.initial_state(3)
    state.memory.normal_()
    update, merge = layer.route(x).of_all_states()
    updated, touched = update != 0, (update != 0) | (merge != 0)
    assert touched.sum(-1).max() == 5
    expected = layer.step(x, clean := state.apply(torch.clone))
    assert torch.equal(clean.memory[~updated], state.memory[~updated])
    assert not torch.equal(clean.memory[updated], state.memory[updated])
    state.memory[~touched] = torch.nan
    torch.testing.assert_close(layer.step(x, state), expected)


def test_a_value_that_is_not_finite_stays_out_of_states_that_are_read_alone() -> None:
    """So that rolling back, which restores what was updated, is exact."""
    torch.manual_seed(0)
    layer = FactorizationMemory(16, 8, top_k=2, query="linear", merge_top_k=3)
    state = layer.initial_state(1)
    state.memory.normal_()
    before = state.memory.clone()
    state = layer.keep_undo(state, 2, torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        layer.value.weight.fill_(torch.inf)
    layer.step(torch.randn(1, 16), state)
    assert not torch.isfinite(state.memory).all()
    state.undo.position.add_(1)
    state.undo.roll_back(state, 1)
    assert torch.equal(state.memory, before)


@pytest.mark.parametrize(("top_k", "merge_top_k"), [(4, 6), (8, 2), (2, 8), (3, 4)])
def test_a_backend_that_takes_a_selection_gets_one(top_k: int, merge_top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = FactorizationMemory(16, 8, top_k=top_k, query="separate", merge_top_k=merge_top_k).double()
    torch.nn.init.normal_(layer.query.weight)
    x, recurrence, seen = torch.randn(2, 9, 16, dtype=torch.float64), layer_module.ops.recurrence_unchecked, []
    expected, _ = layer(x)

    def chunked(*given: Any) -> Any:
        seen.append(given[3])
        return recurrence(*given[:-1], "chunked")

    monkeypatch.setattr(layer_module.ops, "recurrence_unchecked", chunked)
    layer.backend = "triton-sparse"
    torch.testing.assert_close(layer(x)[0], expected)
    assert seen[0].shape[-1] == min(8, top_k + merge_top_k)


def test_many_states_take_the_sparse_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a share of untouched states on, whole sequences are given the touched ones alone, with the same result."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"top_k": 1, "num_heads": 2, "query": "separate", "merge_top_k": 2}
    layer = FactorizationMemory(16, 3 * layer_module.LEAST_SKIPPED, **options).double()
    torch.nn.init.normal_(layer.query.weight)
    x, seen = torch.randn(2, 9, 16, dtype=torch.float64), []
    recurrence = layer_module.ops.recurrence_unchecked
    monkeypatch.setattr(layer_module.ops, "recurrence_unchecked", lambda *given: (seen.append(given[3]), recurrence(*given))[1])
    sparse, final = layer(x)
    monkeypatch.setattr(layer_module, "LEAST_SKIPPED", 1000)
    dense, expected = layer(x)
    assert seen[0].shape == (2, 9, 2, 3)
    assert seen[1] is None
    torch.testing.assert_close(sparse, dense)
    torch.testing.assert_close(final.memory, expected.memory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_top_k": 2, "query": "separate"}, "merge_top_k=2: use it with top_k"),
        ({"merge_top_k": 2, "top_k": 2}, "merge_top_k=2: use it with query="),
        ({"merge_top_k": 9, "top_k": 2, "query": "linear"}, "merge_top_k=9: use 1 to num_states=8"),
        ({"conv_input": "both"}, "conv_input='both': there is no convolution"),
    ],
)
def test_selections_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FactorizationMemory(16, 8, **options)
