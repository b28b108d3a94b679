"""Models of attention and Mamba-2: against those of `transformers` with the same weights; these and Gated DeltaNet, also mixed
with memory layers, through everything that a model goes through."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers import Mamba2Config as TheirMamba2Config
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from factorization_memory.config import (
    AttentionConfig,
    ConfigError,
    GatedDeltaNetConfig,
    Mamba2Config,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from factorization_memory.generation import prefill_batch
from factorization_memory.generation.graph import StepGraph, Steps
from factorization_memory.layers import UndoableMixer
from factorization_memory.models import LanguageModel, ModelState
from factorization_memory.models.counting import count, training_memory
from factorization_memory.models.decoding import why_unsupported
from factorization_memory.models.huggingface import CACHE_NAME
from factorization_memory.models.pretrained.conversion import from_llama, from_mamba2
from factorization_memory.models.routing import RoutingHealth, observe_routing

MIXED = ModelConfig(
    vocab_size=30, hidden_size=16, num_layers=3, num_states=8, top_k=2, update_lag=1, mixers=("memory", "attention", "mamba2"),
    attention=AttentionConfig(num_heads=4, num_key_value_heads=2), mamba2=Mamba2Config(state_size=8, head_size=8, chunk_size=4),
)  # fmt: skip
WINDOWED = replace(MIXED, mixers=("attention", "memory"), attention=replace(MIXED.attention, sliding_window=5))
BARE = replace(MIXED, mixers=("mamba2", "attention"), feed_forward=False)
DELTA = replace(
    WINDOWED, mixers=("gated_deltanet", "attention"),
    gated_deltanet=GatedDeltaNetConfig(num_heads=1, num_value_heads=2, head_size=8),
)  # fmt: skip
MODELS = pytest.mark.parametrize("config", [MIXED, WINDOWED, BARE, DELTA], ids=["mixed", "windowed", "bare", "delta"])


def shake(model: PreTrainedModel) -> PreTrainedModel:
    """Weights far from their first values, where many are equal."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std(correction=0).clamp(min=0.1))
    return model.eval()


