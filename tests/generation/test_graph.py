"""One step of a batch: copies of states in, other weights, and on a GPU the captured step beside the one from Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from factorization_memory.config import AttentionConfig, ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.generation import SamplingConfig, StepGraph, Steps, generate_batch, steps_for, with_dtype
from factorization_memory.generation.graph import window
from factorization_memory.models import LanguageModel, ModelState
from factorization_memory.models.decoding import DecodingModel

TOKENIZER = Tokenizer.bytes_level()
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"top_k": 2, "num_heads": 2, "conv_size": 3, "output_gate": True},
    "rates of a head": {"rates": "head", "tie_word_embeddings": False},
    "associative": {"update_lag": 1, "top_k": 2, "rates": "head", "conv_size": 3, "value_skip": True, "output_gate": True},
    "associative, dense": {"update_lag": 1, "num_heads": 2},
}


def build(form: str, device: str = "cpu", hidden_size: int = 32) -> LanguageModel:
    config = ModelConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=hidden_size, num_layers=2, num_states=16, **FORMS[form])
    return LanguageModel(config).to(device).eval()


def read(model: LanguageModel, batch: int, length: int = 10) -> ModelState:
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(torch.randint(0, 256, (batch, length), device=device))[1]


def same(left: ModelState, right: ModelState) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.tensors(), right.tensors(), strict=True))


def test_steps_are_the_models() -> None:
    model = build("sparse")
    state = read(model, 3)
    steps = Steps(model, 3)
    assert not steps.captured
    steps.load(state)
    kept = state.clone()
    for _ in range(3):
        tokens = torch.randint(0, 256, (3,))
        expected, state = model.step(tokens, state)
        assert torch.equal(steps.step(tokens), expected)
    assert same(steps.state, state)
    assert not same(kept, state)


def test_rows_are_loaded_one_by_one() -> None:
    model = build("sparse")
    state, later = read(model, 4), read(model, 2)
    steps = Steps(model, 4)
    steps.load(state)
    steps.load(later, [3, 1])
    assert same(steps.state.select([0, 2]), state.select([0, 2]))
    assert same(steps.state.select([3, 1]), later)


@pytest.mark.parametrize(("mixers", "sliding_window", "expected"), [
    (("memory", "attention"), 6, 6), (("memory", "attention"), None, 0), (("memory",), 6, 0),
])  # fmt: skip
def test_a_window_has_its_size_from_the_start(mixers: tuple[Any, ...], sliding_window: int | None, expected: int) -> None:
    attention = AttentionConfig(num_heads=2, sliding_window=sliding_window)
    config = ModelConfig(vocab_size=9, hidden_size=8, num_layers=2, num_states=4, mixers=mixers, attention=attention)
    model = LanguageModel(config).eval()
    assert window(model) == expected
    if "attention" in mixers:
        assert Steps(model, 2).state.layers[1].capacity == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", list(FORMS))
def test_steps_can_be_rolled_back(form: str) -> None:
    check_roll_back(Steps(build(form), 2, undo_steps=3))


def check_roll_back(steps: Steps) -> None:
    state = read(steps.model, 2)
    device = state.layers[0].memory.device
    tokens = [torch.randint(0, 256, (2,), device=device) for _ in range(5)]
    steps.load(state)
    with pytest.raises(ValueError, match="the last 0 steps"):
        steps.state.rollback(1)
    after = []
    for row in tokens:
        logits = steps.step(row).clone()
        after.append((logits, steps.state.clone()))
    steps.state.rollback(3)
    assert same(steps.state, after[1][1])
    for row, (logits, kept) in zip(tokens[2:], after[2:], strict=True):
        assert torch.equal(steps.step(row), logits)
        assert same(steps.state, kept)
    steps.load(state)
    with pytest.raises(ValueError, match="the last 0 steps"):
        steps.state.rollback(1)


@pytest.mark.parametrize("form", list(FORMS))
def test_bfloat16_weights_with_float32_memories(form: str) -> None:
    model = build(form)
    rounded = with_dtype(model, torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    assert with_dtype(rounded, torch.bfloat16) is rounded
    assert with_dtype(model, None) is model
    assert (rounded.head.weight is rounded.embedding.weight) == model.config.tie_word_embeddings
    tokens = torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        exact, _ = model(tokens)
        logits, state = rounded(tokens[:, :15])
    steps = Steps(model, 2, torch.bfloat16)
    assert next(steps.model.parameters()).dtype == torch.bfloat16
    steps.load(state)
    for t in range(15, 20):
        logits = steps.step(tokens[:, t])
    assert all(layer.memory.dtype == torch.float32 for layer in steps.state)
    error = (logits.float() - exact[:, -1]).norm() / exact[:, -1].norm()
    assert error < 0.15  # a token that is near to two states may select another of them


def test_a_state_in_another_dtype_is_cast() -> None:
    model = build("sparse")
    with torch.autocast("cpu", torch.bfloat16):
        state = read(model, 2)
    assert state.layers[0].convolution is not None
    steps = Steps(model, 2)
    steps.load(state)
    steps.load(state, [1, 0])
    assert all(tensor.dtype == torch.float32 for tensor in steps.state.tensors())


def test_bad_arguments_name_themselves() -> None:
    model = build("sparse")
    with pytest.raises(ValueError, match="batch_size=0"):
        Steps(model, 0)
    steps = Steps(model, 3)
    with pytest.raises(ValueError, match="got 2 sequences, takes 3"):
        steps.load(read(model, 2))
    with pytest.raises(ValueError, match="got 2 sequences, takes 1"):
        steps.load(read(model, 2), [0])
    with pytest.raises(ValueError, match="not from this model"):
        steps.load(read(build("dense"), 3))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a GPU"):
            StepGraph(model, 1)


@pytest.fixture
def free_order() -> Iterator[None]:
    """Some of PyTorch's kernels on GPUs have no deterministic form that its switch would accept."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
