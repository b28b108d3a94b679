"""The kernels of the sparse form: in the interpreter where there is no GPU, at small sizes; on a GPU at real ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factorization_memory.benchmarks.correctness import TOLERANCES, Problem, Shape
from factorization_memory.ops import factorization_memory
from factorization_memory.ops.memory.backends import choose_backend
from factorization_memory.ops.memory.kernels import sparse
from factorization_memory.ops.memory.kernels.sparse import lists

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def solve(problem: Problem, backend: str, keep_final: bool) -> dict[str, Tensor]:
    leaves = problem.leaves()
    results = problem.forward(backend, leaves, output_final_state=keep_final)
    gradients = torch.autograd.grad(results, leaves, (problem.d_output, problem.d_final)[: len(results)])
    names = ("output", "final_state")[: len(results)] + ("d_update", "d_merge", "d_value", "d_initial_state")[: len(leaves)]
    return dict(zip(names, (*results, *gradients), strict=True))


def right(problem: Problem, keep_final: bool = True, truth: str = "reference") -> None:
    got = solve(problem, "triton-sparse", keep_final)
    exact = problem.to(torch.float64)
    expected = solve(exact if truth == "chunked" else exact.to("cpu"), truth, keep_final)
    for name, x in got.items():
        assert torch.isfinite(x).all(), name
        x, y = x.cpu().double(), expected[name].cpu()
        error = float((x - y).detach().norm() / y.detach().norm().clamp(min=1e-300))
        assert error <= TOLERANCES[problem.value.dtype], f"{name}: {error:.1e}"
    strong = (problem.update >= 0.99).cpu()
    if strong.any():
        a, b = got["d_update"].cpu().double()[strong], expected["d_update"].cpu()[strong]
        assert (a - b).norm() <= 1e-2 * b.norm()


@pytest.fixture
def short_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slots, and groups of one, as at sizes that tests cannot afford."""
    monkeypatch.setattr(sparse, "LONGEST_ALONE", 64)
    monkeypatch.setattr(sparse, "LONGEST_PASSING", 32)
    monkeypatch.setattr(sparse, "GROUP_BYTES", 1)


@pytest.mark.parametrize(
    ("shape", "borders"),
    [
        (Shape(2, 11, 1, 5, 8, 3), None),
        (Shape(1, 66, 1, 2, 5, 2), None),  # K = M: lists of more than two blocks
        (Shape(1, 1, 1, 7, 3, 2), None),
        (Shape(1, 16, 2, 3, 4, 2), [0, 3, 3, 13, 16]),
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "states"), [("adversarial", True), ("plain", False)])
def test_shapes(shape: Shape, borders: list[int] | None, kind: str, states: bool) -> None:
    problem = Problem.random(shape, device=DEVICE, initial_state=states, borders=borders)
    right(problem.adversarial() if kind == "adversarial" else problem, keep_final=states)


@pytest.mark.usefixtures("short_slots")
@pytest.mark.parametrize(
    ("shape", "borders", "initial", "final"),
    [
        (Shape(2, 34, 1, 3, 4, 2), None, True, True),
        (Shape(2, 34, 1, 3, 4, 2), None, False, True),
        (Shape(1, 34, 1, 3, 4, 2), None, True, False),
        (Shape(1, 66, 1, 3, 4, 1), None, False, False),
        (Shape(1, 40, 1, 3, 4, 2), [0, 0, 34, 35, 40, 40], True, True),
        (Shape(1, 40, 1, 3, 4, 2), [0, 0, 34, 35, 40, 40], False, False),
    ],
    ids=str,
)
def test_states_pass_from_slot_to_slot(shape: Shape, borders: list[int] | None, initial: bool, final: bool) -> None:
    problem = Problem.random(shape, device=DEVICE, initial_state=initial, borders=borders)
    right(problem.adversarial(), keep_final=final)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    lengths[-1] = max(lengths[-1], 1)
    packed = draw(st.booleans())
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()] if packed else None
    states = draw(st.integers(1, 5))
    shape = Shape(
        1 if packed else draw(st.integers(1, 2)), sum(lengths), draw(st.integers(1, 2)), states, draw(st.integers(1, 8)),
        draw(st.integers(1, states)),
    )  # fmt: skip
    problem = Problem.random(shape, device=DEVICE, initial_state=draw(st.booleans()), borders=borders)
    return problem.adversarial() if draw(st.booleans()) else problem