def check_against(theirs: PreTrainedModel, ours: LanguageModel, cache: str) -> None:
    """The whole text, and a prompt with steps behind it, are the same in both, by their caches and by ours."""
    tokens = torch.randint(0, ours.config.vocab_size, (2, 40))
    with torch.no_grad():
        expected = theirs(tokens).logits
        whole, _ = ours(tokens)
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
        their_prompt = theirs(tokens[:, :30], use_cache=True)
        prompt, state = ours(tokens[:, :30])
        torch.testing.assert_close(prompt, their_prompt.logits, rtol=1e-5, atol=1e-5)
        for t in range(30, 40):
            their_step = theirs(tokens[:, t : t + 1], use_cache=True, **{cache: their_prompt[cache]})
            step, state = ours.step(tokens[:, t], state)
            torch.testing.assert_close(step, their_step.logits[:, 0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(step, expected[:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shared", "tied"), [("llama", 4, False), ("llama", 2, True), ("mistral", 1, False)]
)  # fmt: skip
def test_is_llama(kind: str, shared: int, tied: bool) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": shared, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }  # fmt: skip
    if kind == "llama":
        theirs: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        theirs = MistralForCausalLM(MistralConfig(**sizes, sliding_window=7))
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, norm_eps=1e-5, tie_word_embeddings=tied,
        mixers=("attention",), attention=AttentionConfig(4, shared, 500.0, 7 if kind == "mistral" else None),
    )  # fmt: skip
    ours = LanguageModel(config).eval()
    ours.load_state_dict(from_llama(shake(theirs).state_dict()))
    check_against(theirs, ours, CACHE_NAME)


@pytest.mark.parametrize(("groups", "tied"), [(1, True), (2, False)])
def test_is_mamba2(groups: int, tied: bool) -> None:
    if groups > 1 and "group_size" not in inspect.signature(MambaRMSNormGated).parameters:
        pytest.skip("this transformers normalises over all groups at once, unlike Mamba-2's authors")
    theirs = Mamba2ForCausalLM(
        TheirMamba2Config(
            vocab_size=50, hidden_size=16, state_size=8, num_heads=4, head_dim=8, expand=2, n_groups=groups,
            num_hidden_layers=2, chunk_size=4, conv_kernel=3, layer_norm_epsilon=1e-5, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    config = ModelConfig(
        vocab_size=50, hidden_size=16, num_layers=2, norm_eps=1e-5, tie_word_embeddings=tied, mixers=("mamba2",),
        feed_forward=False, mamba2=Mamba2Config(state_size=8, head_size=8, num_groups=groups, conv_size=3, chunk_size=8),
    )  # fmt: skip
    ours = LanguageModel(config).eval()
    ours.load_state_dict(from_mamba2(shake(theirs).state_dict()))
    check_against(theirs, ours, "cache" if CACHE_NAME == "cache" else "cache_params")


def test_weights_that_do_not_fit() -> None:
    weights = {"model.embed_tokens.weight": torch.zeros(3, 2), "model.norm.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"no place for model\.more"):
        from_llama(weights | {"model.more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing"):
        from_llama({"model.embed_tokens.weight": torch.zeros(3, 2)})


def model_of(config: ModelConfig) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config).double().eval()


def steps(model: LanguageModel, tokens: Tensor, state: ModelState) -> Tensor:
    return torch.stack([model.step(tokens[:, t], state)[0] for t in range(tokens.shape[1])], dim=1)


@MODELS
def test_prefill_then_steps_equal_the_whole(config: ModelConfig) -> None:
    model, tokens = model_of(config), torch.randint(0, 30, (2, 40))
    whole, _ = model(tokens)
    first, state = model(tokens[:, :17])
    second, state = model(tokens[:, 17:30], state=state)
    parts = torch.cat((first, second, steps(model, tokens[:, 30:], state.detach())), 1)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-10)


@MODELS
def test_padding_and_packing(config: ModelConfig) -> None:
    model, tokens = model_of(config), torch.randint(0, 30, (2, 20))
    mask = torch.rand(2, 20) > 0.4
    padded, state = model(tokens, padding_mask=mask)
    borders = [0, *mask.sum(1).cumsum(0).tolist()]
    packed, packed_state = model(tokens[mask][None], cu_seqlens=torch.tensor(borders))
    torch.testing.assert_close(packed[0], padded[mask])
    more = torch.randint(0, 30, (2, 4))
    after = steps(model, more, state.detach())
    for n in range(2):
        alone, own = model(tokens[n : n + 1, mask[n]])
        torch.testing.assert_close(padded[n, mask[n]], alone[0])
        torch.testing.assert_close(after[n : n + 1], model(more[n : n + 1], state=own)[0])
    torch.testing.assert_close(steps(model, more, packed_state.detach()), after)


@MODELS
def test_states_are_chosen_placed_emptied_and_loaded(config: ModelConfig) -> None:
    model, tokens = model_of(config), torch.randint(0, 30, (3, 24))
    whole, _ = model(tokens)
    state = model(tokens[:, :12])[1].detach()
    chosen = state.select([2, 0])
    torch.testing.assert_close(model(tokens[[2, 0], 12:], state=chosen)[0], whole[[2, 0], 12:])
    placed = chosen.place([2, 0], 4).reset(torch.tensor([True, False, False, False]))
    y, _ = model(tokens[[0, 1, 2, 0], 12:], state=placed)
    torch.testing.assert_close(y[2], whole[2, 12:])
    torch.testing.assert_close(y[:2], model(tokens[:2, 12:])[0])
    # Into a smaller state that has read less, and back to a point that was left.
    other = model(tokens[:, :3])[1].detach()
    other.load(state.select([1]), [1])
    before = other.snapshot()
    for _ in range(2):
        torch.testing.assert_close(steps(model, tokens[:, 12:], other)[1], whole[1, 12:])
        other.restore(before)
    torch.testing.assert_close(steps(model, tokens[:, 3:], other)[[0, 2]], whole[[0, 2], 3:])
    with pytest.raises(ValueError, match="not from this model"):
        other.load(model_of(replace(config, num_layers=1)).initial_state(3))
    with pytest.raises(ValueError, match="got 1 sequences, takes 3"):
        other.load(state.select([1]))


@MODELS
def test_decoding_of_a_batch(config: ModelConfig) -> None:
    model = model_of(config)
    prompts = [torch.randint(0, 30, (n,)) for n in (9, 2, 14, 1)]
    logits, state = prefill_batch(model, prompts, chunk=6)
    room = Steps(model, 4)
    room.load(state)
    more = torch.randint(0, 30, (4, 9))
    for t in range(9):
        after = room.step(more[:, t])
    for n, prompt in enumerate(prompts):
        whole = model(torch.cat((prompt, more[n]))[None])[0][0]
        torch.testing.assert_close(logits[n], whole[len(prompt) - 1])
        torch.testing.assert_close(after[n], whole[-1])


@pytest.mark.gpu
def test_a_window_in_a_graph() -> None:
    torch.manual_seed(0)
    model = LanguageModel(WINDOWED).cuda().eval()
    tokens = torch.randint(0, 30, (2, 40), device="cuda")
    state = model(tokens[:, :20])[1].detach()
    eager, graph = Steps(model, 2), StepGraph(model, 2)
    eager.load(state)
    graph.load(state)
    for t in range(20, 40):
        torch.testing.assert_close(graph.step(tokens[:, t]), eager.step(tokens[:, t]))


@MODELS
def test_gradient_and_loss(config: ModelConfig) -> None:
    """Packed as in training; of separate sequences the same."""
    model, tokens = model_of(config), torch.randint(0, 30, (1, 20))
    targets, borders = torch.randint(0, 30, (1, 20)), torch.tensor([0, 7, 7, 20])
    loss, _ = model(tokens, targets, cu_seqlens=borders, keep_state=False)
    parts = [model(tokens[:, a:b], targets[:, a:b])[0] * (b - a) / 20 for a, b in ((0, 7), (7, 20))]
    torch.testing.assert_close(loss, sum(parts))
    parameters = list(model.parameters())
    for mine, alone in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(sum(parts), parameters), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(mine, alone)
        assert mine.abs().sum() > 0


def test_what_only_memory_has() -> None:
    model = model_of(MIXED)
    with observe_routing(model) as observed:
        model(torch.randint(0, 30, (1, 5)))
    assert [len(passes) for passes in observed] == [1]
    health = RoutingHealth(model_of(WINDOWED))
    with health.observe():
        health._layers[1](torch.randn(1, 5, 16, dtype=torch.float64))
    assert [layer["layer"] for layer in health.summary()] == [1]
    assert RoutingHealth(model_of(BARE)).summary() == []
    state = model.initial_state(1)
    with pytest.raises(ValueError, match=r"block 1 of the model: steps of Attention .* snapshot\(\) or clone\(\)"):
        model.keep_undo(state, 3)
    with pytest.raises(ValueError, match="state: got layers of"):
        model_of(replace(BARE, mixers=("memory",))).keep_undo(state, 3)
    assert [isinstance(block.mixer, UndoableMixer) for block in model.blocks[:2]] == [True, False]
    assert "attention, mamba2" in (why_unsupported(model) or "")
    assert "feed_forward=False" in (why_unsupported(model_of(replace(BARE, mixers=("memory",)))) or "")
    with pytest.raises(ValueError, match="its attention state grows"):
        StepGraph(model, 1)


def test_blocks_follow_the_pattern() -> None:
    config = replace(MIXED, num_layers=5, mixers=("memory", "attention"))
    kinds = [type(block.mixer).__name__ for block in LanguageModel(config).blocks]
    assert kinds == ["FactorizationMemory", "Attention"] * 2 + ["FactorizationMemory"]
    bare = LanguageModel(BARE)
    assert not any("feed_forward" in name for name in bare.state_dict())
    deep, shallow = (LanguageModel(replace(BARE, mixers=("attention",), num_layers=n)) for n in (4, 1))
    ratio = deep.blocks[0].mixer.output.weight.std() / shallow.blocks[0].mixer.output.weight.std()
    assert float(ratio.detach()) == pytest.approx(0.5, abs=0.1)


@MODELS
def test_counts(config: ModelConfig) -> None:
    model, counts = LanguageModel(config), count(config, 16)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    assert counts.non_embedding_parameters == counts.parameters - 30 * 16
    window = config.attention.sliding_window
    state = model(torch.zeros(1, 9, dtype=torch.long))[1]
    assert state.num_bytes == counts.state_bytes + 9 * counts.state_bytes_per_token
    assert bool(counts.state_bytes_per_token) == (window is None)
    attended = sum(min(t, window or t) for t in range(1, 17)) / 16
    assert counts.attention_flops == int(config.layer_mixers.count("attention") * 4 * 16 * attended)
    memory = training_memory(config, 2, 16, bfloat16=False)
    assert memory["weights"] == 4 * counts.parameters


def test_states_of_other_models_are_named() -> None:
    def build(mixers: tuple[Any, ...], window: int | None = None) -> LanguageModel:
        attention = AttentionConfig(num_heads=2, sliding_window=window)
        return LanguageModel(
            ModelConfig(vocab_size=30, hidden_size=16, num_layers=2, num_states=4, mixers=mixers, attention=attention)
        ).eval()

    tokens = torch.randint(0, 30, (2, 6))
    memory, attention = build(("memory",)), build(("attention",))
    with torch.no_grad():
        for model, other in ((attention, memory), (memory, attention), (build(("memory", "attention")), memory)):
            state = other(tokens)[1]
            with pytest.raises(ValueError, match=r"state: got layers of .*, takes .*; take one from initial_state"):
                model(tokens, state=state)
            with pytest.raises(ValueError, match="state: got layers of"):
                model.step(tokens[:, 0], state)
        narrow, wide = build(("attention",), 4), build(("attention",), 8)
        mine, given = narrow(tokens)[1], wide(tokens)[1]
        before = [tensor.clone() for tensor in mine.tensors()]
        with pytest.raises(ValueError, match="not from this model"):
            mine.load(given)
        with pytest.raises(ValueError, match="sliding_window=8, not 4"):
            narrow(tokens, state=given)
        assert all(torch.equal(a, b) for a, b in zip(before, mine.tensors(), strict=True))


def test_a_cache_without_end_is_not_carried_through_training() -> None:
    model = ModelConfig(hidden_size=16, mixers=("memory", "attention"), attention=AttentionConfig(num_heads=2))
    with pytest.raises(ConfigError, match=r"training\.carry_state=True.*sliding_window"):
        RunConfig(model=model, training=TrainingConfig(carry_state=True))
    windowed = dataclasses.replace(model, attention=AttentionConfig(num_heads=2, sliding_window=8))
    RunConfig(model=windowed, training=TrainingConfig(carry_state=True))
