"""The states of layers: what they are made of, what is refused, and steps of the memory taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from factorization_memory import FactorizationMemory
from factorization_memory.layers import LayerState, LayerStateBase, ModelState
from factorization_memory.layers.state import Undo, make_writable


@pytest.fixture
def x() -> Tensor:
    return torch.nn.functional.rms_norm(torch.randn(3, 70, 16, dtype=torch.float64), (16,))


@dataclass(repr=False)
class Made(LayerStateBase):
    """A state as another package may make one."""

    memory: Tensor
    count: Tensor
    rate: float = 0.5


def test_a_state_of_another_package() -> None:
    state = Made(torch.ones(3, 2, requires_grad=True), torch.tensor([1, 2, 3]))
    assert (state.batch_size, state.undo) == (3, None)
    assert [id(tensor) for tensor in state.tensors()] == [id(state.memory), id(state.count)]
    doubled = state.apply(lambda tensor: 2 * tensor)
    assert (type(doubled), doubled.rate) == (Made, 0.5)
    assert torch.equal(doubled.count, torch.tensor([2, 4, 6]))
    assert torch.equal(state.count, torch.tensor([1, 2, 3]))
    assert doubled.memory.requires_grad
    assert not doubled.detach().memory.requires_grad
    assert repr(state) == "Made(memory=float32[3, 2], count=int64[3], rate=0.5)"


def test_what_was_made_in_inference_mode_is_copied_once_it_has_ended() -> None:
    with torch.inference_mode():
        state = LayerState(torch.zeros(1, 1, 2, 3), convolution=torch.zeros(1, 2, 3))
        inside = state.memory
        make_writable(state)
        assert state.memory is inside
    make_writable(state)
    assert not any(tensor.is_inference() for tensor in state.tensors())
    ours = state.memory
    make_writable(state)
    assert state.memory is ours


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("apart", [False, True], ids=["same states", "other states merged"])
def test_steps_are_the_formula_and_are_taken_back_to_the_bit(top_k: int | None, apart: bool) -> None:
    """More steps than are kept, and each number of them taken back."""
    batch, heads, states, width, depth, steps = 2, 3, 5, 4, 3, 5
    memory, tail = torch.randn(batch, heads, states, width, dtype=torch.float64), torch.randn(batch, 2, 6, dtype=torch.float64)
    selected = (depth, batch, heads, top_k or states)
    undo = Undo(
        torch.empty(*selected, width, dtype=torch.float64),
        None if top_k is None else torch.zeros(selected, dtype=torch.int64),
        [torch.empty(depth, *tail.shape, dtype=torch.float64)],
        torch.zeros(1, dtype=torch.int64),
    )
    state = LayerState(memory, tail, undo=undo)
    history = [[tensor.clone() for tensor in state.tensors()]]
    for _ in range(steps):
        update, merge = torch.rand(2, *selected[1:], dtype=torch.float64)
        value = torch.randn(batch, heads, width, dtype=torch.float64)
        chosen = None if top_k is None else torch.rand(batch, heads, states).topk(top_k).indices
        read = torch.rand(batch, heads, states).topk(top_k).indices if apart and top_k else chosen
        theta, phi = (
            weights if places is None else torch.zeros(batch, heads, states, dtype=torch.float64).scatter(-1, places, weights)
            for weights, places in ((update, chosen), (merge, read))
        )
        expected = (1 - theta)[..., None] * state.memory + theta[..., None] * value[:, :, None]
        undo.put_aside(state)
        y = state.advance(update, merge, value, chosen, read, "auto")
        tail.mul_(0.5)
        undo.position.add_(1).remainder_(depth)
        torch.testing.assert_close(state.memory, expected)
        torch.testing.assert_close(y, (phi[..., None] * expected).sum(2))
        history.append([tensor.clone() for tensor in state.tensors()])
    for back in (1, depth - 1):
        undo.roll_back(state, back)
        undo.position.sub_(back).remainder_(depth)
        del history[len(history) - back :]
        for found, then in zip(state.tensors(), history[-1], strict=True):
            assert torch.equal(found, then)


def test_what_steps_overwrite_belongs_to_one_state() -> None:
    layer = FactorizationMemory(16, 8, top_k=3, update_lag=1, conv_size=2)
    state = layer.initial_state(2)
    kept = layer.keep_undo(state, 4, torch.zeros(1, dtype=torch.int64))
    assert kept.memory is state.memory
    assert kept.undo is not None
    assert kept.undo.rows.shape == (4, 2, 1, 3, 32)
    assert [ring.shape[1:] for ring in kept.undo.rest] == [tensor.shape for tensor in state.rest()]
    assert repr(kept).endswith("undo=4 steps)")
    assert kept.apply(torch.clone).undo is None
    assert kept.detach().undo is None


def test_state_container() -> None:
    layer = FactorizationMemory(16, num_states=8, conv_size=4)
    _, one = layer(torch.randn(3, 5, 16))
    state = ModelState([one.apply(torch.detach), layer.initial_state(3)])
    assert (state.batch_size, len(state)) == (3, 2)
    assert state.num_bytes == 2 * 4 * (3 * 8 * 32 + 3 * 3 * 32)
    copy = state.clone()
    copy.layers[0].memory.zero_()
    assert state.layers[0].memory.abs().sum() > 0
    chosen = state.select([2, 0, 0])
    for a, b in zip(chosen.tensors(), state.tensors(), strict=True):
        assert torch.equal(a, b[[2, 0, 0]])
    for a, b in zip(state.place([4, 1, 0], 5).tensors(), state.tensors(), strict=True):
        assert torch.equal(a[[4, 1, 0]], b)
        assert not a[2:4].any()
    for a, b in zip(state.reset(torch.tensor([True, False, False])).tensors(), state.tensors(), strict=True):
        assert not a[0].any()
        assert torch.equal(a[1:], b[1:])
    assert not state.detach().layers[0].memory.requires_grad
    assert state.to("cpu").layers[0].memory.device.type == "cpu"


@pytest.mark.parametrize(
    ("saved", "read", "message"),
    [
        (
            {},
            {"update_lag": 1},
            r"state\.affinity: the state has update_lag=0, but the layer update_lag=1; read the text again",
        ),
        ({"update_lag": 1}, {}, "has update_lag=1, but the layer update_lag=0; read the text again"),
        ({"update_lag": 2}, {"update_lag": 1}, "has update_lag=2, but the layer update_lag=1"),
        (
            {"update_lag": 1},
            {"update_lag": 1, "top_k": 3},
            r"state\.indices: the state has no selection, but the layer top_k=3; take one",
        ),
        (
            {"update_lag": 1, "top_k": 2},
            {"update_lag": 1, "top_k": 3},
            r"state\.affinity: got torch\.float64 \(3, 1, 1, 2\) on cpu, takes torch\.float64 \(3, 1, 1, 3\)",
        ),
    ],
)
def test_a_state_of_another_selection_is_refused(saved: dict[str, Any], read: dict[str, Any], message: str, x: Tensor) -> None:
    _, state = FactorizationMemory(16, 8, **saved).double()(x)
    layer = FactorizationMemory(16, 8, **read).double()
    with pytest.raises(ValueError, match=message):
        layer(x, state)
    with pytest.raises(ValueError, match=message):
        layer.step(x[:, 0], state)


def test_indices_that_were_made_floats_are_refused(x: Tensor) -> None:
    layer = FactorizationMemory(16, 8, top_k=2, update_lag=1)
    _, state = layer(x.float())
    with pytest.raises(ValueError, match=r"state\.indices: got torch\.float64 .*, takes torch\.int64"):
        layer.double()(x, state.apply(Tensor.double))


def test_a_step_with_a_state_of_another_batch_is_refused(x: Tensor) -> None:
    layer = FactorizationMemory(16, 8, top_k=2, update_lag=1).double()
    with pytest.raises(ValueError, match=r"state\.memory: got shape \(2, 1, 8, 32\), takes \(3, 1, 8, 32\)"):
        layer.step(x[:, 0], layer.initial_state(2))
