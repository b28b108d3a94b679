"""A model's step in few kernels equals its plain step."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from factorization_memory.config import Mamba2Config, ModelConfig
from factorization_memory.models import LanguageModel
from factorization_memory.models.decoding import DecodingModel

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PURE = ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, num_states=6)
CONFIGS = [
    PURE,
    replace(PURE, top_k=2, num_heads=2, conv_size=3, output_gate=True),
    replace(PURE, rates="head", temperature=0.5, tie_word_embeddings=False),
    # Heads and widths that are no powers of two, and inputs that are multiplied in parts.
    replace(PURE, hidden_size=40, num_heads=5, expand=3, conv_size=2, output_gate=True),
    replace(PURE, hidden_size=64, top_k=2, rates="head", intermediate_size=256),
    replace(PURE, top_k=2, update_lag=1, rates="head", conv_size=3, value_skip=True, output_gate=True),
    replace(PURE, top_k=2, update_lag=2, num_heads=2, conv_size=3),
    replace(PURE, update_lag=1, output_gate=True),
    replace(PURE, num_heads=2, value_skip=True, output_gate=True),
    replace(PURE, top_k=2, num_heads=2, conv_size=3, value_skip=True),
    replace(PURE, num_heads=2, update_lag=2, rates="head", conv_size=2, value_skip=True),
]


@pytest.mark.parametrize(
    ("config", "batch", "undo"),
    [
        (CONFIGS[0], 1, False),
        (CONFIGS[0], 5, True),
        (CONFIGS[1], 1, True),
        (CONFIGS[1], 5, False),
        (CONFIGS[2], 3, False),
        (CONFIGS[2], 6, False),
        (CONFIGS[3], 5, True),
        (CONFIGS[4], 9, False),
        (CONFIGS[5], 2, True),
        (CONFIGS[5], 6, False),
        (CONFIGS[6], 1, False),
        (CONFIGS[6], 5, True),
        (CONFIGS[7], 2, True),
        (CONFIGS[7], 7, False),
        (CONFIGS[8], 1, True),
        (CONFIGS[8], 5, True),
        (CONFIGS[9], 2, True),
        (CONFIGS[9], 5, False),
        (CONFIGS[10], 3, True),
        (CONFIGS[10], 6, True),
    ],
    ids=lambda x: CONFIGS.index(x) if isinstance(x, ModelConfig) else x,
)
def test_equals_the_plain_step(config: ModelConfig, batch: int, undo: bool) -> None:
    model = LanguageModel(config).to(DEVICE).eval()
    tokens = torch.randint(0, 11, (batch, 4), device=DEVICE)
    _, begun = model(tokens[:, :2])
    decoding = DecodingModel(model)
    plain, state = begun.clone(), begun.clone()
    if undo:
        state = model.keep_undo(state, 4)
    kept = [x.clone() for x in state.tensors()]
    for t in range(2, 4):
        expected, _ = model.step(tokens[:, t], plain)
        logits, same = decoding.step(tokens[:, t], state)
        assert same is state
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(state.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if undo:
        state.rollback(2)
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), kept, strict=True))


@pytest.mark.parametrize(("config", "batch"), [(CONFIGS[1], 5), (CONFIGS[5], 2), (CONFIGS[8], 2)], ids=["1", "5", "8"])
def test_bfloat16_weights(config: ModelConfig, batch: int) -> None:
    model = LanguageModel(config).to(DEVICE).eval()
    tokens = torch.randint(0, 11, (batch, 2), device=DEVICE)
    expected, _ = model(tokens)
    low = LanguageModel(config).to(DEVICE, torch.bfloat16).eval()
    low.load_state_dict(model.state_dict())
    decoding, state = DecodingModel(low), low.initial_state(batch)
    for t in range(2):
        logits, _ = decoding.step(tokens[:, t], state)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected[:, -1], rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "chunked"}, "backend='chunked'"),
        ({"feed_forward": False}, "feed_forward=False"),
        ({"mixers": ("memory", "mamba2"), "mamba2": Mamba2Config(head_size=8)}, r"mixers=\('memory', 'mamba2'\)"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    model = LanguageModel(replace(PURE, **change)).to(DEVICE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"model: {message}.*; use LanguageModel.step"):
        DecodingModel(model)


def test_a_state_of_another_lag_or_batch_is_refused() -> None:
    models = [LanguageModel(replace(PURE, top_k=2, update_lag=lag)).to(DEVICE).eval() for lag in (0, 1, 2)]
    tokens = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for model, other in ((models[1], models[0]), (models[0], models[1]), (models[1], models[2])):
        with pytest.raises(ValueError, match=r"state\.affinity: the state has update_lag"):
            DecodingModel(model).step(tokens, other.initial_state(2))
    with pytest.raises(ValueError, match=r"state\.memory: got shape \(3,"):
        DecodingModel(models[1]).step(tokens, models[1].initial_state(3))
