"""A model compiled as one graph goes on at other lengths, with a number of graphs that does not grow with that of lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from factorization_memory import LanguageModel
from factorization_memory.config import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from factorization_memory.models import ModelState

SIZES: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 16, "num_layers": 1, "num_states": 8,
    "mamba2": Mamba2Config(8, 8), "gated_deltanet": GatedDeltaNetConfig(head_size=8),
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "associative": {"top_k": 3, "conv_size": 3, "update_lag": 1},
    "attention": {"mixers": ("memory", "attention"), "num_layers": 2},
    "window": {"mixers": ("attention",), "attention": AttentionConfig(2, 1, sliding_window=4)},
    "mamba2": {"mixers": ("mamba2",)},
    "gated_deltanet": {"mixers": ("gated_deltanet",)},
}
LENGTHS = (9, 13, 70, 22)
MOST_GRAPHS = 4
"""The first length's, that of any, and one for what is smaller than a chunk, or than a measure of routing."""


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "eager") -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


def make(name: str, **options: Any) -> LanguageModel:
    return LanguageModel(ModelConfig(**(SIZES | MODELS[name]), **options)).eval()


def draw(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 11, (batch, length))


@pytest.mark.parametrize("name", ["associative", "window", "mamba2", "gated_deltanet"])
def test_logits(name: str) -> None:
    model = make(name)
    call, counter = compiled(lambda tokens: model(tokens)[0])
    with torch.no_grad():
        for length in LENGTHS:
            tokens = draw(length)
            assert_close(call(tokens), model(tokens)[0])
    assert counter.frame_count <= MOST_GRAPHS


@pytest.mark.parametrize("name", ["associative", "window"])
def test_padding(name: str) -> None:
    model = make(name)
    call, counter = compiled(lambda tokens, mask: model(tokens, padding_mask=mask)[0])
    with torch.no_grad():
        for length in LENGTHS:
            tokens, mask = draw(length), torch.rand(2, length) > 0.3
            assert_close(call(tokens, mask)[mask], model(tokens, padding_mask=mask)[0][mask])
    assert counter.frame_count <= MOST_GRAPHS


@pytest.mark.parametrize("name", ["associative", "attention", "gated_deltanet"])
def test_packed_sequences(name: str) -> None:
    """Of changing number."""
    model = make(name)
    call, counter = compiled(lambda tokens, borders: model(tokens, cu_seqlens=borders)[0])
    with torch.no_grad():
        for length in LENGTHS:
            tokens = draw(length, batch=1)
            inner = torch.randperm(length - 1)[: length % 7 + 1].sort().values + 1
            borders = torch.cat((torch.tensor([0]), inner, torch.tensor([length]))).int()
            assert_close(call(tokens, borders), model(tokens, cu_seqlens=borders)[0])
    assert counter.frame_count <= MOST_GRAPHS


@pytest.mark.parametrize("name", ["associative", "attention", "mamba2", "gated_deltanet"])
def test_reading_on(name: str) -> None:
    """From a state, several tokens and one."""
    model = make(name)
    call, counter = compiled(lambda tokens, state: model(tokens, state=state))
    with torch.no_grad():
        for length in LENGTHS[:3]:
            tokens = draw(length)
            _, state = model(tokens[:, :5])
            _, whole = model(tokens)
            for piece in (tokens[:, 5:-1], tokens[:, -1:], tokens[:, :3]):
                (got, state), (expected, _) = call(piece, state), model(piece, state=state)
                assert_close(got, expected)
            expected, _ = model(tokens[:, :3], state=whole)
            assert_close(got, expected)
    assert counter.frame_count <= MOST_GRAPHS + 1


@pytest.mark.parametrize("name", MODELS)
def test_steps(name: str) -> None:
    model = make(name)
    call, counter = compiled(model.step)
    with torch.no_grad():
        for length in LENGTHS[:3]:
            tokens = draw(length)
            _, mine = model(tokens[:, :-4])
            whole, _ = model(tokens)
            for t in range(length - 4, length):
                logits, mine = call(tokens[:, t], mine)
                assert_close(logits, whole[:, t])
    assert counter.frame_count <= MOST_GRAPHS


def loss_of(model: LanguageModel, tokens: Tensor, targets: Tensor, state: ModelState, borders: Tensor | None) -> Any:
    return model(tokens, targets, state=state, cu_seqlens=borders)[0]


@pytest.mark.parametrize(("name", "packed"), [("dense", False), ("associative", True), ("gated_deltanet", False)])
def test_gradients(name: str, packed: bool) -> None:
    """Compiled both ways."""
    model = make(name)
    call, counter = compiled(lambda *given: loss_of(model, *given), "aot_eager")
    for length in LENGTHS[:3]:
        tokens = draw(length + 1, batch=1)
        borders = torch.tensor([0, 1, *([5] * (length % 4)), length], dtype=torch.int32) if packed else None
        _, state = model(draw(4, batch=1 if borders is None else len(borders) - 1))
        found = []
        for loss in (call, lambda *given: loss_of(model, *given)):
            loss(tokens[:, :-1], tokens[:, 1:], state.detach(), borders).backward()
            found.append([p.grad for p in model.parameters()])
            model.zero_grad()
        for got, expected in zip(*found, strict=True):
            assert got is not None
            assert_close(got, expected)
    assert counter.frame_count <= 2 * (MOST_GRAPHS + 1)
