"""The Triton backend: in the interpreter where there is no GPU, at small sizes; on a GPU at real ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from factorization_memory.benchmarks.correctness import TOLERANCES, Problem, Shape
from factorization_memory.layers import FactorizationMemory
from factorization_memory.ops import factorization_memory
from factorization_memory.ops.memory.kernels import dense, plan, tuning
from factorization_memory.ops.memory.kernels.layout import chunk_table, packed_chunks

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def right(problem: Problem) -> None:
    """Output, final state and gradients within the tolerances of the values' dtype; strong writes on their own."""
    got = {name: x.cpu().double() for name, x in problem.solve("triton").items()}
    expected = problem.to("cpu").to(torch.float64).solve("reference")
    close(got, expected, TOLERANCES[problem.value.dtype], problem.update)


def close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, update: Tensor) -> None:
    for name, x in got.items():
        assert torch.isfinite(x).all(), name
        error = float((x - expected[name]).norm() / expected[name].norm().clamp(min=1e-300))
        assert error <= tolerance, f"{name}: {error:.1e}"
    strong = (update >= 0.99).to(got["d_update"].device)
    if strong.any() and update.shape == got["d_update"].shape:
        a, b = got["d_update"][strong], expected["d_update"][strong]
        assert (a - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize(
    ("shape", "borders"),
    [
        (Shape(1, 70, 1, 5, 9), None),
        (Shape(2, 37, 1, 20, 40), None),
        (Shape(3, 1, 1, 16, 16), None),
        (Shape(1, 17, 1, 130, 33), None),
        (Shape(1, 40, 2, 5, 9), [0, 3, 3, 20, 40]),
        (Shape(1, 20, 1, 130, 16), [0, 0, 17, 20]),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "adversarial"])
def test_shapes(shape: Shape, borders: list[int] | None, kind: str) -> None:
    problem = Problem.random(shape, device=DEVICE, initial_state=kind == "plain", borders=borders)
    right(problem.adversarial() if kind == "adversarial" else problem)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=3))
    lengths[-1] = max(lengths[-1], 1)
    packed = draw(st.booleans())
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()] if packed else None
    shape = Shape(
        1 if packed else draw(st.integers(1, 2)), sum(lengths), draw(st.integers(1, 2)), draw(st.integers(1, 20)),
        draw(st.integers(1, 20)),
    )  # fmt: skip
    problem = Problem.random(shape, device=DEVICE, initial_state=draw(st.booleans()), borders=borders)
    return problem.adversarial() if draw(st.booleans()) else problem


