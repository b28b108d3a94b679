"""One step, or a few, in place: PyTorch's form and the kernel, and undoing to the bit."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factorization_memory.ops import (
    factorization_memory,
    factorization_memory_step,
    factorization_memory_undo,
    recurrence_step,
    recurrence_undo,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", *(["triton"] if find_spec("triton") else [])]


def tokens_of(
    batch: int, length: int, heads: int, states: int, width: int, chosen: int | None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Update and merge weights, some 0 or 1, values, and indices."""
    update, merge = (torch.rand(batch, length, heads, chosen or states, device=DEVICE) for _ in range(2))
    which = torch.randint(0, 6, update.shape, device=DEVICE)
    update = update.masked_fill(which == 0, 0.0).masked_fill(which == 1, 1.0)
    indices = torch.rand(batch, length, heads, states, device=DEVICE).argsort(-1)[..., :chosen].contiguous() if chosen else None
    return update, merge, torch.randn(batch, length, heads, width, device=DEVICE).to(dtype), indices


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chosen", [None, 3])
@pytest.mark.parametrize(("heads", "width"), [(1, 40), (3, 7)])
@pytest.mark.parametrize("piece", [1, 3])
def test_steps_equal_the_whole(backend: str, chosen: int | None, heads: int, width: int, piece: int) -> None:
    update, merge, value, indices = tokens_of(2, 6, heads, 5, width, chosen)
    initial = torch.randn(2, heads, 5, width, device=DEVICE)
    wide = (x.double() for x in (update, merge, value))
    whole, final = factorization_memory(*wide, indices, None, 5, initial.double(), True, backend="reference")
    state = initial.clone()
    for start in range(0, 6, piece):
        part = slice(start, start + piece) if piece > 1 else start
        chosen_states = None if indices is None else indices[:, part]
        y, same = factorization_memory_step(
            update[:, part], merge[:, part], value[:, part], state, chosen_states, backend=backend
        )
        assert same is state
        torch.testing.assert_close(y.double(), whole[:, part], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.double(), final, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("chosen", "merged"), [(3, 2), (2, 5), (7, 3), (1, 7)])
