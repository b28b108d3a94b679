"""The language model: laws of the recurrence end to end, and the loss in pieces."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional

from factorization_memory.config import ConfigError, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from factorization_memory.layers import state as state_module
from factorization_memory.models import LanguageModel
from factorization_memory.models.routing import RoutingHealth, observe_routing
from factorization_memory.ops import cross_entropy
from factorization_memory.ops.cross_entropy import linear_cross_entropy


@pytest.fixture
def model() -> LanguageModel:
    config = ModelConfig(vocab_size=30, hidden_size=16, num_layers=2, num_states=8, top_k=2, num_heads=2, conv_size=3)
    return LanguageModel(config).double()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 30, (2, 40))


def test_prefill_then_steps_equal_the_whole(model: LanguageModel, tokens: torch.Tensor) -> None:
    whole, final = model(tokens)
    first, state = model(tokens[:, :17])
    second, state = model(tokens[:, 17:30], state=state)
    parts, state = [first, second], state.detach()
    for t in range(30, 40):
        logits, state = model.step(tokens[:, t], state)
        parts.append(logits[:, None])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-12)
    for a, b in zip(state.tensors(), final.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_last_only(model: LanguageModel, tokens: torch.Tensor) -> None:
    torch.testing.assert_close(model(tokens, last_only=True)[0], model(tokens)[0][:, -1:])
    packed, borders = tokens.reshape(1, -1)[:, :11], torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    expected = model(packed, cu_seqlens=borders)[0][:, [3, 4, 10]]
    torch.testing.assert_close(model(packed, cu_seqlens=borders, last_only=True)[0], expected)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_equals_cross_entropy_of_the_logits(tokens: torch.Tensor, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PIECE_LOGITS", {"cpu": 7 * 30})
    model = LanguageModel(
        ModelConfig(vocab_size=30, hidden_size=16, num_layers=1, num_states=8, tie_word_embeddings=tied)
    ).double()
    targets = torch.randint(0, 30, tokens.shape)
    targets[0, :9] = -100
    loss, _ = model(tokens, targets)
    expected = functional.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(3 * loss, parameters), torch.autograd.grad(3 * expected, parameters), strict=True):
        torch.testing.assert_close(a, b)
    each, _ = model(tokens, targets, reduction="none")
    assert each.dtype == torch.float32
    assert not each[0, :9].any()
    torch.testing.assert_close(each.double().sum() / (targets != -100).sum(), expected, rtol=1e-6, atol=0)


def test_loss_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PIECE_LOGITS", {"cpu": 64 * 100})
    hidden, weight = torch.randn(1000, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return result

    with Watch():
        linear_cross_entropy(hidden, weight, torch.randint(0, 100, (1000,))).backward()
    assert largest <= 1000 * 8


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_loss_without_a_state(tokens: torch.Tensor, backend: str) -> None:
    """The same loss and gradients, and nothing else."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=30, hidden_size=8, num_layers=2, num_states=4, conv_size=3, backend=backend))
    kept, state = model(tokens, tokens)
    alone, nothing = model(tokens, tokens, keep_state=False)
    assert len(state.layers) == 2
    assert nothing is None
    assert torch.equal(kept, alone)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(kept, parameters), torch.autograd.grad(alone, parameters), strict=True):
        torch.testing.assert_close(a, b)


ASSOCIATIVE = {"update_lag": 1, "rates": "head", "value_skip": True}


