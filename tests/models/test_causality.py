"""What is not finite at one position reaches no earlier one, nor another sequence, by whichever mixer and backend."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from factorization_memory import LanguageModel
from factorization_memory.config import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from factorization_memory.layers.mixer import set_aside

SIZES: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 16, "num_layers": 1, "num_states": 8,
    "mamba2": Mamba2Config(8, 8, chunk_size=16), "gated_deltanet": GatedDeltaNetConfig(head_size=8),
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "associative": {"top_k": 3, "conv_size": 3, "update_lag": 1},
    "reference": {"backend": "reference", "top_k": 3},
    "attention": {"mixers": ("attention",)},
    "window": {"mixers": ("attention",), "attention": AttentionConfig(2, 1, sliding_window=4)},
    "mamba2": {"mixers": ("mamba2",)},
    "gated_deltanet": {"mixers": ("gated_deltanet",)},
}
if os.environ.get("TRITON_INTERPRET") == "1":
    MODELS |= {
        "kernels": {"backend": "triton-dense", "num_states": 16},
        "sparse kernels": {"backend": "triton-sparse", "top_k": 4, "num_states": 16},
    }


def make(name: str) -> Any:
    return LanguageModel(ModelConfig(**SIZES | MODELS[name])).blocks[0].mixer


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", MODELS)
def test_earlier_positions(name: str, number: float, compiled: bool) -> None:
    if number == torch.inf and "kernels" in name:
        pytest.skip("interpreted kernels are slow, and NaN says as much")
    if compiled and ("kernels" in name or name == "gated_deltanet"):
        pytest.skip("the same code, slow to compile")
    torch._dynamo.reset()
    layer = make(name)
    call = torch.compile(layer, backend="eager") if compiled else layer
    x = torch.randn(2, 40, 16)
    broken = x.clone()
    broken[1, 21, 5] = number
    with torch.no_grad():
        (expected, final), (y, state) = layer(x), call(broken)
    torch.testing.assert_close(y[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y[1, :21], expected[1, :21], rtol=1e-5, atol=1e-6)
    assert y[1, 21].isnan().all()
    after = 25 if name == "window" else 40  # what no longer sees it is as it was
    assert y[1, 21:after].isnan().all()
    torch.testing.assert_close(y[1, after:], expected[1, after:], rtol=1e-5, atol=1e-6)
    for mine, its in zip(state.tensors(), final.tensors(), strict=True):
        torch.testing.assert_close(mine[0], its[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        on, _ = layer(x[:, :3], state)
        assert on[0].isfinite().all()
        assert name == "window" or on[1].isnan().all()


@pytest.mark.parametrize("name", MODELS)
def test_other_sequences(name: str) -> None:
    layer, x, borders = make(name), torch.randn(1, 40, 16), torch.tensor([0, 7, 7, 30, 40])
    broken = x.clone()
    broken[0, 20] = torch.nan
    with torch.no_grad():
        (expected, final), (y, state) = layer(x, None, borders), layer(broken, None, borders)
    there = torch.ones(40, dtype=torch.bool)
    there[20 : 24 if name == "window" else 30] = False
    torch.testing.assert_close(y[0, there], expected[0, there], rtol=1e-5, atol=1e-6)
    assert y[0, ~there].isnan().all()
    for mine, its in zip(state.tensors(), final.tensors(), strict=True):
        torch.testing.assert_close(mine[[0, 1, 3]], its[[0, 1, 3]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("number", "dtype"), [(1e38, torch.float32), (1e4, torch.float16), (1e38, torch.bfloat16)])
def test_a_large_sum_is_no_damage(number: float, dtype: torch.dtype) -> None:
    x = torch.full((2, 9, 16), number, dtype=dtype)
    assert set_aside(x, None)[1] is None
    x[1, 3, 2] = torch.nan
    _, broken = set_aside(x, None)
    assert broken is not None
    assert broken.token.nonzero().tolist() == [[1, 3]]