@settings(max_examples=6, deadline=None)
@given(problems())
def test_equals_reference(problem: Problem) -> None:
    right(problem)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many segments and slices, as at sizes that tests cannot afford."""
    monkeypatch.setattr(plan, "SEGMENT_STATES", 0)
    monkeypatch.setattr(plan, "SEGMENT_LEAST", 128)
    monkeypatch.setattr(plan, "PROGRAMS", 1000)
    monkeypatch.setattr(plan, "WORKSPACE_SHARE", 0)
    monkeypatch.setattr(plan, "WORKSPACE_LEAST", 1)
    plan._plan.cache_clear()
    yield
    plan._plan.cache_clear()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("borders", [None, [0, 3, 3, 150, 260]])
@pytest.mark.parametrize("resident", [True, False])
def test_segments_and_slices(borders: list[int] | None, resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not resident:
        monkeypatch.setattr(plan.Plan, "resident", False)
    shape = Shape(1, 260, 1, 5, 16)
    problem = Problem.random(shape, device=DEVICE, initial_state=True, borders=borders).adversarial()
    made = plan.plan(problem.update, problem.value, problem.cu_seqlens, backward=False)
    assert made.layout.segments > 1
    right(problem)


@pytest.fixture(params=[False, True], ids=["long forward", "long backward"])
def chunks_of_128(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """As bfloat16 takes them on a GPU; forward and backward may differ."""
    monkeypatch.setattr(plan, "longest_chunk", lambda padded, dtype, backward: 128 if backward == request.param else 64)
    plan._plan.cache_clear()
    yield
    plan._plan.cache_clear()


@pytest.mark.usefixtures("chunks_of_128")
def test_chunks_of_128() -> None:
    right(Problem.random(Shape(1, 140, 1, 5, 9), device=DEVICE, initial_state=True).adversarial())


@pytest.mark.usefixtures("small_pieces", "chunks_of_128")
def test_segments_of_different_chunks() -> None:
    right(Problem.random(Shape(1, 260, 1, 5, 9), device=DEVICE, initial_state=True).adversarial())


SIZES = [
    (16, 2048, 1, 64, 2048), (16, 2048, 1, 1024, 4096), (1, 131072, 1, 64, 2048), (1, 131072, 1, 1024, 4096),
    (1, 131072, 1, 1024, 8192), (1, 2**20, 1, 1024, 8192), (1, 2**20, 16, 1024, 512), (4, 131072, 1, 1024, 2048),
    (1, 2048, 1, 256, 2048), (2, 8192, 1, 100, 300),
]  # fmt: skip


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("packed", [False, True])
def test_plans(shape: tuple[int, int, int, int, int], packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward begin segments at the same tokens, whatever tiles were chosen, and a slice of states stays small."""
    batch, length, heads, states, width = shape
    if packed:
        batch = 1
    update = torch.empty(batch, length, heads, states, device="meta")
    value = torch.empty(batch, length, heads, width, dtype=torch.bfloat16, device="meta")
    borders = torch.empty(8, dtype=torch.int32) if packed else None
    monkeypatch.setattr(plan, "operands", lambda dtype, exact: (torch.bfloat16, "tf32"))  # also in the interpreter
    plan._plan.cache_clear()
    monkeypatch.setitem(tuning.CHOSEN, ("walk", 64, 64, torch.bfloat16), tuning.Tile(64, 128, 4, 3))
    forward, backward = (plan.plan(update, value, borders, which) for which in (False, True))
    plan._plan.cache_clear()
    if not packed:
        assert forward.layout.segments == backward.layout.segments
        if forward.carried:
            tokens = {made.layout.segment_chunks * made.layout.chunk for made in (forward, backward)}
            assert len(tokens) == 1
            assert tokens.pop() >= plan.SEGMENT_STATES * forward.padded
    segment = backward.layout.segment_chunks * backward.layout.chunk
    if segment > 2 * max(plan.SEGMENT_LEAST, plan.SEGMENT_STATES * backward.padded):
        assert 2 * backward.state_bytes(segment) <= 1.1 * backward.workspace_room


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_values(dtype: torch.dtype) -> None:
    right(Problem.random(Shape(1, 70, 1, 5, 9), dtype, DEVICE, initial_state=True))


def test_strided_arguments() -> None:
    problem = Problem.random(Shape(2, 20, 2, 5, 8), device=DEVICE)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.update, problem.merge, problem.value)]
    assert not any(x.is_contiguous() for x in strided)
    right(replace(problem, update=strided[0], merge=strided[1], value=strided[2]))


def test_low_precision_weights() -> None:
    """bfloat16 weights mean what they say; their gradients come back in bfloat16."""
    problem = Problem.random(Shape(1, 40, 1, 5, 8), device=DEVICE)
    leaves = [x.detach().bfloat16().requires_grad_() for x in (problem.update, problem.merge)]
    y, _ = factorization_memory(*leaves, problem.value, backend="triton")
    wide = [x.detach().double().cpu().requires_grad_() for x in leaves]
    expected, _ = factorization_memory(*wide, problem.value.double().cpu(), backend="reference")
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(y, leaves, problem.d_output)
    assert all(x.dtype == torch.bfloat16 for x in got)
    for a, b in zip(got, torch.autograd.grad(expected, wide, problem.d_output.double().cpu()), strict=True):
        assert (a.cpu().double() - b).norm() <= 5e-3 * b.norm()


def test_same_bits() -> None:
    problem = Problem.random(Shape(2, 70, 1, 20, 24), device=DEVICE, initial_state=True).adversarial()
    first, second = problem.solve("triton"), problem.solve("triton")
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_batch_equals_single() -> None:
    problem = Problem.random(Shape(3, 30, 1, 5, 8), device=DEVICE)
    arguments = (problem.update, problem.merge, problem.value)
    whole, _ = factorization_memory(*arguments, backend="triton")
    for b in range(3):
        one, _ = factorization_memory(*(x[b : b + 1] for x in arguments), backend="triton")
        torch.testing.assert_close(one[0], whole[b])


