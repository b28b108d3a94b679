"""Mamba-2's layer: the start it should have, and transformers' implementation as a witness."""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factorization_memory.config import ConfigError, Mamba2Config, ModelConfig
from factorization_memory.layers.mamba2 import Mamba2, Mamba2State

ONE_GROUP = Mamba2Config(state_size=5, head_size=4, chunk_size=16)
GROUPS = Mamba2Config(state_size=4, head_size=4, num_groups=2, chunk_size=7)


@pytest.fixture
def x() -> Tensor:
    return nn.functional.rms_norm(torch.randn(3, 50, 16, dtype=torch.float64), (16,))


def test_initial_decay_and_step_size() -> None:
    layer = Mamba2(256, Mamba2Config(head_size=1, state_size=2))
    step_size = nn.functional.softplus(layer.step_size_bias)
    assert 0.99e-3 < step_size.min() < 1.3e-3
    assert 0.08 < step_size.max() < 1.01e-1
    assert abs(step_size.log().mean().item() - torch.tensor(1e-2).log().item()) < 0.2
    assert 1 <= -layer._decay_rate().max() < 1.2
    assert 15.8 < -layer._decay_rate().min() <= 16
    assert (layer.skip == 1).all()
    assert (layer.norm_weight == 1).all()


@pytest.mark.parametrize("where", ["forward", "forward and backward"])
def test_autocast(where: str, x: Tensor) -> None:
    layer, x = Mamba2(16, GROUPS), x.float()
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
    layer = Mamba2(16, ONE_GROUP).double()
    state = layer.initial_state(3)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": x[0]}, r"x: got shape \(50, 16\), takes \[B, T, 16\]"),
        ({"cu_seqlens": torch.tensor([0, 50])}, "cu_seqlens: got B = 3"),
        ({"padding_mask": torch.ones(3, 50)}, r"padding_mask: got torch\.float32 \(3, 50\), takes torch\.bool"),
        ({"state": layer.initial_state(2)}, r"state\.memory: got shape \(2, 8, 4, 5\), takes \(3, 8, 4, 5\)"),
        ({"state": Mamba2State(state.memory, state.convolution[:, 1:])}, r"state\.convolution: got shape \(3, 2, 42\)"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            layer(**({"x": x} | change))
    mask = torch.ones(1, 50, dtype=torch.bool)
    with pytest.raises(ValueError, match="padding_mask: cannot be combined with cu_seqlens"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 50]), padding_mask=mask)
    with pytest.raises(ConfigError, match=r"model\.mamba2\.head_size=64: must divide the inner width"):
        Mamba2(16)


def weights_of(mixer: Any) -> dict[str, Tensor]:
    """The weights of transformers' `Mamba2Mixer` by our names."""
    return {
        "input.weight": mixer.in_proj.weight,
        "convolution.weight": mixer.conv1d.weight[:, 0].T,
        "convolution.bias": mixer.conv1d.bias,
        "log_decay_rate": mixer.A_log,
        "step_size_bias": mixer.dt_bias,
        "skip": mixer.D,
        "norm_weight": mixer.norm.weight,
        "output.weight": mixer.out_proj.weight,
    }


@pytest.mark.parametrize("groups", [1, 2])
def test_transformers_as_a_witness(groups: int) -> None:
    """Whole sequences, and a prefill followed by steps with its cache, layer by layer of a random model."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import DynamicCache, Mamba2ForCausalLM
        from transformers import Mamba2Config as TheirConfig
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated

        if groups > 1 and "group_size" not in signature(MambaRMSNormGated).parameters:
            pytest.skip("this transformers normalises over all groups at once, unlike Mamba-2's authors")
        cache_name = "cache" if "cache" in signature(Mamba2Mixer.forward).parameters else "cache_params"  # before 5.24
        config = TheirConfig(
            hidden_size=24, num_heads=6, head_dim=8, state_size=10, n_groups=groups, num_hidden_layers=2, vocab_size=40,
            chunk_size=16, initializer_range=0.3,
        )  # fmt: skip
        model = Mamba2ForCausalLM(config).eval()
    ours = ModelConfig(
        hidden_size=24, norm_eps=config.layer_norm_epsilon, mixers=("mamba2",),
        mamba2=Mamba2Config(state_size=10, head_size=8, num_groups=groups, chunk_size=7),
    )  # fmt: skip
    cache = DynamicCache(config=config)
    x = nn.functional.rms_norm(torch.randn(2, 40, 24), (24,))
    with torch.no_grad():
        for index, block in enumerate(model.backbone.layers):
            mixer = block.mixer
            for parameter in (mixer.conv1d.bias, mixer.norm.weight, mixer.D):
                parameter.normal_()
            layer = Mamba2.from_config(ours)
            layer.load_state_dict(weights_of(mixer))
            torch.testing.assert_close(layer(x)[0], mixer(x), rtol=1e-5, atol=1e-5)
            theirs, (y, state) = mixer(x[:, :33], **{cache_name: cache}), layer(x[:, :33])
            torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5)
            for t in range(33, 40):
                theirs = mixer(x[:, t : t + 1], **{cache_name: cache})[:, 0]
                torch.testing.assert_close(layer.step(x[:, t], state), theirs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(state.memory, cache.layers[index].recurrent_states[0], rtol=1e-5, atol=1e-5)
