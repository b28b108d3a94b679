"""Every backend against the float64 reference loop: outputs, final states and every gradient."""

from __future__ import annotations

import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factorization_memory.config import Backend
from factorization_memory.ops import BACKEND_NAMES, factorization_memory, factorization_memory_step
from factorization_memory.ops.memory import backends, layout
from factorization_memory.ops.memory.backends import MemoryBackend
from recurrence import Case, assert_close, cases, make


@settings(max_examples=60, deadline=None)
@given(cases())
def test_chunked_equals_reference(case: Case) -> None:
    assert_close(case.run("chunked"), case.run("reference"), 1e-10)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 509])
@pytest.mark.parametrize("kind", ["uniform", "adversarial"])
def test_odd_lengths(length: int, kind: str) -> None:
    case = make(2, length, 2, 5, 3, kind=kind)
    assert_close(case.run("chunked"), case.run("reference"), 1e-10)


def test_many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """States kept for backward cross group borders."""
    monkeypatch.setattr(layout, "GROUP_TOKENS", 64)
    for borders in (None, [0, 3, 3, 400, 401, 700]):
        case = make(1, 700, 2, 5, 3, kind="adversarial", borders=borders)
        assert_close(case.run("chunked"), case.run("reference"), 1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_gates_at_their_ends_are_exact(backend: str, level: float) -> None:
    """theta = 1 overwrites, theta = 0 keeps, and gradients stay finite and right."""
    case = make(1, 100, 1, 3, 4)
    case.update.fill_(level)
    y, final, *gradients = case.run(backend)
    expected = case.value[0, -1] if level == 1 else case.initial[0, 0]
    assert torch.equal(final[0, 0], expected.expand_as(final[0, 0]))
    assert_close([y, final, *gradients], case.run("reference"), 1e-10)


def test_float32_accuracy_of_strong_writes() -> None:
    """float32 stays near float64, also in the gradients of update weights that nearly overwrite."""
    case = make(2, 300, 1, 8, 16, kind="adversarial")
    case.update = case.update.float().double()
    expected = case.run("reference")
    got = case.run("chunked", torch.float32)
    assert_close(got, expected, 1e-5)
    strong = case.update >= 0.99
    error = (got[2] - expected[2])[strong].norm() / expected[2][strong].norm()
    assert error <= 1e-5


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_bfloat16_values(backend: str) -> None:
    case = make(2, 130, 2, 8, 16)
    for name in ("update", "merge", "value", "d_output"):
        setattr(case, name, getattr(case, name).bfloat16().double())
    got, expected = case.run(backend, torch.bfloat16), case.run("reference")
    assert_close(got, expected, 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("borders", [None, [0, 3, 3, 130, 700]])
def test_chunked_on_gpu(top_k: int | None, borders: list[int] | None) -> None:
    case = make(1, 700, 2, 9, 16, top_k=top_k, kind="adversarial", borders=borders)
    expected = case.run("reference")
    assert_close(case.run("chunked", torch.float64, "cuda"), expected, 1e-10)
    assert_close(case.run("chunked", torch.float32, "cuda"), expected, 1e-5)


def test_gradcheck() -> None:
    case = make(1, 7, 1, 3, 2)
    leaves = [x.clone().requires_grad_() for x in (case.update, case.merge, case.value, case.initial)]

    def call(*xs: Tensor) -> tuple[Tensor, ...]:
        return factorization_memory(*xs[:3], initial_state=xs[3], output_final_state=True, backend="chunked")

    assert torch.autograd.gradcheck(call, leaves)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 150), st.data())