def test_prefixes_and_rest() -> None:
    """The state after a prefix, and the rest from it, are the whole."""
    problem = Problem.random(Shape(1, 90, 1, 5, 8), device=DEVICE)
    arguments = (problem.update, problem.merge, problem.value)
    whole, final = factorization_memory(*arguments, output_final_state=True, backend="triton")
    for cut in (1, 64):
        y, state = factorization_memory(*(x[:, :cut] for x in arguments), output_final_state=True, backend="triton")
        z, state = factorization_memory(
            *(x[:, cut:] for x in arguments), initial_state=state, output_final_state=True, backend="triton"
        )
        torch.testing.assert_close(torch.cat((y, z), 1), whole)
        torch.testing.assert_close(state, final)


def test_sparse_equals_masked_dense() -> None:
    right(Problem.random(Shape(1, 40, 1, 8, 8, top_k=3), device=DEVICE, initial_state=True))


def test_no_width() -> None:
    problem = Problem.random(Shape(1, 5, 1, 3, 1), device=DEVICE)
    leaves = [x.detach().requires_grad_() for x in (problem.update, problem.merge, problem.value[..., :0])]
    y, _ = factorization_memory(*leaves, backend="triton")
    assert all(not gradient.any() for gradient in torch.autograd.grad(y.sum(), leaves))


def test_gradients_of_gradients_are_refused() -> None:
    problem = Problem.random(Shape(1, 5, 1, 3, 4), device=DEVICE)
    leaves = problem.leaves()
    (y,) = problem.forward("triton", leaves)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_no_sequences_and_no_tokens(batch: int, length: int) -> None:
    problem = Problem.random(Shape(batch, length, 2, 3, 4), device=DEVICE, initial_state=True)
    leaves = problem.leaves()
    y, final = problem.forward("triton", leaves, output_final_state=True)
    assert y.shape == problem.value.shape
    assert torch.equal(final, problem.initial_state)
    gradients = torch.autograd.grad((y, final), leaves, (problem.d_output, problem.d_final))
    assert torch.equal(gradients[3], problem.d_final)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # where infinite numbers are meant to be
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("border", [3, 200])
def test_nothing_comes_through_from_another_sequence(border: int) -> None:
    """Not even what is not finite, neither forward nor backward, nor over the borders of segments."""
    problem = Problem.random(Shape(1, 400, 1, 3, 4), device=DEVICE, borders=[0, border, 400])
    problem.value[0, :border] = torch.inf
    y, final = problem.forward("triton", problem.leaves(), output_final_state=True)
    assert torch.isfinite(y[:, border:]).all()
    assert torch.isfinite(final[1]).all()
    problem = Problem.random(Shape(1, 400, 1, 3, 4), device=DEVICE, borders=[0, border, 400])
    problem.d_output[0, border:] = torch.inf
    for name, gradient in problem.solve("triton").items():
        if name in ("d_update", "d_merge", "d_value"):
            assert torch.isfinite(gradient[:, :border]).all(), name


def test_table_of_chunks() -> None:
    """Every token is in one chunk, in order, and sequences begin and end where they should."""
    borders = [0, 0, 5, 37, 37, 53, 53]
    table = chunk_table(torch.tensor(borders, dtype=torch.int32), 53, 16)
    assert len(table) == packed_chunks(53, 6, 16)
    there = [row for row in table.tolist() if row[1]]
    assert [token for first, count, *_ in there for token in range(first, first + count)] == list(range(53))
    lengths = [b - a for a, b in pairwise(borders)]
    assert [row[2] for row in there if row[2] >= 0] == [n for n, length in enumerate(lengths) if length]
    assert [row[3] for row in there if row[3] >= 0] == [n for n, length in enumerate(lengths) if length]
    assert [row[0] for row in there if row[2] >= 0] == [0, 5, 37]