@settings(max_examples=4, deadline=None)
@given(problems(), st.booleans())
def test_equals_reference(problem: Problem, keep_final: bool) -> None:
    right(problem, keep_final)


def test_parts_of_long_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with P by blocks of rows, as slots of 512 tokens and more take them."""
    monkeypatch.setattr(sparse, "CAUSAL_LEAST", 64)
    right(Problem.random(Shape(1, 100, 1, 9, 6, 1), device=DEVICE), keep_final=False)


def test_autocast_changes_nothing() -> None:
    problem = Problem.random(Shape(1, 12, 1, 6, 8, 2), device=DEVICE, initial_state=True)
    plain = solve(problem, "triton-sparse", True)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = solve(problem, "triton-sparse", True)
    for name, x in plain.items():
        assert torch.equal(x, cast[name]), name


def test_the_same_bits() -> None:
    problem = Problem.random(Shape(1, 12, 1, 6, 8, 2), device=DEVICE, initial_state=True)
    first, second = (solve(problem, "triton-sparse", True) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # where infinite numbers are meant to be
def test_nothing_comes_through_from_another_sequence() -> None:
    for poisoned in ("value", "d_output"):
        problem = Problem.random(Shape(1, 20, 1, 4, 4, 2), device=DEVICE, borders=[0, 8, 20])
        part, rest = (slice(0, 8), slice(8, 20)) if poisoned == "value" else (slice(8, 20), slice(0, 8))
        getattr(problem, poisoned)[:, part] = torch.inf
        got = solve(problem, "triton-sparse", keep_final=False)
        names = ("output",) if poisoned == "value" else ("d_update", "d_merge", "d_value")
        for name in names:
            assert torch.isfinite(got[name][:, rest]).all(), (poisoned, name)


def test_lists() -> None:
    """Every entry of every token stands in its state's list, in order of time."""
    batch, length, heads, states, chosen = 2, 70, 2, 9, 2
    indices = torch.rand(batch, length, heads, states, device=DEVICE).argsort(-1)[..., :chosen].contiguous()
    update, merge = (torch.rand(batch, length, heads, chosen, device=DEVICE) for _ in range(2))
    table = torch.tensor([[0, 64], [64, 6], [70, 64], [134, 6]], device=DEVICE)
    made = lists.lists_of(update, merge, indices, states, table, 64)
    rows, thetas, phis = (x.flatten(0, 1).tolist() for x in (indices, update, merge))
    for slot, (first, count) in enumerate(table.tolist()):
        for head in range(heads):
            for state in range(states):
                places = [(t, rows[first + t][head].index(state)) for t in range(count) if state in rows[first + t][head]]
                begin = int(made.begin[slot, head, state])
                run = slice(begin, begin + int(made.count[slot, head, state]))
                assert made.origin[slot, head, run].tolist() == [t * chosen + k for t, k in places]
                assert made.update[slot, head, run].tolist() == [thetas[first + t][head][k] for t, k in places]
                assert made.merge[slot, head, run].tolist() == [phis[first + t][head][k] for t, k in places]
                assert [int(made.place[slot, head, t, k]) for t, k in places] == list(range(run.start, run.stop))