def test_splitting_anywhere_changes_nothing(length: int, data: st.DataObject) -> None:
    """The state after a prefix, and the rest from it, are the whole."""
    case = make(2, length, 2, 4, 3, top_k=data.draw(st.none() | st.integers(1, 4)))
    cut = data.draw(st.integers(1, length - 1))
    whole, final = factorization_memory(case.update, case.merge, case.value, case.indices, None, 4, case.initial, True)

    def part(piece: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        indices = None if case.indices is None else case.indices[:, piece]
        return factorization_memory(
            case.update[:, piece], case.merge[:, piece], case.value[:, piece], indices, None, 4, state, True
        )

    first, state = part(slice(0, cut), case.initial)
    second, state = part(slice(cut, None), state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("top_k", [None, 2])
def test_steps_equal_the_whole(top_k: int | None) -> None:
    case = make(3, 20, 2, 5, 4, top_k=top_k)
    whole, final = factorization_memory(case.update, case.merge, case.value, case.indices, None, 5, case.initial, True)
    state = case.initial.clone()
    for t in range(20):
        indices = None if case.indices is None else case.indices[:, t]
        y, same = factorization_memory_step(case.update[:, t], case.merge[:, t], case.value[:, t], state, indices)
        assert same is state
        torch.testing.assert_close(y, whole[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_states_that_are_merged_alone(backend: str) -> None:
    """Selections of both sides are weights among all states, zero for the others."""
    case = make(2, 40, 2, 6, 3, top_k=2, merge_top_k=3)
    y, _ = factorization_memory(case.update, case.merge, case.value, case.indices, case.merge_indices, 6, backend=backend)
    wide = [
        torch.zeros(2, 40, 2, 6, dtype=torch.float64).scatter(-1, chosen, weights)
        for chosen, weights in ((case.indices, case.update), (case.merge_indices, case.merge))
    ]
    torch.testing.assert_close(y, factorization_memory(*wide, case.value, backend="reference")[0], rtol=1e-12, atol=1e-12)


def test_all_states_selected_equals_dense() -> None:
    """K = M is the dense form, in whatever order the states are named."""
    case = make(2, 90, 2, 6, 3)
    order = torch.rand(2, 90, 2, 6).argsort(-1)
    dense, _ = factorization_memory(case.update, case.merge, case.value)
    sparse, _ = factorization_memory(case.update.gather(-1, order), case.merge.gather(-1, order), case.value, order, None, 6)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)


def test_batch_equals_single() -> None:
    case = make(3, 90, 2, 4, 3)
    whole, _ = factorization_memory(case.update, case.merge, case.value)
    for b in range(3):
        one, _ = factorization_memory(case.update[b : b + 1], case.merge[b : b + 1], case.value[b : b + 1])
        torch.testing.assert_close(one[0], whole[b], rtol=1e-12, atol=1e-12)


def test_memory_grows_with_states_plus_width() -> None:
    """What is kept for backward is the inputs and little more, far from a state per token."""
    length, num_states, width = 4096, 64, 64
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    update = (torch.rand(1, length, 1, num_states) / num_states).requires_grad_()
    merge, value = torch.rand_like(update), torch.randn(1, length, 1, width)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        factorization_memory(update, merge, value, backend="chunked")
    assert sum(kept.values()) <= 1.5 * 4 * length * (2 * num_states + width)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_nothing_comes_through_from_another_sequence(backend: str) -> None:
    """Not even what is not finite."""
    case = make(1, 10, 1, 3, 2, borders=[0, 3, 10], with_initial=False)
    case.value[0, 0] = torch.inf
    y, _ = factorization_memory(case.update, case.merge, case.value, cu_seqlens=case.borders, backend=backend)
    assert torch.isfinite(y[:, 3:]).all()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_no_sequences_and_no_tokens(backend: str, batch: int, length: int) -> None:
    case = make(batch, length, 2, 3, 4)
    arguments = (case.update, case.merge, case.value)
    y, final = factorization_memory(*arguments, initial_state=case.initial, output_final_state=True, backend=backend)
    assert y.shape == case.value.shape
    assert torch.equal(final, case.initial)
    assert not final.numel() or final.data_ptr() != case.initial.data_ptr()


def test_many_short_sequences_waste_little() -> None:
    """Chunks fit the sequences, so that packing many short ones beside a long one stays near their sum."""
    plan = layout.Layout.plan([64, *[3] * 300], (301, 1, 4, 4), torch.float32)
    assert plan.num_chunks * plan.chunk <= 1.5 * (64 + 900)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_sequences_in_inference_mode_and_compiled(backend: str) -> None:
    case = make(1, 20, 1, 3, 4, borders=[0, 3, 20], with_initial=False)
    expected, _ = factorization_memory(case.update, case.merge, case.value, cu_seqlens=case.borders, backend=backend)
    with torch.inference_mode():
        borders = torch.tensor([0, 3, 20])
        y, _ = factorization_memory(case.update, case.merge, case.value, cu_seqlens=borders, backend=backend)
    torch.testing.assert_close(y, expected)
    torch._dynamo.reset()
    compiled = torch.compile(factorization_memory, backend="eager")
    y, _ = compiled(case.update, case.merge, case.value, cu_seqlens=case.borders, backend=backend)
    torch.testing.assert_close(y, expected)


def test_borders_may_change_between_calls() -> None:
    case = make(1, 20, 1, 3, 4, borders=[0, 3, 20])
    factorization_memory(case.update, case.merge, case.value, cu_seqlens=case.borders)
    case.borders[1] = 7
    changed, _ = factorization_memory(case.update, case.merge, case.value, cu_seqlens=case.borders)
    fresh, _ = factorization_memory(case.update, case.merge, case.value, cu_seqlens=torch.tensor([0, 7, 20]))
    assert torch.equal(changed, fresh)


def test_a_model_takes_every_backend() -> None:
    assert set(typing.get_args(Backend)) == set(BACKEND_NAMES)


def test_a_new_backend_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CONTRIBUTING.md has it."""
    reference = backends.BACKENDS[-1]
    calls = []

    def forward(*arguments: typing.Any) -> typing.Any:
        calls.append("forward")
        return reference.forward(*arguments)

    def why_unsupported(value: Tensor, *_: object) -> str | None:
        return "it is for one head" if value.shape[2] > 1 else None

    mine = MemoryBackend("mine", forward, why_unsupported=why_unsupported, step=reference.step, undo=reference.undo)
    monkeypatch.setattr(backends, "BACKENDS", (mine, *backends.BACKENDS))
    case = make(1, 5, 1, 3, 2)
    expected = factorization_memory(case.update, case.merge, case.value, backend="reference")[0]
    for name in ("mine", "auto"):
        assert torch.equal(factorization_memory(case.update, case.merge, case.value, backend=name)[0], expected)
    assert calls == ["forward"] * 2
    wide = make(1, 5, 2, 3, 2)
    factorization_memory(wide.update, wide.merge, wide.value)  # passed by
    assert calls == ["forward"] * 2
    with pytest.raises(ValueError, match=r"backend='mine': it is for one head; use 'auto', or 'chunked', which"):
        factorization_memory(wide.update, wide.merge, wide.value, backend="mine")
    for name in ("yours", ""):
        with pytest.raises(ValueError, match=rf"backend='{name}': use one of auto, reference, chunked, triton, .*, mine$"):
            factorization_memory(wide.update, wide.merge, wide.value, backend=name)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("batch", [0, 2])
def test_no_tokens_have_gradients(backend: str, batch: int) -> None:
    leaves = [torch.rand(batch, 0, 1, size, requires_grad=True) for size in (3, 3, 4)]
    y, _ = factorization_memory(*leaves, backend=backend)
    assert y.shape == (batch, 0, 1, 4)
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]