@pytest.mark.parametrize("form", [{}, ASSOCIATIVE], ids=["paper", "associative"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(tokens: torch.Tensor, packed: bool, form: dict[str, Any]) -> None:
    """With everything a model can have around the memory, and with the kernels (interpreted where there is no GPU)."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=30, hidden_size=8, num_layers=1, num_states=4, top_k=2, num_heads=2, conv_size=3, output_gate=True,
        backend="triton", **form,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokens = LanguageModel(config).to(device), tokens.reshape(1, -1).to(device)
    cu_seqlens = torch.tensor([0, 5, tokens.numel()], device=device) if packed else None

    def loss() -> torch.Tensor:
        return model(tokens, tokens, cu_seqlens=cu_seqlens)[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(compiled, loss())
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(compiled, parameters), torch.autograd.grad(loss(), parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_loss_without_targets_is_zero() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(10, 8), torch.full((5,), -100))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    with pytest.raises(ValueError, match="reduction='sum': use 'mean' or 'none'"):
        linear_cross_entropy(hidden, torch.randn(10, 8), torch.zeros(5, dtype=torch.long), "sum")


def test_needs_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=0"):
        LanguageModel(ModelConfig())


def test_initial_loss_is_that_of_a_uniform_guess(tokens: torch.Tensor) -> None:
    model = LanguageModel(ModelConfig(vocab_size=500, hidden_size=64, num_layers=4, num_states=8))
    loss, _ = model(tokens, tokens.roll(-1, 1))
    assert abs(loss.item() - torch.tensor(500.0).log()) < 0.3


def test_observed_routing(model: LanguageModel, tokens: torch.Tensor) -> None:
    with observe_routing(model) as observed:
        model(tokens)
    model(tokens)
    assert [len(records) for records in observed] == [1, 1]
    routing = observed[0][0]
    assert routing.indices.shape == routing.affinity.shape == (2, 40, 2, 2)
    assert not routing.update.requires_grad


def test_routing_health_sees_a_collapsed_router(tokens: torch.Tensor) -> None:
    model = LanguageModel(ModelConfig(vocab_size=30, hidden_size=16, num_layers=1, num_states=8))
    health = RoutingHealth(model)
    with health.observe():
        model(tokens)
    even = health.summary()[0]
    assert even["dead"] == [0]
    assert even["balance"][0] > 0.9
    assert abs(sum(even["share"][0]) - 1) < 1e-5
    # Each token's affinities all on the same state, whatever the token.
    router = model.blocks[0].mixer.affinity.weight
    router.data.zero_()
    with torch.no_grad():
        model.blocks[0].mixer_norm.weight.zero_()[0] = 1
        model.embedding.weight[:, 0] = 1
        router[3, 0] = 100
    health = RoutingHealth(model)
    with health.observe():
        model(tokens)
    collapsed = health.summary()[0]
    assert collapsed["dead"] == [7]
    assert collapsed["balance"][0] < 0.01
    assert collapsed["entropy"][0] < 0.01
    assert collapsed["memory_length"][0][3] < 10


def test_memory_length_is_the_mean_decay(model: LanguageModel, tokens: torch.Tensor) -> None:
    health = RoutingHealth(model)
    with health.observe():
        model(tokens)
    with observe_routing(model) as observed:
        model(tokens)
    routing = observed[1][0]
    decay = torch.zeros(2, 40, 2, 8, dtype=torch.float64).scatter(-1, routing.indices, -torch.log1p(-routing.update))
    expected = 1 / decay.mean((0, 1))
    lengths = torch.tensor(health.summary()[1]["memory_length"], dtype=torch.float64)
    torch.testing.assert_close(lengths, expected, rtol=1e-5, atol=0)


def test_unobserved_health_is_an_error(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="no forward pass observed"):
        RoutingHealth(model).summary()


def test_padding_is_not_counted(model: LanguageModel, tokens: torch.Tensor) -> None:
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 25:], mask[1, :10] = False, False
    padded, separate = RoutingHealth(model), RoutingHealth(model)
    with padded.observe():
        model(tokens, padding_mask=mask)
    with separate.observe():
        model(tokens[:1, :25])
        model(tokens[1:, 10:])
    torch.testing.assert_close(padded.summary()[1]["share"], separate.summary()[1]["share"])
    torch.testing.assert_close(padded.summary()[0]["entropy"], separate.summary()[0]["entropy"])


def test_targets_that_do_not_fit(model: LanguageModel, tokens: torch.Tensor) -> None:
    _, state = model(tokens)
    assert torch.equal(model(tokens, state)[0], model(tokens, state=state)[0])
    with pytest.raises(
        ValueError, match=r"targets: got a ModelState, and another as state; pass targets \(int64 \[B, T\]\) before state"
    ):
        model(tokens, state, state=state)
    with pytest.raises(ValueError, match="targets: got list"):
        model(tokens, tokens.tolist())
    with pytest.raises(ValueError, match=r"targets: got shape \(2, 1\), takes the shape of tokens, \(2, 40\)"):
        model(tokens, tokens[:, :1])
    with pytest.raises(ValueError, match="last_only=True: cannot be combined with targets"):
        model(tokens, tokens, last_only=True)


def test_the_loss_by_its_former_name(model: LanguageModel, tokens: torch.Tensor) -> None:
    _, state = model(tokens)
    (loss, after), (expected, wanted) = model.loss(tokens, tokens, state), model(tokens, tokens, state=state)
    assert loss == expected
    assert all(torch.equal(x, y) for x, y in zip(after.tensors(), wanted.tensors(), strict=True))
    each, nothing = model.loss(tokens, tokens, reduction="none", keep_state=False)
    assert torch.equal(each, model(tokens, tokens, reduction="none")[0])
    assert nothing is None
    assert model(tokens, keep_state=False)[1] is None


def test_a_target_that_is_no_token(model: LanguageModel, tokens: torch.Tensor) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        model(tokens, torch.full_like(tokens, -1))


def test_embeddings_are_multiplied_where_they_enter_and_not_in_the_head() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=30, hidden_size=16, num_layers=2, num_states=4)
    plain = LanguageModel(config).double()
    larger = LanguageModel(dataclasses.replace(config, embedding_multiplier=50.0)).double()
    larger.load_state_dict(plain.state_dict())
    tokens = torch.randint(0, 30, (2, 7))
    torch.testing.assert_close(larger.embed(tokens), 50 * plain.embed(tokens))
    logits, _ = larger(tokens)
    state = larger.initial_state(2)
    for t in range(7):
        step, state = larger.step(tokens[:, t], state)
        torch.testing.assert_close(step, logits[:, t])
    with torch.no_grad():  # without blocks, the norm takes the multiplier away again
        for block in (*plain.blocks, *larger.blocks):
            for weight in block.parameters():
                weight.zero_()
    torch.testing.assert_close(larger(tokens)[0], plain(tokens)[0], rtol=0, atol=1e-2)
    with pytest.raises(ConfigError, match="embedding_multiplier=0"):
        ModelConfig(embedding_multiplier=0)


def test_an_empty_packed_sequence_has_no_last_position(tokens: torch.Tensor) -> None:
    model = LanguageModel(ModelConfig(vocab_size=30, hidden_size=16, num_layers=1, num_states=4))
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[0, 3, 3, 5\], whose sequence 1 is empty"):
        model(tokens[:1, :5], cu_seqlens=torch.tensor([0, 3, 3, 5]), last_only=True)
    assert model(tokens[:1, :5], cu_seqlens=torch.tensor([0, 3, 3, 5]))[0].shape == (1, 5, 30)


def test_losses_of_tokens_in_bfloat16_are_those_of_its_logits() -> None:
    model = LanguageModel(ModelConfig(vocab_size=997, hidden_size=16, num_layers=1, num_states=8)).eval().bfloat16()
    model.embedding.weight.data.mul_(20)
    tokens = torch.randint(0, 997, (2, 50))
    with torch.no_grad():
        each, _ = model(tokens[:, :-1], tokens[:, 1:], reduction="none")
        mean, _ = model(tokens[:, :-1], tokens[:, 1:])
        logits, _ = model(tokens[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(each.flatten().double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(mean, each.mean(), rtol=1e-6, atol=1e-5)


def test_an_empty_text_has_no_last_position(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"tokens: got shape \(2, 0\), which has no last position"):
        model(torch.zeros(2, 0, dtype=torch.int64), last_only=True)


def test_states_and_layers_are_shown_by_their_sizes(model: LanguageModel) -> None:
    _, state = model(torch.zeros(3, 5, dtype=torch.int64))
    shown = repr(state)
    assert shown.splitlines()[0] == f"ModelState(batch_size=3, {state.num_bytes:,} bytes on cpu)"
    assert shown.splitlines()[1] == "  (1): LayerState(memory=float64[3, 2, 8, 16], convolution=float64[3, 2, 32])"
    assert "tensor(" not in shown
    assert "2 steps" in repr(model.keep_undo(state.detach(), 2))
    assert "num_states=8, top_k=2, num_heads=2, head_size=16, update_lag=0" in repr(model.blocks[0].mixer)


@pytest.mark.parametrize("mixer", ["memory", "attention", "mamba2", "gated_deltanet"])
def test_states_of_layers_are_detached(mixer: Any) -> None:
    sizes = {"mamba2": Mamba2Config(8, 8), "gated_deltanet": GatedDeltaNetConfig(head_size=8)}
    config = ModelConfig(vocab_size=30, hidden_size=16, num_layers=1, num_states=8, mixers=(mixer,), **sizes)  # type: ignore[arg-type]
    _, state = LanguageModel(config)(torch.zeros(3, 5, dtype=torch.int64))
    assert any(x.requires_grad for x in state.tensors())
    assert "tensor(" not in repr(state)
    for detached in (state.detach(), state.layers[0].detach()):  # type: ignore[attr-defined]
        assert not any(x.requires_grad for x in detached.tensors())


def test_states_saved_by_version_0_1_go_on() -> None:
    """They name the module that the state of a model was in then."""
    model = LanguageModel(ModelConfig(vocab_size=11, hidden_size=16, num_layers=2, num_states=4))
    tokens = torch.randint(0, 11, (1, 9))
    expected, _ = model(tokens)
    _, state = model(tokens[:, :5])
    saved = pickle.dumps(state.detach(), protocol=2)
    old = saved.replace(b"factorization_memory.layers.model_state\n", b"factorization_memory.layers.state\n")
    assert old != saved
    found, _ = model(tokens[:, 5:], state=pickle.loads(old))
    torch.testing.assert_close(found, expected[:, 5:])
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = state_module.Other