@pytest.mark.parametrize("piece", [1, 4])
def test_other_states_are_merged_than_updated(
    backend: str, chosen: int, merged: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read as the update leaves them, and not changed; a step is undone from the updated ones alone."""
    if backend == "triton":
        from factorization_memory.ops.memory.kernels import step

        monkeypatch.setattr(step, "_tiles", lambda *sizes: (16, 2, 3))
    update, _, value, indices = tokens_of(2, 4, 2, 7, 20, chosen)
    _, merge, _, merge_indices = tokens_of(2, 4, 2, 7, 20, merged)
    initial = torch.randn(2, 2, 7, 20, device=DEVICE)
    wide = (x.double() for x in (update, merge, value))
    whole, final = factorization_memory(*wide, indices, merge_indices, 7, initial.double(), True, backend="reference")
    state, undone = initial.clone(), []
    for start in range(0, 4, piece):
        part = slice(start, start + piece) if piece > 1 else start
        undo = torch.empty(*update[:, part].shape, 20, device=DEVICE)
        y, _ = factorization_memory_step(
            update[:, part], merge[:, part], value[:, part], state, indices[:, part], merge_indices[:, part], undo=undo,
            backend=backend,
        )  # fmt: skip
        undone.append((undo, indices[:, part]))
        torch.testing.assert_close(y.double(), whole[:, part], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.double(), final, rtol=1e-5, atol=1e-6)
    for undo, rows in reversed(undone):
        factorization_memory_undo(state, undo, rows, backend=backend)
    assert torch.equal(state, initial)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_states_than_a_program_takes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in blocks, columns in tiles, and rows split over programs whose sums are added up."""
    if backend == "triton":
        from factorization_memory.ops.memory.kernels import step

        monkeypatch.setattr(step, "_tiles", lambda *sizes: (16, 4, 3))
    update, merge, value, _ = tokens_of(1, 1, 1, 37, 50, None)
    state = torch.randn(1, 1, 37, 50, device=DEVICE)
    whole, final = factorization_memory(
        *(x.double() for x in (update, merge, value)),
        initial_state=state.double(),
        output_final_state=True,
        backend="reference",
    )
    y, _ = factorization_memory_step(update[:, 0], merge[:, 0], value[:, 0], state, backend=backend)
    torch.testing.assert_close(y.double(), whole[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.double(), final, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_at_another_place_among_the_next_tokens(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are split over programs by their place among the selected, which changes from token to token."""
    if backend == "triton":
        from factorization_memory.ops.memory.kernels import step

        monkeypatch.setattr(step, "_tiles", lambda *sizes: (16, 2, 3))
    update, merge, value, indices = tokens_of(1, 4, 1, 7, 20, 6)
    state = torch.randn(1, 1, 7, 20, device=DEVICE)
    wide = (x.double() for x in (update, merge, value))
    whole, final = factorization_memory(*wide, indices, None, 7, state.double(), True, backend="reference")
    before, undo = state.clone(), torch.empty(*update.shape, 20, device=DEVICE)
    y, _ = factorization_memory_step(update, merge, value, state, indices, undo=undo, backend=backend)
    torch.testing.assert_close(y.double(), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.double(), final, rtol=1e-5, atol=1e-6)
    factorization_memory_undo(state, undo, indices, backend=backend)
    assert torch.equal(state, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chosen", [None, 2])
def test_places(backend: str, chosen: int | None) -> None:
    """Sequences anywhere in a larger state; nothing else is touched; one that is not there gives 0."""
    update, merge, value, indices = tokens_of(4, 2, 2, 5, 6, chosen)
    state = torch.randn(7, 2, 5, 6, device=DEVICE)
    before = state.clone()
    places = torch.tensor([5, -1, 0, 3], device=DEVICE)
    value[1] = torch.nan
    there = [0, 2, 3]
    y, _ = factorization_memory_step(update, merge, value, state, indices, places=places, backend=backend)
    own = before[places[there]]
    rows = None if indices is None else indices[there]
    expected, own = factorization_memory_step(update[there], merge[there], value[there], own, rows, backend=backend)
    assert torch.equal(y[there], expected)
    assert torch.equal(state[places[there]], own)
    assert not y[1].any()
    rest = [1, 2, 4, 6]
    assert torch.equal(state[rest], before[rest])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chosen", [None, 2])
@pytest.mark.parametrize("placed", [False, True])
def test_undo_of_several_tokens(backend: str, chosen: int | None, placed: bool) -> None:
    update, merge, value, indices = tokens_of(2, 3, 2, 5, 6, chosen)
    state = torch.randn(4 if placed else 2, 2, 5, 6, device=DEVICE)
    places = torch.tensor([3, 1], device=DEVICE) if placed else None
    before, undo = state.clone(), torch.empty(*update.shape, 6, device=DEVICE)
    plain, _ = factorization_memory_step(update, merge, value, state.clone(), indices, places=places, backend=backend)
    y, _ = factorization_memory_step(update, merge, value, state, indices, places=places, undo=undo, backend=backend)
    assert torch.equal(y, plain)
    assert not torch.equal(state, before)
    assert factorization_memory_undo(state, undo, indices, places, backend) is state
    assert torch.equal(state, before)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from(BACKENDS), st.sampled_from([None, 2]))
def test_undo_is_exact_in_any_order_of_steps(data: st.DataObject, backend: str, chosen: int | None) -> None:
    """Whatever steps and rollbacks there were, the state is that of the steps that stand."""
    depth, width, states = 3, 5, 4
    state = torch.randn(2, 1, states, width, device=DEVICE)
    aside = torch.empty(depth, 2, 1, 1, chosen or states, width, device=DEVICE)
    rows = torch.zeros(depth, 2, 1, 1, chosen, dtype=torch.int64, device=DEVICE) if chosen else None
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    history = [state.clone()]
    known = 0
    for _ in range(data.draw(st.integers(1, 8))):
        back = data.draw(st.integers(0, known))
        if back:
            recurrence_undo(state, aside, rows, None, position, back, backend)
            position.sub_(back).remainder_(depth)
            del history[-back:]
            known -= back
            assert torch.equal(state, history[-1])
        update, merge, value, indices = tokens_of(2, 1, 1, states, width, chosen)
        if rows is not None and indices is not None:
            rows.index_copy_(0, position, indices[None])
        recurrence_step(update, merge, value, state, indices, None, None, aside, position, backend=backend)
        position.add_(1).remainder_(depth)
        history.append(state.clone())
        known = min(depth, known + 1)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_rounding_at_random_is_right_on_average() -> None:
    update, merge, value, _ = tokens_of(1, 1, 1, 2, 16, None)
    update = torch.full_like(update, 0.3)
    initial = torch.randn(1, 1, 2, 16, device=DEVICE).to(torch.bfloat16)
    exact = initial.float() * 0.7 + 0.3 * value[:, 0, :, None]
    results = []
    for seed in range(300 if DEVICE == "cuda" else 60):
        state = initial.clone()
        number = torch.tensor([seed], device=DEVICE)
        factorization_memory_step(update[:, 0], merge[:, 0], value[:, 0], state, seed=number, backend="triton")
        results.append(state.float())
    drawn = torch.stack(results)
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
    assert ((drawn - exact).abs() < ulp * 1.001).all()
    assert ((drawn.mean(0) - exact).abs() < 5 * 0.5 * ulp / len(results) ** 0.5).all()
    again = initial.clone()
    number = torch.tensor([0], device=DEVICE)
    factorization_memory_step(update[:, 0], merge[:, 0], value[:, 0], again, seed=number, backend="triton")
    assert torch.equal(again.float(), results[0])


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_operators_keep_their_promises() -> None:
    from factorization_memory.ops.memory.kernels import step

    update, merge, value, indices = tokens_of(2, 1, 1, 4, 8, 2)
    state, undo = torch.randn(2, 1, 4, 8, device=DEVICE), torch.zeros(1, 2, 1, 1, 2, 8, device=DEVICE)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(step.step, (update, merge, value, state, indices, None, None, undo, position, None), test_utils=tests)
    torch.library.opcheck(step.undo, (state, undo, indices[None], None, position, 1), test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": torch.tensor([0.0])}, r"places: got torch.float32 \(1,\)"),
        ({"places": torch.tensor([3])}, r"places: got \[3\], takes distinct numbers from 0 to 1"),
        ({"undo": torch.zeros(1, 1, 2, 3)}, r"undo: got torch.float32 \(1, 1, 2, 3\)"),
        ({"seed": torch.tensor([1])}, r"state: got dtype torch.float32, takes torch.bfloat16"),
        ({"state": torch.zeros(2, 1, 4, 2).bfloat16()}, r"takes torch.float32, or a bfloat16 one together with seed"),
        ({"backend": "fast"}, r"backend='fast': use one of auto, reference, chunked, triton"),
        ({"state": torch.zeros(2, 1, 2, 4).transpose(2, 3)}, r"state: got strides .* takes a contiguous tensor"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    weights, value = torch.rand(1, 1, 4), torch.rand(1, 1, 2)
    arguments: dict[str, object] = {"update": weights, "merge": weights, "value": value}
    arguments |= {"state": torch.zeros(2, 1, 4, 2), "places": torch.tensor([1])}
    with pytest.raises(ValueError, match=message):
        factorization_memory_step(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": None}, r"undo: got torch.float32 \(2, 1, 3, 4\).* with H, K, D = \(1, 5, 4\) \(K = M without indices\)"),
        ({"indices": torch.zeros(2, 1, 3)}, r"indices: got torch.float32 \(2, 1, 3\)"),
        ({"undo": torch.zeros(2, 1, 3, 4).double()}, r"undo: got torch.float64"),
        (
            {"undo": torch.zeros(1, 1, 3, 4), "indices": torch.zeros(1, 1, 3).long()},
            r"undo: got 1 sequences, takes those of state, 2",
        ),
        ({"places": torch.tensor([1, 2])}, r"places: got \[1, 2\], takes distinct numbers from 0 to 1"),
        ({"state": torch.zeros(2, 1, 4, 5).transpose(2, 3)}, r"state: got .* takes a contiguous"),
    ],
    ids=str,
)
def test_wrong_arguments_of_undo(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"state": torch.zeros(2, 1, 5, 4), "undo": torch.zeros(2, 1, 3, 4)}
    arguments |= {"indices": torch.arange(3).expand(2, 1, 3)}
    with pytest.raises(ValueError, match=message):
        factorization_memory_undo(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "heads", "states", "width", "chosen"), [
    (64, 1, 256, 2048, None), (64, 1, 1024, 2048, 16), (1, 1, 1024, 2048, None), (3, 4, 100, 193, 7), (1, 16, 64, 64, None),
])  # fmt: skip
def test_real_sizes_and_graphs(batch: int, heads: int, states: int, width: int, chosen: int | None, dtype: torch.dtype) -> None:
    update, merge, value, indices = (
        None if x is None else x[:, 0] for x in tokens_of(batch, 1, heads, states, width, chosen, dtype)
    )
    initial = torch.randn(batch, heads, states, width, device="cuda")
    plain, state = initial.clone(), initial.clone()
    expected, _ = factorization_memory_step(update, merge, value, plain, indices, backend="reference")
    call = lambda: factorization_memory_step(update, merge, value, state, indices)[0]  # noqa: E731
    y = call()
    torch.testing.assert_close(
        y, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2 if dtype == torch.bfloat16 else 1e-4
    )
    torch.testing.assert_close(state, plain, rtol=1e-5, atol=1e-5)
    after = state.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        state.copy_(initial)
        graph.replay()
        assert torch.equal(captured, y)
        assert torch.equal(state, after)
