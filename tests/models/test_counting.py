"""Counts from the configuration against what torch counts and keeps when the model runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from factorization_memory.config import AttentionConfig, ConfigError, ModelConfig
from factorization_memory.layers import mixer
from factorization_memory.models import LanguageModel, counting
from factorization_memory.ops import factorization_memory

FORMS: list[dict[str, Any]] = [{}, {"top_k": 4, "num_heads": 2, "conv_size": 4, "output_gate": True}, {"rates": "head"}]


def config(**form: Any) -> ModelConfig:
    return ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_states=16, **form)


@pytest.mark.parametrize("form", FORMS)
def test_matrix_products_agree_with_the_flop_counter(form: dict[str, Any]) -> None:
    model = LanguageModel(config(**form, backend="reference"))
    tokens = torch.zeros(2, 10, dtype=torch.long)
    counts = counting.count(config(**form))
    with FlopCounterMode(display=False) as forward:
        model(tokens)
    assert forward.get_total_flops() == 20 * (counts.projection_flops + counts.head_flops)
    with FlopCounterMode(display=False) as train:
        model(tokens)[0].sum().backward()
    # The embedding is looked up, not multiplied: the first layer's input needs its gradient all the same.
    assert train.get_total_flops() == 3 * 20 * (counts.projection_flops + counts.head_flops)
    assert counts.train_flops == 3 * (counts.projection_flops + counts.head_flops + counts.recurrence_flops)


@pytest.mark.parametrize("top_k", [None, 4])
def test_recurrence_agrees_with_the_reference_loop(top_k: int | None) -> None:
    """The elementwise operations of the reference, numbers of memory width counted one by one."""
    length, states, width = 5, 16, 64

    class Count(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if name in ("mul", "add") and result.dim() == 4 and result.shape[-1] == width:
                self.flops += result.numel()
            if name == "sum" and args[0].shape[-1] == width:
                self.flops += args[0].numel()
            return result

    selected = top_k or states
    weights = torch.rand(1, length, 1, selected)
    indices = torch.rand(1, length, 1, states).topk(top_k).indices if top_k else None
    with Count() as counted:
        factorization_memory(weights, weights, torch.randn(1, length, 1, width), indices, None, states, backend="reference")
    # update: (1 - theta) * h, theta * v, their sum; merge: phi * h, the sum over states.
    per_number = mixer.UPDATE_FLOPS + mixer.MERGE_FLOPS
    assert counted.flops == length * selected * width * per_number


@pytest.mark.parametrize("form", FORMS)
def test_parameters_and_state_bytes(form: dict[str, Any]) -> None:
    model = LanguageModel(config(**form))
    counts = counting.count(model.config)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    assert counts.state_bytes == model.initial_state(1).num_bytes == model(torch.zeros(1, 7, dtype=torch.long))[1].num_bytes


def kept_by_autograd(model: LanguageModel, tokens: torch.Tensor) -> int:
    """Bytes that a loss keeps for its backward pass, parameters aside."""
    kept: dict[int, int] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(tokens, tokens)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("form", FORMS)
def test_activations_are_what_autograd_keeps(form: dict[str, Any]) -> None:
    """With the chunked form, which keeps a little more than Numba's loops."""
    model = LanguageModel(config(**form, backend="chunked"))
    expected = kept_by_autograd(model, torch.zeros(3, 200, dtype=torch.long))
    memory = counting.training_memory(model.config, 3, 200, bfloat16=False)
    assert abs(memory["activations"] - expected) <= 0.02 * expected
    parameters = sum(p.numel() for p in model.parameters())
    assert memory["weights"] + memory["gradients"] + memory["optimizer"] == 16 * parameters
    assert memory["total"] == memory["activations"] + 16 * parameters
    assert counting.training_memory(model.config, 3, 200, bfloat16=True)["activations"] < memory["activations"]


def test_activations_of_a_transformer() -> None:
    """As autograd keeps them with the kernels of attention."""
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, mixers=("attention",), attention=AttentionConfig(4, 2)
    )  # fmt: skip
    expected = kept_by_autograd(LanguageModel(config), torch.zeros(3, 100, dtype=torch.long))
    assert abs(counting.training_memory(config, 3, 100, bfloat16=False)["activations"] - expected) <= 0.02 * expected
    assert counting.count(config, 100).attention_flops == 2 * 4 * 32 * 101 // 2


@pytest.mark.parametrize("mixers", [("memory",), ("memory", "memory", "attention")])
def test_deep_models_are_counted_from_a_few_blocks(mixers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last number what all of them give; the deepest at once."""
    deep = dataclasses.replace(config(mixers=mixers, attention=AttentionConfig(num_heads=2)), num_layers=10)
    model = LanguageModel(deep)
    counts = counting.count(deep)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    assert counts.state_bytes == model.initial_state(1).num_bytes
    assert counts.state_bytes + counts.state_bytes_per_token == model.initial_state(1, 1).num_bytes
    whole = counting.training_memory(deep, 2, 50, bfloat16=False)
    monkeypatch.setattr(counting, "TRACED_LAYERS", 2)
    assert counting.training_memory(deep, 2, 50, bfloat16=False) == whole
    deepest = counting.training_memory(dataclasses.replace(deep, num_layers=10_000), 1, 1 << 30, bfloat16=False)
    assert deepest["activations"] > 10_000 * (1 << 30) * 32 * 4


def test_long_sequences_are_told_from_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = counting.training_memory(config(), 2, 1024, bfloat16=False)
    monkeypatch.setattr(counting, "TRACED_LENGTH", 512)
    assert counting.training_memory(config(), 2, 1024, bfloat16=False)["total"] == pytest.approx(whole["total"], rel=0.1)


def test_a_model_beyond_this_machine_is_refused_before_it_is_made() -> None:
    huge = dataclasses.replace(config(), hidden_size=1 << 18, num_layers=1000)
    with pytest.raises(ConfigError, match=r"model: .* parameters \(num_layers=1000, hidden_size=262144.*this machine"):
        LanguageModel(huge)
    with torch.device("meta"):
        assert counting.parameter_count(dataclasses.replace(huge, num_layers=1)) > 1 << 36
