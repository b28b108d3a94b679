"""The layer: every form of it keeps the laws of a recurrence, and starts as it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from factorization_memory import FactorizationMemory
from factorization_memory.config import ConfigError
from factorization_memory.layers import LayerState

FORMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "sparse": {"top_k": 3},
    "rates of a head": {"rates": "head", "temperature": 0.5},
    "heads": {"num_heads": 4, "top_k": 2},
    "convolution": {"conv_size": 4, "output_gate": True, "top_k": 4, "num_heads": 2},
    "values skip": {"value_skip": True, "conv_size": 3, "top_k": 3, "num_heads": 2},
    "associative, dense": {"update_lag": 1},
    "associative": {"update_lag": 1, "top_k": 3, "temperature": 0.7},
    "associative, all": {
        "update_lag": 1, "top_k": 3, "rates": "head", "conv_size": 4, "value_skip": True, "output_gate": True, "num_heads": 2,
    },
    "a lag of 3": {"update_lag": 3, "top_k": 2, "num_heads": 2, "conv_size": 2},
}  # fmt: skip


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
    start = layer.initial_state(3).apply(lambda s: (s + 0.1).requires_grad_() if s.is_floating_point() else s)
    y, _ = layer(x, start)
    floats = [tensor for tensor in start.tensors() if tensor.is_floating_point()]
    names = [*(name for name, _ in layer.named_parameters()), *("state" for _ in floats)]
    gradients = torch.autograd.grad(y.square().sum(), [*layer.parameters(), *floats])
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, name


def test_backends_agree(layer: FactorizationMemory, x: torch.Tensor) -> None:
    y, _ = layer(x)
    layer.backend = "reference"
    torch.testing.assert_close(layer(x)[0], y, rtol=1e-10, atol=1e-12)


def test_all_states_kept_equals_dense(x: torch.Tensor) -> None:
    dense = FactorizationMemory(16, num_states=8).double()
    same = FactorizationMemory(16, num_states=8, top_k=8).double()
    same.load_state_dict(dense.state_dict())
    torch.testing.assert_close(same(x)[0], dense(x)[0], rtol=1e-12, atol=1e-13)


def test_padding_mask_with_packing_is_refused(x: torch.Tensor) -> None:
    layer = FactorizationMemory(16, num_states=8).double()
    with pytest.raises(ValueError, match="padding_mask: not together with cu_seqlens"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 70]), padding_mask=torch.ones(1, 70, dtype=torch.bool))


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


@pytest.mark.parametrize("update_lag", [0, 1])
@pytest.mark.parametrize("where", ["forward", "forward and backward"])
def test_autocast(where: str, update_lag: int, x: torch.Tensor) -> None:
    """Backward may stand inside the autocast block or outside; both give the gradients of float32 to bfloat16's precision."""
    layer = FactorizationMemory(16, num_states=8, top_k=3, num_heads=2, conv_size=3, update_lag=update_lag, output_gate=True)
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