@pytest.mark.parametrize("borders", [None, [0, 3, 20]])
def test_operators_keep_their_promises(borders: list[int] | None) -> None:
    """Schema, fake kernels, autograd registration, and tracing."""
    problem = Problem.random(Shape(1, 20, 1, 4, 8), device=DEVICE, initial_state=True, borders=borders)
    update, merge, value, initial = problem.leaves()
    torch.library.opcheck(
        dense.dense,
        (update, merge, value, initial, problem.cu_seqlens, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )
    nothing = [value.new_empty(0)] * 4
    torch.library.opcheck(
        torch.ops.factorization_memory.dense_backward.default,
        (
            problem.d_output,
            problem.d_final,
            *(x.detach() for x in (update, merge, value, initial)),
            problem.cu_seqlens,
            *nothing,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("keep_final", [True, False])
def test_compiles_as_one_graph(keep_final: bool) -> None:
    problem = Problem.random(Shape(1, 20, 1, 4, 8), device=DEVICE, initial_state=True)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return problem.forward("triton", leaves, output_final_state=keep_final)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    for function in (call, compiled):
        leaves = problem.leaves()
        results = function(*leaves)
        gradients = torch.autograd.grad(results, leaves, (problem.d_output, problem.d_final)[: len(results)])
        if function is call:
            expected = (*results, *gradients)
        else:
            for a, b in zip((*results, *gradients), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_layer_compiles_and_checkpoints() -> None:
    torch.manual_seed(0)
    layer = FactorizationMemory(16, num_states=4, backend="triton").to(DEVICE)
    x = torch.randn(1, 20, 16, device=DEVICE)
    plain = layer(x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0]
    torch.testing.assert_close(compiled, plain)
    recomputed = torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    wanted, got = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (plain, recomputed))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    u, v = torch.rand(1, 3, 1, 4), torch.randn(1, 3, 1, 2)
    with pytest.raises(ValueError, match=r"backend='triton': value has dtype torch.float64, the kernels take"):
        factorization_memory(u.double(), u.double(), v.double(), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton': value is on the CPU, the kernels need a GPU.*use 'auto'"):
        factorization_memory(u, u, v, backend="triton")
    y, _ = factorization_memory(u, u, v)
    assert y.shape == v.shape


REAL = [
    (Shape(2, 2048, 1, 64, 2048), None),
    (Shape(1, 1021, 3, 48, 200), None),
    (Shape(1, 1500, 1, 256, 1024), None),
    (Shape(1, 777, 1, 1024, 136), None),
    (Shape(1, 3000, 1, 100, 64), [0, 3, 3, 1300, 3000]),
    (Shape(1, 20011, 1, 16, 64), None),
    (Shape(1, 9001, 1, 300, 64), [0, 5000, 9001]),
    (Shape(3, 17, 16, 16, 64), None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "adversarial"])
@pytest.mark.parametrize(("shape", "borders"), REAL, ids=str)
def test_real_sizes(shape: Shape, borders: list[int] | None, kind: str, dtype: torch.dtype) -> None:
    """Against the chunked backend in float64, which equals the reference to 1e-10 and can afford these sizes."""
    problem = Problem.random(shape, dtype, "cuda", initial_state=True, borders=borders)
    if kind == "adversarial":
        problem = problem.adversarial()
    expected = problem.to(torch.float64).solve("chunked")
    got = {name: x.double() for name, x in problem.solve("triton").items()}
    close(got, expected, TOLERANCES[dtype], problem.update)


@pytest.mark.gpu
def test_auto_takes_the_kernels() -> None:
    problem = Problem.random(Shape(2, 100, 1, 16, 64), torch.bfloat16, "cuda")
    arguments = (problem.update, problem.merge, problem.value)
    assert torch.equal(factorization_memory(*arguments)[0], factorization_memory(*arguments, backend="triton")[0])


@pytest.mark.skipif(CUDA, reason="what is compiled for a GPU is tested by the models")
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_at_other_lengths(packed: bool) -> None:
    """And of other numbers of packed sequences: one graph from the second on, both ways."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(update: Tensor, merge: Tensor, value: Tensor, borders: Tensor | None) -> Tensor:
        return factorization_memory(update, merge, value, cu_seqlens=borders, backend="triton-dense")[0]

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length, inner in ((9, [4]), (13, [2, 2, 7]), (34, [])):
        problem = Problem.random(Shape(1, length, 1, 3, 16), device=DEVICE)
        borders = torch.tensor([0, *inner, length], dtype=torch.int32) if packed else None
        found = []
        for function in (compiled, call):
            leaves = [x.detach().requires_grad_() for x in (problem.update, problem.merge, problem.value)]
            y = function(*leaves, borders)
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        torch.testing.assert_close(*found)
    assert counter.frame_count <= 3
    torch._dynamo.reset()
