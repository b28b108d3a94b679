"""The memory layer: its formulas, what its options add to them, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from factorization_memory import FactorizationMemory
from factorization_memory.config import ConfigError


@pytest.fixture
def x() -> torch.Tensor:
    return torch.nn.functional.rms_norm(torch.randn(3, 70, 16, dtype=torch.float64), (16,))


def test_all_states_kept_equals_dense(x: torch.Tensor) -> None:
    dense = FactorizationMemory(16, num_states=8).double()
    same = FactorizationMemory(16, num_states=8, top_k=8).double()
    same.load_state_dict(dense.state_dict())
    torch.testing.assert_close(same(x)[0], dense(x)[0], rtol=1e-12, atol=1e-13)


def test_padding_mask_with_packing_is_refused(x: torch.Tensor) -> None:
    layer = FactorizationMemory(16, num_states=8).double()
    with pytest.raises(ValueError, match="padding_mask: cannot be combined with cu_seqlens"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 70]), padding_mask=torch.ones(1, 70, dtype=torch.bool))


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
            r"state\.convolution: the state is not from this layer",
        ),
        ({"x": torch.zeros(70, 16)}, r"x: got shape \(70, 16\), takes \[B, T, 16\]"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, x: torch.Tensor) -> None:
    layer = FactorizationMemory(16, num_states=8).double()
    with pytest.raises(ValueError, match=message):
        layer(**({"x": x[:1]} | arguments))
    with pytest.raises(ValueError, match="cu_seqlens: got B = 3"):
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