def test_values_that_skip_the_memory_are_added_to_what_was_normalised(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    with_skip = FactorizationMemory(hidden_size=16, num_states=8, top_k=3, conv_size=3, value_skip=True).double()
    without = FactorizationMemory(hidden_size=16, num_states=8, top_k=3, conv_size=3).double()
    assert (with_skip.skip == 1).all()
    torch.nn.init.normal_(with_skip.skip)
    weights = with_skip.state_dict()
    skip = weights.pop("skip")
    without.load_state_dict(weights)
    value, _ = without.convolution(without.value(x))
    torch.testing.assert_close(with_skip(x)[0], without(x)[0] + without.output(value * skip), rtol=1e-10, atol=1e-12)


def test_a_step_touches_no_other_state() -> None:
    """Those that are neither updated nor read may even hold what is not finite; those that are read alone stay as they are."""
    torch.manual_seed(0)
    layer = FactorizationMemory(16, 32, top_k=2, update_lag=1)
    x, (_, state) = torch.randn(3, 16), layer(torch.randn(3, 5, 16))
    state = state.apply(torch.detach)
    routing, *_ = layer.route(x[:, None], state)
    update, merge = (weights[:, 0] for weights in routing.of_all_states())
    updated, touched = update != 0, (update != 0) | (merge != 0)
    assert touched.sum(-1).max() == 4
    expected = layer.step(x, clean := state.apply(torch.clone))
    assert torch.equal(clean.memory[~updated], state.memory[~updated])
    assert not torch.equal(clean.memory[updated], state.memory[updated])
    state.memory[~touched] = torch.nan
    torch.testing.assert_close(layer.step(x, state), expected)


def written_out(layer: FactorizationMemory, x: torch.Tensor) -> torch.Tensor:
    """The layer of one head without additions, token by token and state by state, from its formulas."""
    states, lag, width = layer.num_states, layer.update_lag, layer.head_size
    outputs = []
    for tokens in x:
        memory, alphas = torch.zeros(states, width, dtype=x.dtype), []
        for t, token in enumerate(tokens):
            logits = layer.affinity(token) / layer.temperature
            chosen = sorted(range(states), key=lambda j, logits=logits: -logits[j].item())[: layer.top_k or states]
            alpha = torch.zeros(states, dtype=x.dtype)
            alpha[chosen] = logits[chosen].softmax(0)
            alphas.append(alpha)
            before = alphas[t - lag] if t >= lag else torch.zeros_like(alpha)
            theta = layer.update_rate(token).sigmoid() * before
            phi = layer.merge_rate(token).sigmoid() * alpha
            memory = (1 - theta)[:, None] * memory + theta[:, None] * layer.value(token)
            merged = phi @ memory
            outputs.append(layer.output(merged / (merged.square().mean() + layer.norm_eps).sqrt() * layer.norm_weight))
    return torch.stack(outputs).view(*x.shape)


@pytest.mark.parametrize("rates", ["head", "state"])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_what_the_layer_computes(lag: int, top_k: int | None, rates: Any, x: torch.Tensor) -> None:
    layer = FactorizationMemory(16, 8, top_k, update_lag=lag, rates=rates, temperature=0.7).double()
    torch.nn.init.normal_(layer.norm_weight)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:, :9])[0], written_out(layer, x[:, :9]), rtol=1e-10, atol=1e-10)


def test_no_token_sees_later_ones(layer: FactorizationMemory, x: torch.Tensor) -> None:
    y, _ = layer(x)
    for t in (0, 1, 30, 69):
        other = x.clone()
        other[:, t + 1 :] = torch.randn_like(other[:, t + 1 :])
        torch.testing.assert_close(layer(other)[0][:, : t + 1], y[:, : t + 1], rtol=1e-10, atol=1e-12)


def test_batch_equals_single(layer: FactorizationMemory, x: torch.Tensor) -> None:
    y, _ = layer(x)
    for b in range(3):
        torch.testing.assert_close(layer(x[b : b + 1])[0][0], y[b], rtol=1e-10, atol=1e-12)


def test_what_followed_a_token_is_found_by_it() -> None:
    """One token, one state: A B C A finds what was written after the first A, which is B's value; without a lag, A's own."""
    values = torch.eye(4, dtype=torch.float64)
    for lag, found in ((0, 0), (1, 1)):
        layer = FactorizationMemory(4, 4, top_k=1, expand=1, update_lag=lag, rates="head").double()
        with torch.no_grad():
            layer.affinity.weight.copy_(values)
            layer.value.weight.copy_(values)
            layer.output.weight.copy_(values)
            layer.update_rate.bias.fill_(30)  # a full overwrite
        y, _ = layer(values[[0, 1, 2, 0]][None])
        assert y[0, -1].argmax() == found


@pytest.mark.parametrize("lag", [-1, 1.0, True, "1", None])
def test_a_lag_that_cannot_be(lag: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.update_lag={lag!r}: use 0 \(the paper's form\), 1"):
        FactorizationMemory(16, 8, update_lag=lag)


@pytest.mark.parametrize("name", ["rates", "backend"])
def test_words_that_are_none_of_the_choices(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{name}='foo': use one of"):
        FactorizationMemory(16, 8, **{name: "foo"})  # type: ignore[arg-type]