@pytest.mark.usefixtures("free_order")
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_a_graph_computes_the_bits_of_the_model(form: str, dtype: torch.dtype, fused: bool) -> None:
    model = with_dtype(build(form, "cuda", hidden_size=64), dtype)
    state = read(model, 3, 40)
    graph = StepGraph(model, 3, fused=fused)
    step = DecodingModel(model).step if graph.fused else model.step
    assert fused or not graph.fused
    assert all(not tensor.any() for tensor in graph.state.tensors())
    tokens = [torch.randint(0, 256, (3,), device="cuda") for _ in range(5)]
    runs = []
    for _ in range(2):
        graph.load(state)
        logits = [graph.step(row).clone() for row in tokens]
        runs.append((logits, graph.state.clone()))
    mine = state.clone()
    eager = [step(row, mine)[0].clone() for row in tokens]
    for logits, after in runs:
        assert all(torch.equal(a, b) for a, b in zip(logits, eager, strict=True))
        assert same(after, mine)


@pytest.mark.gpu
@pytest.mark.usefixtures("free_order")
@pytest.mark.parametrize("form", list(FORMS))
def test_steps_of_a_graph_can_be_rolled_back(form: str) -> None:
    graph = steps_for(build(form, "cuda", hidden_size=64), 2, undo_steps=3)
    assert isinstance(graph, StepGraph)
    check_roll_back(graph)


@pytest.mark.gpu
@pytest.mark.usefixtures("free_order")
def test_a_graph_made_under_autocast_outlives_the_block() -> None:
    model = build("sparse", "cuda", hidden_size=64)
    state = read(model, 2)
    tokens = torch.tensor([1, 2], device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected, _ = model.step(tokens, state.clone())
        graph = StepGraph(model, 2)
    torch.cuda.empty_cache()
    junk = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(8)]
    graph.load(state)
    assert torch.equal(graph.step(tokens), expected)
    del junk


@pytest.mark.gpu
@pytest.mark.usefixtures("free_order")
def test_generation_with_graphs_is_generation_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("sparse", "cuda", hidden_size=64)
    prompts = ["It was a dark and stormy night", "x", "雨が降る", "It was"]
    options: dict[str, Any] = {
        "max_tokens": 40, "sampling": SamplingConfig(temperature=3), "num_samples": 6, "stop": ["e", "t", "\x00"],
    }  # fmt: skip
    monkeypatch.setattr("factorization_memory.generation.graph.why_unsupported", lambda model: "its bits are other ones")
    graphs = generate_batch(model, TOKENIZER, prompts, **options)
    monkeypatch.setattr("factorization_memory.generation.pool.steps_for", Steps)
    eager = generate_batch(model, TOKENIZER, prompts, **options)
    # Batches of another size may round otherwise, and a draw at the very border fall otherwise.
    agreeing = sum(a.tokens == b.tokens for a, b in zip(graphs, eager, strict=True))
    assert agreeing >= len(eager) - 2
    assert max(one.capture_seconds for one in graphs) > 0
