"""A step of tokens with a state of another number of sequences is an error before anything is changed, by whichever way."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from factorization_memory import FactorizationMemory, LanguageModel
from factorization_memory.config import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from factorization_memory.layers import ModelState
from factorization_memory.models.decoding import DecodingModel
from factorization_memory.ops import factorization_memory_step
from factorization_memory.ops.gated_delta_rule import gated_delta_rule_step
from factorization_memory.ops.routing import route_step
from factorization_memory.ops.ssd import ssd_step

SIZES: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 16, "num_layers": 2, "num_states": 8,
    "mamba2": Mamba2Config(8, 8), "gated_deltanet": GatedDeltaNetConfig(head_size=8),
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"top_k": 3, "conv_size": 3, "update_lag": 1},
    "attention": {"mixers": ("attention",)},
    "window": {"mixers": ("attention",), "attention": AttentionConfig(2, 1, sliding_window=4)},
    "mamba2": {"mixers": ("mamba2",)},
    "gated_deltanet": {"mixers": ("gated_deltanet",)},
    "mixed": {"mixers": ("memory", "attention")},
}
PAIRS = [(3, 1), (1, 3), (2, 4), (4, 2), (1, 0), (0, 1)]
kernels = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="small sizes of the kernels are interpreted")


def untouched(state: ModelState, call: Callable[[], Any], message: str) -> None:
    before = state.clone()
    with pytest.raises(ValueError, match=message):
        call()
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), state.tensors(), strict=True))


@pytest.mark.parametrize(("tokens", "sequences"), PAIRS)
@pytest.mark.parametrize("name", MODELS)
def test_model_and_layer(name: str, tokens: int, sequences: int) -> None:
    model = LanguageModel(ModelConfig(**SIZES, **MODELS[name])).eval()
    with torch.no_grad():
        _, state = model(torch.ones(sequences, 5, dtype=torch.int64))
    untouched(state, lambda: model.step(torch.zeros(tokens, dtype=torch.int64), state), rf"state\.\w+: .*takes \({tokens}")
    mixer = model.blocks[0].mixer
    untouched(state, lambda: mixer.step(torch.randn(tokens, 16), state.layers[0]), rf"state\.\w+: .*takes \({tokens}")
    with torch.no_grad():
        message = rf"state\.\w+: .*takes \({tokens}"
        untouched(state, lambda: model(torch.zeros(tokens, 4, dtype=torch.int64), state=state), message)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_another_shape(name: str) -> None:
    model = LanguageModel(ModelConfig(**SIZES, **MODELS[name])).eval()
    state = model.initial_state(2)
    for tokens in (torch.zeros(2, 1, dtype=torch.int64), torch.zeros((), dtype=torch.int64)):
        untouched(state, lambda tokens=tokens: model.step(tokens, state), r"tokens: got shape .*one token per sequence")
    for x in (torch.zeros(2, 1, 16), torch.zeros(2, 15), torch.zeros(16)):
        untouched(state, lambda x=x: model.blocks[0].mixer.step(x, state.layers[0]), r"x: got shape .*takes one token")


@pytest.mark.parametrize("name", MODELS)
def test_a_later_layer_of_another_batch(name: str) -> None:
    """What the layers before it carry is not changed either."""
    model = LanguageModel(ModelConfig(**SIZES, **MODELS[name])).eval()
    state = ModelState([model.initial_state(2).layers[0], model.initial_state(3).layers[1]])
    untouched(state, lambda: model.step(torch.zeros(2, dtype=torch.int64), state), r"takes \(2")


@kernels
@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize(("tokens", "sequences"), [(3, 1), (1, 3), (9, 8), (8, 9)])
def test_decoding_model(name: str, tokens: int, sequences: int) -> None:
    model = LanguageModel(ModelConfig(**SIZES, **MODELS[name])).eval()
    fused, state = DecodingModel(model), model.initial_state(sequences)
    untouched(state, lambda: fused.step(torch.zeros(tokens, dtype=torch.int64), state), rf"takes \({tokens}")
    mixed = ModelState([model.initial_state(tokens).layers[0], state.layers[1]])
    untouched(mixed, lambda: fused.step(torch.zeros(tokens, dtype=torch.int64), mixed), rf"takes \({tokens}")


def test_what_is_put_aside_for_another_batch() -> None:
    model = LanguageModel(ModelConfig(**SIZES, top_k=3))
    state = model.keep_undo(model.initial_state(2), 2)
    other = model.keep_undo(model.initial_state(3), 2)
    for mine, its in zip(state.layers, other.layers, strict=True):
        mine.undo = its.undo  # type: ignore[attr-defined, misc]
    untouched(state, lambda: model.step(torch.zeros(2, dtype=torch.int64), state), r"state\.undo: got rows \(2, 3,")


def rows(x: Tensor, count: int) -> Tensor:
    return x[:1].expand(count, *x.shape[1:])


@pytest.mark.parametrize(("batch", "states"), [(3, 1), (1, 3)])
def test_operators(batch: int, states: int) -> None:
    x, heads, maps = torch.rand(batch, 2, 4), torch.rand(batch, 2), torch.rand(batch, 1, 5)
    with pytest.raises(ValueError, match=rf"state: got shape \({states}, 2, 4, 5\), takes \({batch}, 2, 4, 5\)"):
        ssd_step(x, heads, -torch.rand(2), maps, maps, torch.zeros(states, 2, 4, 5))
    with pytest.raises(ValueError, match=r"dt: got shape"):
        ssd_step(x, torch.rand(states, 2), -torch.rand(2), maps, maps, torch.zeros(batch, 2, 4, 5))
    with pytest.raises(ValueError, match=rf"state: got shape \({states}, 2, 5, 4\), takes \({batch}, 2, 5, 4\)"):
        gated_delta_rule_step(maps, maps, x, -heads, heads, torch.zeros(states, 2, 5, 4))
    weights = torch.rand(batch, 2, 6)
    with pytest.raises(ValueError, match=rf"state: got shape \({states}, 2, 6, 4\), takes \({batch}, 2, 6, 4\)"):
        factorization_memory_step(weights, weights, x, torch.zeros(states, 2, 6, 4))
    backends = ["plain", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
    for backend in backends:
        with pytest.raises(ValueError, match=rf"last_affinity: got \({states}, 1, 2, 3\)"):
            route_step(
                weights, weights, weights, torch.zeros(states, 1, 2, 3), torch.zeros(states, 1, 2, 3, dtype=torch.int64), 3,
                backend=backend,
            )  # fmt: skip


@kernels
@pytest.mark.parametrize(("batch", "states"), [(3, 1), (1, 3)])
def test_kernels(batch: int, states: int) -> None:
    from factorization_memory.ops.decoding import rows as decoding
    from factorization_memory.ops.memory.kernels import step
    from factorization_memory.ops.routing import kernels as routing_kernels

    weights, value = torch.rand(batch, 2, 6), torch.rand(batch, 2, 4)
    with pytest.raises(ValueError, match=rf"got shape \({batch}, 2, 6\), takes \({states}, 2, 6\)"):
        step.dense_step(weights, weights, weights, None, 1.0, value, torch.zeros(states, 2, 6, 4), None, None)
    with pytest.raises(ValueError, match=rf"state: got shape \({states}, 2, 6, 4\), takes \({batch}, 2, 6, 4\)"):
        step.step(
            weights[:, None], weights[:, None], value[:, None], torch.zeros(states, 2, 6, 4), None, None, None, None, None, None
        )
    with pytest.raises(ValueError, match=rf"state: got shape \({states}, 2, 6, 4\), takes \({batch}, 2, 6, 4\)"):
        step.undo(
            torch.zeros(states, 2, 6, 4), torch.zeros(1, batch, 1, 2, 6, 4), None, None, torch.zeros(1, dtype=torch.int64), 1
        )
    with pytest.raises(ValueError, match=rf"tail: got shape \({states}, 2, 4\), takes \({batch}, 2, 4\)"):
        decoding.convolve(torch.rand(batch, 4), torch.zeros(states, 2, 4), torch.rand(3, 4), torch.rand(4))
    with pytest.raises(ValueError, match=rf"gate: got shape \({states}, 4\), takes \({batch}, 4\)"):
        decoding.normalise(torch.rand(batch, 4), None, torch.rand(states, 4), None, 1e-6, torch.float32)
    last = torch.zeros(states, 1, 2, 3)
    with pytest.raises(ValueError, match=rf"last_affinity: got shape \({states}, 1, 2, 3\), takes \({batch}, 1, 2, 3\)"):
        routing_kernels.route_step(weights, weights, weights, last, last.long(), 3, 1.0)


def test_layer_alone() -> None:
    for tokens, sequences, top_k in ((3, 1, 4), (1, 3, None)):
        layer = FactorizationMemory(32, num_states=16, top_k=top_k)
        with pytest.raises(ValueError, match=r"state\.memory: got shape"):
            layer.step(torch.randn(tokens, 32), layer.initial_state(sequences))


@pytest.mark.parametrize("name", MODELS)
def test_a_state_of_inference_mode(name: str) -> None:
    """Goes on outside of it: in steps, in further reading, also with gradients, and where it is loaded or rolled back."""
    model, tokens = LanguageModel(ModelConfig(**SIZES, **MODELS[name])).eval(), torch.arange(20).view(2, 10) % 11
    with torch.no_grad():
        whole, _ = model(tokens)
    with torch.inference_mode():
        _, state = model(tokens[:, :5])
        empty = model.initial_state(2)
    model(tokens[:, 5:-1], tokens[:, 6:], state=state)[0].backward()
    assert all(p.grad is not None for p in model.parameters())
    empty.load(state)
    for one in (state, empty):
        for t in range(5, 10):
            logits, _ = model.step(tokens[:, t], one)
            torch.testing.assert_close(logits, whole[:, t], rtol=1e-4, atol=1e-5)


def test_steps_of_inference_mode_are_taken_back() -> None:
    model, tokens = LanguageModel(ModelConfig(**SIZES, top_k=3, conv_size=3)).eval(), torch.tensor([3, 4])
    with torch.inference_mode():
        state = model.keep_undo(model.initial_state(2), 3)
        model.step(tokens, state)
        before = [x.clone() for x in state.tensors()]
        model.step(tokens, state)
    state.rollback(1)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
    model.step(tokens, state)


def test_operators_say_what_to_do_with_a_state_of_inference_mode() -> None:
    with torch.inference_mode():
        state = torch.zeros(2, 2, 6, 4)
    with pytest.raises(ValueError, match=r"state: created under torch\.inference_mode\(\).*use state\.clone\(\)"):
        factorization_memory_step(torch.rand(2, 2, 6), torch.rand(2, 2, 6), torch.rand(2, 2, 4), state)


def test_what_is_no_tensor_is_named() -> None:
    from factorization_memory import LanguageModel
    from factorization_memory.config import ModelConfig

    model = LanguageModel(ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, num_states=4))
    tokens = torch.tensor([[1, 2, 3]])
    for given, name in (
        ({}, "tokens"),
        ({"cu_seqlens": [0, 3]}, "cu_seqlens"),
        ({"padding_mask": [[True] * 3]}, "padding_mask"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got list .*, takes a tensor"):
            model(tokens if given else tokens.tolist(), **given)
    with pytest.raises(ValueError, match=r"^tokens: got list \[1\], takes"):
        model.step([1], model.initial_state(1))
