"""The dense recurrence without states: in the interpreter where there is no GPU, at small sizes; on a GPU at real ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factorization_memory.benchmarks.correctness import TOLERANCES, Problem, Shape
from factorization_memory.ops import factorization_memory
from factorization_memory.ops.triton import quadratic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many levels, and one sequence at a time, as at sizes that tests cannot afford."""
    monkeypatch.setattr(quadratic, "longest_chunk", lambda *sizes, **more: 16)
    monkeypatch.setattr(quadratic, "GROUP_BYTES", 1)


def solve(problem: Problem, backend: str) -> dict[str, Tensor]:
    leaves = problem.leaves()
    (output,) = problem.forward(backend, leaves)
    gradients = torch.autograd.grad(output, leaves, problem.d_output)
    return dict(zip(("output", "d_update", "d_merge", "d_value"), (output.detach(), *gradients), strict=True))


def right(problem: Problem, truth: str = "reference") -> None:
    exact = problem.to(torch.float64)
    expected = solve(exact if truth == "chunked" else exact.to("cpu"), truth)
    got = solve(problem, "triton-quadratic")
    for name, x in got.items():
        assert torch.isfinite(x).all(), name
        x, y = x.cpu().double(), expected[name].cpu()
        error = float((x - y).norm() / y.norm().clamp(min=1e-300))
        assert error <= TOLERANCES[problem.value.dtype], f"{name}: {error:.1e}"
    strong = (problem.update >= 0.99).cpu()
    if strong.any():
        a, b = got["d_update"].cpu().double()[strong], expected["d_update"].cpu()[strong]
        assert (a - b).norm() <= 1e-2 * b.norm()


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    "shape", [Shape(1, 1, 1, 3, 4), Shape(2, 32, 2, 5, 4), Shape(1, 80, 1, 3, 4), Shape(1, 35, 1, 130, 3)], ids=str
)
@pytest.mark.parametrize("kind", ["plain", "adversarial"])
def test_shapes(shape: Shape, kind: str) -> None:
    problem = Problem.random(shape, device=DEVICE)
    right(problem.adversarial() if kind == "adversarial" else problem)


@settings(max_examples=2, deadline=None)
@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 2), st.integers(1, 9), st.integers(1, 6))
def test_equals_reference(batch: int, length: int, heads: int, states: int, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quadratic, "longest_chunk", lambda *sizes, **more: 16)
        right(Problem.random(Shape(batch, length, heads, states, width), device=DEVICE).adversarial())


@pytest.mark.usefixtures("short_chunks")
def test_parts_of_long_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorization_memory.ops.triton.sparse.CAUSAL_LEAST", 64)
    right(Problem.random(Shape(1, 100, 1, 4, 6), device=DEVICE))


@pytest.mark.usefixtures("short_chunks")
def test_a_sparse_memory_as_a_masked_dense_one() -> None:
    right(Problem.random(Shape(1, 40, 1, 6, 5, 2), device=DEVICE))


def test_the_same_bits() -> None:
    problem = Problem.random(Shape(1, 40, 1, 4, 8), device=DEVICE)
    first, second = (solve(problem, "triton-quadratic") for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_operators_keep_their_promises() -> None:
    problem = Problem.random(Shape(1, 20, 1, 4, 8), device=DEVICE)
    leaves = problem.leaves()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(quadratic.quadratic, leaves, test_utils=tests)
    detached = [x.detach() for x in leaves]
    kept = [x.detach() for x in quadratic.quadratic(*detached)[1:]]
    torch.library.opcheck(
        torch.ops.factorization_memory.quadratic_backward.default, (problem.d_output, *detached, *kept),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_compiles_as_one_graph() -> None:
    problem = Problem.random(Shape(1, 20, 1, 4, 8), device=DEVICE)
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = problem.leaves()
        (output,) = wrap(lambda *x: problem.forward("triton-quadratic", x))(*leaves)
        results.append((output, *torch.autograd.grad(output, leaves, problem.d_output)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_has_no_states() -> None:
    problem = Problem.random(Shape(1, 10, 1, 4, 4), device=DEVICE, initial_state=True)
    arguments = (problem.update, problem.merge, problem.value)
    with pytest.raises(ValueError, match=r"triton-quadratic.*initial_state, output_final_state is given; use 'triton'"):
        factorization_memory(
            *arguments, initial_state=problem.initial_state, output_final_state=True, backend="triton-quadratic"
        )
    empty = [x[:, :0] for x in arguments]
    assert factorization_memory(*empty, backend="triton-quadratic")[0].shape == (1, 0, 1, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "adversarial"])
@pytest.mark.parametrize(
    "shape",
    [Shape(2, 1031, 1, 1024, 192), Shape(1, 3000, 2, 100, 64), Shape(3, 257, 4, 300, 64), Shape(1, 4096, 1, 64, 64)],
    ids=str,
)
def test_real_sizes(shape: Shape, kind: str, dtype: torch.dtype) -> None:
    problem = Problem.random(shape, dtype, "cuda")
    right(problem.adversarial() if kind == "adversarial" else problem, truth="chunked")
