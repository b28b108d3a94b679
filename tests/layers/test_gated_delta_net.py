"""Gated DeltaNet's layer: the start it should have, and transformers' implementation as a witness."""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factorization_memory.config import ConfigError, GatedDeltaNetConfig
from factorization_memory.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetState

AS_MANY = GatedDeltaNetConfig(num_heads=2, head_size=4)
SHARED = GatedDeltaNetConfig(num_heads=2, num_value_heads=6, head_size=6, expand_v=0.5)


@pytest.fixture
def x() -> Tensor:
    return nn.functional.rms_norm(torch.randn(3, 50, 16, dtype=torch.float64), (16,))


def test_initial_decay_and_step_size() -> None:
    layer = GatedDeltaNet(256, GatedDeltaNetConfig(num_heads=256, head_size=1))
    step_size = nn.functional.softplus(layer.step_size_bias)
    assert 0.99e-3 < step_size.min() < 1.3e-3
    assert 0.08 < step_size.max() < 1.01e-1
    assert abs(step_size.log().mean().item() - torch.tensor(1e-2).log().item()) < 0.2
    rate = layer.log_decay_rate.exp()
    assert 0.01 <= rate.min() < 0.3
    assert 15.5 < rate.max() <= 16
    assert (layer.norm_weight == 1).all()


def test_sizes() -> None:
    """As many heads as make the keys 3/4 of the width, unless told otherwise; a convolution over queries, keys and values."""
    layer = GatedDeltaNet(512)
    assert (layer.num_heads, layer.num_value_heads, layer.head_size, layer.value_head_size) == (3, 3, 128, 256)
    assert layer.convolution.weight.shape == (4, 2 * 384 + 768)
    assert GatedDeltaNet(16).num_heads == 1
    shared = GatedDeltaNet(16, SHARED)
    assert shared.initial_state(3).memory.shape == (3, 6, 6, 3)


@pytest.mark.parametrize("where", ["forward", "forward and backward"])
def test_autocast(where: str, x: Tensor) -> None:
    layer, x = GatedDeltaNet(16, SHARED), x.float()
    expected, _ = layer(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        step = layer.step(x[:, 0], state.apply(torch.detach))
        loss = y.float().square().sum()
        if where == "forward and backward":
            loss.backward()
    if where == "forward":
        loss.backward()
    assert y.dtype == step.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32
    assert (y - expected).norm() <= 0.02 * expected.norm()
    for (name, p), e in zip(layer.named_parameters(), gradients, strict=True):
        assert (p.grad - e).norm() <= 0.05 * e.norm(), name


def test_bad_arguments(x: Tensor) -> None:
    layer = GatedDeltaNet(16, AS_MANY).double()
    state = layer.initial_state(3)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": x[0]}, r"x: got shape \(50, 16\), takes \[B, T, 16\]"),
        ({"cu_seqlens": torch.tensor([0, 50])}, "cu_seqlens: got B = 3"),
        ({"padding_mask": torch.ones(3, 50)}, r"padding_mask: got torch\.float32 \(3, 50\), takes torch\.bool"),
        ({"state": layer.initial_state(2)}, r"state\.memory: got shape \(2, 2, 4, 8\), takes \(3, 2, 4, 8\)"),
        (
            {"state": GatedDeltaNetState(state.memory, state.convolution[:, 1:])},
            r"state\.convolution: got shape \(3, 2, 32\)",
        ),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            layer(**({"x": x} | change))
    mask = torch.ones(1, 50, dtype=torch.bool)
    with pytest.raises(ValueError, match="padding_mask: cannot be combined with cu_seqlens"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 50]), padding_mask=mask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": -1}, r"model\.gated_deltanet\.num_heads=-1: use 0 \(automatic\) or more"),
        ({"head_size": 0}, r"model\.gated_deltanet\.head_size=0: use 1 or more"),
        ({"conv_size": 0}, r"model\.gated_deltanet\.conv_size=0: use 1 or more"),
        ({"expand_v": 0.0}, r"model\.gated_deltanet\.expand_v=0\.0: use a positive ratio"),
        ({"head_size": 5, "expand_v": 0.5}, r"model\.gated_deltanet\.expand_v=0\.5: .* a whole number; head_size is 5"),
        ({"num_heads": 2, "num_value_heads": 3}, r"model\.gated_deltanet\.num_value_heads=3: use a multiple of num_heads=2"),
    ],
)
def test_bad_sizes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GatedDeltaNet(16, GatedDeltaNetConfig(**fields))


def weights_of(theirs: Any) -> dict[str, Tensor]:
    """The weights of transformers' `Qwen3NextGatedDeltaNet` by our names. Its projections are laid out key head by key head:
    query, key, then the values and gates of the value heads that share them; and strengths, then step sizes."""
    heads, share = theirs.num_k_heads, theirs.num_v_heads // theirs.num_k_heads
    widths = (theirs.head_k_dim, theirs.head_k_dim, share * theirs.head_v_dim, share * theirs.head_v_dim)
    wide, narrow = (projection.weight.unflatten(0, (heads, -1)) for projection in (theirs.in_proj_qkvz, theirs.in_proj_ba))
    query, key, value, gate = (part.flatten(0, 1) for part in wide.split(widths, dim=1))
    strength, step_size = (part.flatten(0, 1) for part in narrow.split((share, share), dim=1))
    return {
        "input.weight": torch.cat((gate, query, key, value, strength, step_size)),
        "convolution.weight": theirs.conv1d.weight[:, 0].T,
        "convolution.bias": torch.zeros(theirs.conv_dim),
        "log_decay_rate": theirs.A_log,
        "step_size_bias": theirs.dt_bias,
        "norm_weight": theirs.norm.weight,
        "output.weight": theirs.out_proj.weight,
    }


@pytest.mark.parametrize(("heads", "value_heads"), [(2, 2), (2, 4)])
def test_transformers_as_a_witness(heads: int, value_heads: int) -> None:
    """Whole sequences, and a prefill followed by steps with its cache; also the final state."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import DynamicCache, Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

        cache_name = "cache" if "cache" in signature(Qwen3NextGatedDeltaNet.forward).parameters else "cache_params"
        config = Qwen3NextConfig(
            hidden_size=24, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=heads,
            linear_num_value_heads=value_heads, linear_key_head_dim=8, linear_value_head_dim=12, linear_conv_kernel_dim=3,
            rms_norm_eps=1e-5,
        )  # fmt: skip
        theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std(correction=0).clamp(min=0.3))
    sizes = GatedDeltaNetConfig(heads, value_heads, head_size=8, expand_v=1.5, conv_size=3)
    layer = GatedDeltaNet(24, sizes, norm_eps=1e-5)
    layer.load_state_dict(weights_of(theirs))
    x = nn.functional.rms_norm(torch.randn(2, 140, 24), (24,))
    cache = DynamicCache(config=config)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], theirs(x), rtol=1e-5, atol=1e-5)
        prompt, (y, state) = theirs(x[:, :133], **{cache_name: cache}), layer(x[:, :133])
        torch.testing.assert_close(y, prompt, rtol=1e-5, atol=1e-5)
        for t in range(133, 140):
            step = theirs(x[:, t : t + 1], **{cache_name: cache})[:, 0]
            torch.testing.assert_close(layer.step(x[:, t], state), step, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.memory, cache.layers[0].recurrent_states[0], rtol=1e-5, atol=1e-5)
