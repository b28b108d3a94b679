"""The fused decoding step of the CPU against `LanguageModel.step`: logits and states."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from factorization_memory.config import ModelConfig
from factorization_memory.generation.graph import LoopSteps, Steps, steps_for
from factorization_memory.models import LanguageModel
from factorization_memory.models.loop_decoding import LoopDecodingModel, why_unsupported
from factorization_memory.ops import runtime
from factorization_memory.ops.routing import route

pytest.importorskip("numba")


def model(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 24, "num_layers": 2, "num_states": 12, "top_k": 3}
    made = LanguageModel(ModelConfig(**sizes | options)).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


FORMS = {
    "paper": {},
    "associative": {"update_lag": 1, "conv_size": 4, "rates": "head", "value_skip": True, "output_gate": True},
    "lag of two, heads, rates of states": {"update_lag": 2, "num_heads": 2, "rates": "state", "conv_size": 2},
    "most states, one tap": {"top_k": 11, "update_lag": 1, "conv_size": 1, "temperature": 0.5, "embedding_multiplier": 3.0},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_plain_step(form: str, batch: int) -> None:
    plain = model(**FORMS[form])
    fused = LoopDecodingModel(plain)
    expected, got = plain.initial_state(batch), plain.initial_state(batch)
    for tokens in torch.randint(0, 40, (20, batch)):
        logits, _ = plain.step(tokens, expected)
        mine, same = fused.step(tokens, got)
        assert same is got
        torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(got.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_reads_on_from_a_prompt() -> None:
    """The states of whole sequences and of both kinds of steps are the same."""
    plain = model(**FORMS["associative"])
    tokens = torch.randint(0, 40, (2, 15))
    logits, _ = plain(tokens)
    _, state = plain(tokens[:, :10])
    fused = LoopDecodingModel(plain)
    for t in range(10, 15):
        mine, state = fused.step(tokens[:, t], state)
        torch.testing.assert_close(mine, logits[:, t].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 4, 9])
def test_selects_as_routing_does(top_k: int) -> None:
    """Ties go to the lower index, NaN is above any number, -0.0 is 0.0."""
    from factorization_memory.ops.decoding import loops

    awkward = torch.tensor([[0.0, -0.0, 1.0, 1.0, math.nan, -math.inf, math.inf, -1.0, math.nan]])
    for logits in (*awkward, *torch.randint(-2, 3, (20, 9)).float()):
        *_, expected = route(logits[None], None, logits[None], top_k)
        selected = np.empty(top_k, np.int64)
        loops.select(logits.numpy(), selected)
        assert selected.tolist() == expected[0].tolist()


def test_steps_that_keep_undo_are_plain() -> None:
    plain = model(**FORMS["associative"])
    fused = LoopDecodingModel(plain)
    state = plain.keep_undo(plain.initial_state(1), 4)
    before = [tensor.clone() for tensor in state.tensors()]
    for _ in range(3):
        fused.step(torch.tensor([5]), state)
    state.rollback(3)
    for a, b in zip(state.tensors(), before, strict=True):
        assert torch.equal(a, b)


def test_it_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(steps_for(model(), 2)) is LoopSteps
    assert type(steps_for(model(), 100)) is Steps
    assert type(steps_for(model(), 2, undo_steps=3)) is Steps
    reasons = {
        "top_k=None": model(top_k=None),
        "top_k=12: the loops need selected states": model(top_k=12),
        "backend='chunked' is plain PyTorch": model(backend="chunked"),
        "backend='triton' is not that of the loops": model(backend="triton"),
        "memory layers alone": model(mixers=("memory", "attention")),
        "its weights are torch.float64": model().double(),
    }
    hooked = model()
    hooked.blocks[0].register_forward_hook(lambda *_: None)
    reasons["a forward hook"] = hooked
    for reason, unfit in reasons.items():
        assert reason in (why_unsupported(unfit) or "")
        assert type(steps_for(unfit, 2)) is Steps
    with pytest.raises(ValueError, match=r"model: top_k=None: the loops need selected states; use LanguageModel.step"):
        LoopDecodingModel(model(top_k=None))
    monkeypatch.setattr(runtime, "_numba_problem", lambda: "Numba is not installed (pip install numba)")
    assert type(steps_for(model(), 2)) is Steps
    assert "Numba is not installed" in (why_unsupported(model()) or "")


def test_weights_that_change_are_seen() -> None:
    """All of them, copied or not; other dtypes fall back to the plain step."""
    plain = model(**FORMS["associative"])
    fused = LoopDecodingModel(plain)
    expected, got = plain.initial_state(1), plain.initial_state(1)
    token = torch.tensor([3])

    @torch.no_grad()
    def train() -> None:
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    for change in (lambda: None, train, plain.double, plain.float):
        change()
        if expected.layers[0].memory.dtype != plain.embedding.weight.dtype:
            expected, got = plain.initial_state(1), plain.initial_state(1)
        torch.testing.assert_close(fused.step(token, got)[0], plain.step(token, expected)[0], rtol=1e-4, atol=1e-4)


def test_autocast_and_autograd_are_heard() -> None:
    plain = model(**FORMS["associative"])
    fused = LoopDecodingModel(plain)
    token = torch.tensor([3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = fused.step(token, plain.initial_state(1))
        expected, _ = plain.step(token, plain.initial_state(1))
        assert got.dtype == expected.dtype == torch.bfloat16
    _, state = plain(torch.tensor([[1, 2, 3]]))
    loss = sum((layer.memory**2).sum() for layer in state)
    fused.step(token, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_state_of_another_batch_is_refused() -> None:
    plain = model()
    with pytest.raises(ValueError, match=r"state.memory: got shape \(1, 1, 12, 48\), takes \(2, 1, 12, 48\)"):
        LoopDecodingModel(plain).step(torch.tensor([1, 2]), plain.initial_state(1))


@pytest.mark.parametrize("index", [-1, 12])
def test_a_state_that_names_no_state_is_refused(index: int) -> None:
    """A compiled loop would write past the memory."""
    plain = model(**FORMS["associative"])
    state = plain.initial_state(1)
    state.layers[1].indices[0, 0, 0, 2] = index
    with pytest.raises(ValueError, match=r"state.indices: contains an index outside the layer's states"):
        LoopDecodingModel(plain).step(torch.tensor([1]), state)