@pytest.mark.parametrize("borders", [None, [0, 3, 9]])
def test_operators_keep_their_promises(borders: list[int] | None) -> None:
    problem = Problem.random(Shape(1, 9, 1, 4, 16, 2), device=DEVICE, initial_state=True, borders=borders)
    update, merge, value, initial = problem.leaves()
    inputs = (update, merge, value, problem.indices, initial, problem.cu_seqlens, 4)
    torch.library.opcheck(
        sparse.sparse,
        (*inputs, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )
    kept = [x.detach() for x in sparse.sparse(*inputs, True)[2:]]
    assert (kept[1].numel() > 0) == (borders is None)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    torch.library.opcheck(
        torch.ops.factorization_memory.sparse_backward.default,
        (problem.d_output, problem.d_final, *detached, False, *kept),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("alone", [True, False])
def test_compiles_as_one_graph(alone: bool) -> None:
    problem = Problem.random(Shape(1, 12, 1, 3, 16, 2), device=DEVICE, initial_state=not alone)
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = problem.leaves()
        outputs = wrap(lambda *x: problem.forward("triton-sparse", x, output_final_state=not alone))(*leaves)
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, (problem.d_output, problem.d_final)[: len(outputs)])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("sizes", "initial", "packed", "taken"),
    [
        ({}, False, False, True),
        ({"M": 1023}, False, False, False),
        ({"K": 32}, False, False, True),
        ({"K": 33}, False, False, False),
        ({"T": 33}, False, False, False),
        ({"H": 2}, False, False, False),
        ({"D": 7}, False, False, False),
        ({}, True, False, False),
        ({}, False, True, False),
    ],
    ids=str,
)
def test_chosen_where_it_was_measured_to_pay(
    sizes: dict[str, int], initial: bool, packed: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from factorization_memory.ops.memory import kernels

    monkeypatch.setattr(kernels, "SPARSE_LENGTH", 32)
    monkeypatch.setattr(kernels, "SPARSE_WIDTH", 8)
    T, H, M, K, D = ({"T": 32, "H": 1, "M": 1024, "K": 16, "D": 8} | sizes).values()  # noqa: N806
    value, indices = torch.rand(1, T, H, D, device=DEVICE), torch.arange(K, device=DEVICE).expand(1, T, H, K)
    chosen = choose_backend("triton", value, indices, None, M, alone=not initial, packed=packed)
    assert chosen.name == ("triton-sparse" if taken else "triton-dense")


@pytest.mark.parametrize(("chosen", "merged", "states"), [(2, 3, 9), (4, 4, 6), (1, 1, 5)])
@pytest.mark.parametrize("borders", [None, [0, 1, 9]])
def test_other_states_are_merged_than_updated(chosen: int, merged: int, states: int, borders: list[int] | None) -> None:
    def drawn(count: int) -> tuple[Tensor, Tensor]:
        return torch.rand(1, 9, 1, count), torch.rand(1, 9, 1, states).topk(count).indices

    (update, indices), (merge, merge_indices) = drawn(chosen), drawn(merged)
    value, d_output = torch.randn(2, 1, 9, 1, 4)
    results = []
    for backend, dtype, device in (("triton-sparse", torch.float32, DEVICE), ("reference", torch.float64, "cpu")):
        leaves = [x.to(device, dtype).requires_grad_() for x in (update, merge, value)]
        y, _ = factorization_memory(
            *leaves, indices.to(device), merge_indices.to(device), states,
            cu_seqlens=None if borders is None else torch.tensor(borders, device=device), backend=backend,
        )  # fmt: skip
        results.append([y, *torch.autograd.grad((y * d_output.to(y)).sum(), leaves)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x.cpu().double(), y, rtol=1e-4, atol=1e-5)


def test_needs_indices() -> None:
    problem = Problem.random(Shape(1, 10, 1, 8, 4, 2), device=DEVICE)
    with pytest.raises(ValueError, match=r"triton-sparse.*indices"):
        factorization_memory(problem.update, problem.merge, problem.value, backend="triton-sparse")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "adversarial"])
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize(
    ("shape", "borders"),
    [
        (Shape(2, 1031, 1, 256, 192, 16), None),
        (Shape(1, 3000, 2, 100, 64, 4), [0, 3, 3, 1300, 3000]),
        (Shape(1, 4999, 1, 64, 64, 64), None),
        (Shape(3, 17, 4, 1024, 64, 8), None),
    ],
    ids=str,
)
def test_real_sizes(shape: Shape, borders: list[int] | None, kind: str, states: bool, dtype: torch.dtype) -> None:
    problem = Problem.random(shape, dtype, "cuda", initial_state=states, borders=borders)
    right(problem.adversarial() if kind == "adversarial" else problem, keep_final=states, truth="chunked")
