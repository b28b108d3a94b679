"""The laws of a recurrence, kept by every layer with a state of constant size: the memory layer in all its forms, Mamba-2's and
Gated DeltaNet's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factorization_memory import FactorizationMemory
from factorization_memory.config import GatedDeltaNetConfig, Mamba2Config
from factorization_memory.layers import GatedDeltaNet, LayerStateBase, Mamba2

MEMORY: dict[str, dict[str, Any]] = {
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
MAMBA2 = {
    "one group": Mamba2Config(state_size=5, head_size=4, chunk_size=16),
    "groups": Mamba2Config(state_size=4, head_size=4, num_groups=2, chunk_size=7),
    "no convolution": Mamba2Config(state_size=3, head_size=8, expand=1.0, conv_size=1),
}
GATED_DELTA_NET = {
    "as many value heads": GatedDeltaNetConfig(num_heads=2, head_size=4),
    "shared key heads": GatedDeltaNetConfig(num_heads=2, num_value_heads=6, head_size=6, expand_v=0.5),
    "no convolution": GatedDeltaNetConfig(num_heads=1, head_size=8, expand_v=1.0, conv_size=1),
}
FORMS = [
    *(pytest.param("memory", form, id=name.replace(" ", "-")) for name, form in MEMORY.items()),
    *(pytest.param("mamba2", form, id=f"mamba2:-{name}".replace(" ", "-")) for name, form in MAMBA2.items()),
    *(pytest.param("deltanet", form, id=f"deltanet:-{name}".replace(" ", "-")) for name, form in GATED_DELTA_NET.items()),
]


def made(kind: str, form: Any) -> Any:
    """A layer in float64; decays, biases and scales are other than at the start."""
    if kind == "memory":
        return FactorizationMemory(hidden_size=16, num_states=8, **form).double()
    layer: Any = (Mamba2 if kind == "mamba2" else GatedDeltaNet)(16, form).double()
    for parameter in (layer.convolution.bias, layer.norm_weight, *([layer.skip] if kind == "mamba2" else [])):
        nn.init.normal_(parameter)
    nn.init.normal_(layer.step_size_bias, std=2)
    return layer


@pytest.fixture
def layer(kind: str, form: Any) -> Any:
    return made(kind, form)


@pytest.fixture
def x() -> Tensor:
    return nn.functional.rms_norm(torch.randn(3, 70, 16, dtype=torch.float64), (16,))


def assert_same_state(a: LayerStateBase, b: LayerStateBase) -> None:
    for p, q in zip(a.tensors(), b.tensors(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "form"), FORMS)
class TestLaws:
    @pytest.mark.parametrize("cut", [0, 1, 2, 33, 70])
    def test_prefill_and_steps_equal_the_whole(self, layer: Any, x: Tensor, cut: int) -> None:
        whole, final = layer(x)
        y, state = layer(x[:, :cut])
        parts = [y]
        state = state.apply(torch.detach)
        for t in range(cut, min(cut + 5, 70)):
            parts.append(layer.step(x[:, t], state)[:, None])
        before = state.apply(torch.clone)
        y, after = layer(x[:, cut + 5 :], state)
        assert_same_state(before, state)
        torch.testing.assert_close(torch.cat([*parts, y], 1), whole, rtol=1e-10, atol=1e-12)
        assert_same_state(after, final)

    def test_backends_agree(self, layer: Any, x: Tensor) -> None:
        y, final = layer(x)
        layer.backend = "reference"
        again, same = layer(x)
        torch.testing.assert_close(again, y, rtol=1e-10, atol=1e-12)
        assert_same_state(same, final)

    def test_packed_equals_separate(self, layer: Any, x: Tensor) -> None:
        borders = [0, 1, 1, 40, 43, 70, 70]
        _, start = layer(x[:1].expand(6, -1, -1)[:, :9])
        y, final = layer(x[1:2], start, torch.tensor(borders, dtype=torch.int32))
        for n, (first, last) in enumerate(pairwise(borders)):
            one, one_final = layer(x[1:2, first:last], start.apply(lambda s, n=n: s[n : n + 1]))
            torch.testing.assert_close(y[:, first:last], one, rtol=1e-10, atol=1e-12)
            assert_same_state(final.apply(lambda s, n=n: s[n : n + 1]), one_final)
        y, nothing = layer(x[1:2], cu_seqlens=torch.tensor(borders), keep_state=False)
        assert nothing is None
        torch.testing.assert_close(y[:, 1:40], layer(x[1:2, 1:40])[0], rtol=1e-10, atol=1e-12)

    def test_padding_anywhere_is_exact_and_may_hold_anything(self, layer: Any, x: Tensor) -> None:
        mask = torch.rand(3, 70) > 0.4
        mask[0, :20], mask[1, 50:], mask[2] = False, False, False
        mask[2, 30] = True
        spoiled = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
        y, final = layer(spoiled, padding_mask=mask)
        for b in range(3):
            one, one_final = layer(x[b : b + 1, mask[b]])
            torch.testing.assert_close(y[b, mask[b]], one[0], rtol=1e-10, atol=1e-12)
            assert_same_state(final.apply(lambda s, b=b: s[b : b + 1]), one_final)
        for gradient in torch.autograd.grad(y[mask].sum(), [spoiled, *layer.parameters()]):
            assert torch.isfinite(gradient).all()

    def test_gradients_reach_every_parameter_and_the_state(self, layer: Any, x: Tensor) -> None:
        start = layer.initial_state(3).apply(lambda s: (s + 0.1).requires_grad_() if s.is_floating_point() else s)
        y, _ = layer(x, start)
        floats = [tensor for tensor in start.tensors() if tensor.is_floating_point()]
        names = [*(name for name, _ in layer.named_parameters()), *("state" for _ in floats)]
        gradients = torch.autograd.grad(y.square().sum(), [*layer.parameters(), *floats])
        for name, gradient in zip(names, gradients, strict=True):
            assert torch.isfinite(gradient).all(), name
            assert gradient.numel() == 0 or gradient.abs().sum() > 0, name

    def test_a_state_holds_no_more_than_its_bytes(self, layer: Any, x: Tensor) -> None:
        """However long the stretch that made it, a carried state keeps nothing else alive, and is nobody else's."""
        _, state = layer(x)
        assert state.batch_size == 3
        for tensor in state.tensors():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        _, same = layer(x[:, :0], state)
        for a, b in zip(same.tensors(), state.tensors(), strict=True):
            assert torch.equal(a, b)
            assert a.numel() == 0 or a.data_ptr() != b.data_ptr()

    def test_zero_is_empty(self, layer: Any, x: Tensor) -> None:
        torch.testing.assert_close(layer(x, layer.initial_state(3))[0], layer(x)[0], rtol=1e-12, atol=1e-14)

    def test_a_step_between_forward_and_backward(self, layer: Any, x: Tensor) -> None:
        y, state = layer(x)
        layer.step(x[:, 0], state.apply(torch.detach))
        y.sum().backward()

    def test_no_token_sees_later_ones(self, layer: Any, x: Tensor) -> None:
        y, _ = layer(x)
        for t in (0, 1, 30, 69):
            other = x.clone()
            other[:, t + 1 :] = torch.randn_like(other[:, t + 1 :])
            changed, _ = layer(other)
            torch.testing.assert_close(changed[:, : t + 1], y[:, : t + 1], rtol=1e-10, atol=1e-12)
            assert t == 69 or not torch.allclose(changed[:, t + 1 :], y[:, t + 1 :])

    def test_a_batch_is_its_sequences(self, layer: Any, x: Tensor) -> None:
        y, state = layer(x)
        for n in range(3):
            alone, own = layer(x[n : n + 1])
            torch.testing.assert_close(y[n : n + 1], alone, rtol=1e-10, atol=1e-12)
            assert_same_state(state.apply(lambda s, n=n: s[n : n + 1]), own)

    def test_no_sequences(self, layer: Any) -> None:
        y, state = layer(torch.zeros(0, 5, 16, dtype=torch.float64))
        assert y.shape == (0, 5, 16)
        assert layer.step(torch.zeros(0, 16, dtype=torch.float64), state).shape == (0, 16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "form"), [("mamba2", MAMBA2["groups"]), ("deltanet", GATED_DELTA_NET["shared key heads"])])
def test_compiles_as_one_graph(layer: Any, packed: bool, x: Tensor) -> None:
    x = x[:1, :50]
    arguments = {"cu_seqlens": torch.tensor([0, 20, 20, 50])} if packed else {}
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for function in (layer, compiled):
        y, state = function(x, **arguments)
        loss = y.square().sum() + state.memory.square().sum()
        results.append([y, *state.tensors(), *torch.autograd.grad(loss, list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
