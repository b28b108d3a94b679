"""Steps of a whole model taken back to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factorization_memory.config import ModelConfig
from factorization_memory.models import LanguageModel

PURE = {"vocab_size": 30, "hidden_size": 16, "num_layers": 2, "num_states": 6}
CONFIGS = {
    "dense": ModelConfig(**PURE),
    "sparse": ModelConfig(**PURE, top_k=2, num_heads=2, conv_size=3, output_gate=True),
    "associative": ModelConfig(**PURE, top_k=2, update_lag=1, conv_size=3, rates="head"),
    "associative, dense": ModelConfig(**PURE, update_lag=1),
    "a lag of 2": ModelConfig(**PURE, top_k=2, num_heads=2, update_lag=2),
}


def model_of(name: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(CONFIGS[name]).eval()


@settings(max_examples=12, deadline=None)
@given(st.data(), st.sampled_from(sorted(CONFIGS)))
def test_any_steps_and_rollbacks(data: st.DataObject, name: str) -> None:
    """The state is, to the bit, that of the steps that stand."""
    model = model_of(name)
    _, begun = model(torch.randint(0, 30, (2, 5)))
    state = model.keep_undo(begun, 3)
    history = [[x.clone() for x in state.tensors()]]
    kept = 0
    for _ in range(data.draw(st.integers(1, 8))):
        back = data.draw(st.integers(0, kept))
        state.rollback(back)
        del history[len(history) - back :]
        kept -= back
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), history[-1], strict=True))
        model.step(torch.randint(0, 30, (2,)), state)
        history.append([x.clone() for x in state.tensors()])
        kept = min(3, kept + 1)


@pytest.mark.parametrize("keeps", [True, False])
def test_snapshots(keeps: bool) -> None:
    model = model_of("sparse")
    state = model.initial_state(2)
    if keeps:
        state = model.keep_undo(state, 4)
    model.step(torch.tensor([1, 2]), state)
    snapshot, before = state.snapshot(), [x.clone() for x in state.tensors()]
    assert (snapshot.copy is None) == keeps
    first = [model.step(torch.tensor([t, t]), state)[0] for t in (3, 4, 5)]
    state.restore(snapshot)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before, strict=True))
    again = [model.step(torch.tensor([t, t]), state)[0] for t in (3, 4, 5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_undoing_costs_as_much_as_the_selected_states() -> None:
    model = model_of("sparse")
    state = model.keep_undo(model.initial_state(2), 4)
    undo = state.layers[0].undo
    assert undo is not None
    assert undo.rows.shape == (4, 2, 2, 2, 16)
    assert state.undo_steps == 4
    assert state.clone().undo_steps == 0  # what is kept belongs to one state


def test_no_further_back_than_kept() -> None:
    model = model_of("sparse")
    plain = model.initial_state(1)
    model.step(torch.tensor([1]), plain)
    with pytest.raises(
        ValueError, match=r"steps=1: only the last 0 steps can be rolled back; call LanguageModel.keep_undo first"
    ):
        plain.rollback(1)
    state = model.keep_undo(plain, 2)
    snapshot = state.snapshot()
    for _ in range(3):
        model.step(torch.tensor([1]), state)
    with pytest.raises(ValueError, match=r"snapshot: not among the last 2 steps that this state keeps"):
        state.restore(snapshot)
    with pytest.raises(ValueError, match=r"steps=3: only the last 2 steps can be rolled back; keep more"):
        state.rollback(3)
    with pytest.raises(ValueError, match="steps=0: use 1 or more"):
        model.keep_undo(state, 0)


def test_a_point_that_was_left_is_not_restored() -> None:
    """Not by other steps after a rollback, nor of another state, nor once other numbers were written in."""
    model = model_of("sparse")
    state = model.keep_undo(model.initial_state(1), 8)
    for token in (1, 2, 3):
        model.step(torch.tensor([token]), state)
    snapshot, there = state.snapshot(), [x.clone() for x in state.tensors()]
    model.step(torch.tensor([4]), state)
    state.restore(snapshot)
    state.restore(snapshot)  # it stands there already
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), there, strict=True))
    state.rollback(2)
    for token in (5, 6):
        model.step(torch.tensor([token]), state)
    with pytest.raises(ValueError, match="snapshot: not among"):
        state.restore(snapshot)
    other = model.keep_undo(model.initial_state(1), 8)
    with pytest.raises(ValueError, match="snapshot: not among"):
        other.restore(snapshot)
    fresh = state.snapshot()
    state.forget_steps()
    with pytest.raises(ValueError, match="snapshot: not among the last 0 steps"):
        state.restore(fresh)


def test_nothing_is_rolled_back_past_a_copy() -> None:
    model = model_of("dense")
    state = model.initial_state(1)
    snapshot = state.snapshot()
    kept = model.keep_undo(state, 4)
    model.step(torch.tensor([1]), kept)
    kept.restore(snapshot)
    with pytest.raises(ValueError, match="the last 0 steps"):
        kept.rollback(1)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_step_of_no_sequences(lag: int) -> None:
    model = LanguageModel(ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, num_states=4, top_k=2, update_lag=lag)).eval()
    logits, _ = model.step(torch.zeros(0, dtype=torch.int64), model.initial_state(0))
    assert logits.shape == (0, 11)


def test_reset_of_a_state_that_is_not_finite() -> None:
    model = LanguageModel(ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, num_states=4, top_k=2)).eval()
    _, state = model(torch.zeros(2, 3, dtype=torch.int64))
    state.layers[0].memory[0] = torch.nan
    again = state.reset(torch.tensor([True, False]))
    assert not again.layers[0].memory[0].any()
    assert torch.equal(again.layers[0].memory[1], state.layers[0].memory[1])
