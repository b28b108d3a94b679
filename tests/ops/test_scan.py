"""The compiled loops of the CPU (backend "numba") against the float64 reference: outputs, states, every gradient, steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factorization_memory.ops import factorization_memory, factorization_memory_step, runtime
from factorization_memory.ops.memory import backends
from factorization_memory.ops.memory.scan import layout
from recurrence import Case, assert_close, cases, make

pytest.importorskip("numba")

OPS = torch.ops.factorization_memory
INTERVAL = layout.interval(9)


@settings(max_examples=60, deadline=None)
@given(cases(sparse=True))
def test_equals_reference(case: Case) -> None:
    assert_close(case.run("numba"), case.run("reference"), 1e-10)


@pytest.mark.parametrize("length", [1, INTERVAL - 1, INTERVAL, INTERVAL + 1, 3 * INTERVAL + 5])
@pytest.mark.parametrize("kind", ["uniform", "adversarial"])
def test_odd_lengths(length: int, kind: str) -> None:
    case = make(2, length, 2, 9, 3, top_k=3, merge_top_k=4, kind=kind)
    assert_close(case.run("numba"), case.run("reference"), 1e-10)


@pytest.mark.parametrize("width", [1, layout.BLOCK_WIDTH, layout.BLOCK_WIDTH + 1])
def test_blocks_of_columns(width: int) -> None:
    case = make(1, 70, 1, 9, width, top_k=3, merge_top_k=2)
    assert_close(case.run("numba"), case.run("reference"), 1e-10)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_gates_at_their_ends_are_exact(level: float) -> None:
    """theta = 1 overwrites, theta = 0 keeps, and gradients stay finite and right."""
    case = make(1, 100, 1, 3, 4, top_k=3)
    case.update.fill_(level)
    y, final, *gradients = case.run("numba")
    expected = case.value[0, -1] if level == 1 else case.initial[0, 0]
    assert torch.equal(final[0, 0], expected.expand_as(final[0, 0]))
    assert_close([y, final, *gradients], case.run("reference"), 1e-10)


def test_float32_and_bfloat16() -> None:
    case = make(2, 300, 2, 8, 16, top_k=3, kind="adversarial")
    for name in ("update", "merge", "value", "d_output"):
        setattr(case, name, getattr(case, name).bfloat16().double())
    expected = case.run("reference")
    assert_close(case.run("numba", torch.float32), expected, 1e-5)
    assert_close(case.run("numba", torch.bfloat16), expected, 5e-3)


def test_gradcheck() -> None:
    case = make(1, 7, 1, 4, 2, top_k=2, merge_top_k=2)
    leaves = [x.clone().requires_grad_() for x in (case.update, case.merge, case.value, case.initial)]

    def call(*xs: Tensor) -> tuple[Tensor, ...]:
        return factorization_memory(*xs[:3], case.indices, case.merge_indices, 4, xs[3], True, backend="numba")

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("borders", [None, [0, 3, 3, 150, 151, 400]])
def test_the_number_of_threads_changes_nothing(borders: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MIN_SHARED_ELEMENTS", 0)
    case = make(1 if borders else 3, 400, 2, 9, 300, top_k=3, merge_top_k=2, borders=borders)
    alone = case.run("numba")
    torch.set_num_threads(3)
    try:
        shared = case.run("numba")
    finally:
        torch.set_num_threads(1)
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a, b)


def test_results_fill_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With uninitialised memory full of NaN; states that no token selects are neither read nor changed."""
    new_empty = Tensor.new_empty

    def poisoned(x: Tensor, *args: object, **options: object) -> Tensor:
        made = new_empty(x.detach(), *args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    case = make(2, 150, 2, 9, 5, top_k=3, merge_top_k=2)
    case.indices, case.merge_indices = case.indices.clamp(max=7), case.merge_indices.clamp(max=7)
    case.indices[..., :] = torch.rand(2, 150, 2, 8).topk(3).indices
    case.merge_indices[..., :] = torch.rand(2, 150, 2, 8).topk(2).indices
    expected = case.run("reference")
    case.initial = case.initial.detach().clone()
    case.initial[:, :, 8] = torch.nan
    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    y, final, *gradients = case.run("numba")
    assert final[:, :, 8].isnan().all()
    final[:, :, 8] = expected[1][:, :, 8]
    assert_close([y, final, *gradients], expected, 1e-10)


def test_nothing_comes_through_from_another_sequence() -> None:
    case = make(1, 10, 1, 3, 2, top_k=2, borders=[0, 3, 10], with_initial=False)
    case.value[0, 0] = torch.inf
    arguments = (case.update, case.merge, case.value, case.indices, None, 3)
    y, _ = factorization_memory(*arguments, cu_seqlens=case.borders, backend="numba")
    assert torch.isfinite(y[:, 3:]).all()


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_no_sequences_and_no_tokens(batch: int, length: int) -> None:
    case = make(batch, length, 2, 3, 4, top_k=2)
    y, final, *gradients = case.run("numba")
    assert y.shape == case.value.shape
    assert torch.equal(final, case.initial)
    assert [x.shape for x in gradients] == [x.shape for x in (case.update, case.merge, case.value, case.initial)]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 150), st.data())
def test_splitting_anywhere_changes_nothing(length: int, data: st.DataObject) -> None:
    case = make(2, length, 2, 9, 3, top_k=2, merge_top_k=2)
    cut = data.draw(st.integers(1, length - 1))

    def part(piece: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        sides = (x[:, piece] for x in (case.update, case.merge, case.value, case.indices, case.merge_indices))
        return factorization_memory(*sides, 9, state, True, backend="numba")

    whole, final = part(slice(0, length), case.initial)
    first, state = part(slice(0, cut), case.initial)
    second, state = part(slice(cut, None), state)
    assert torch.equal(torch.cat((first, second), 1), whole)
    assert torch.equal(state, final)


@pytest.mark.parametrize("places", [None, [3, -1, 0]])
def test_steps_equal_the_reference(places: list[int] | None) -> None:
    case = make(3, 20, 2, 9, 4, top_k=3, merge_top_k=2)
    pooled = torch.randn(3 if places is None else 5, 2, 9, 4, dtype=torch.float64)
    slots = None if places is None else torch.tensor(places)
    results = []
    for backend in ("numba", "reference"):
        state, ring = pooled.clone(), torch.zeros(3, 20, 2, 3, 4, dtype=torch.float64)
        arguments = (case.indices, case.merge_indices, slots, ring)
        y, same = factorization_memory_step(case.update, case.merge, case.value, state, *arguments, backend=backend)
        assert same is state
        there = ring if places is None else ring[[0, 2]]  # of a padding row nothing is kept
        results.append((y, state, there))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_indices_out_of_range_are_refused_below_the_public_door() -> None:
    """Where a compiler leaves the checks out."""
    case = make(1, 5, 1, 4, 2, top_k=2)
    case.indices[0, 2, 0, 1] = 4
    arguments = (case.update, case.merge, case.value, case.indices, case.indices)
    with pytest.raises(ValueError, match="indices: got 0 to 4, takes 0 to num_states - 1 = 3"):
        OPS.scan(*arguments, None, None, 4, False, False)
    with pytest.raises(ValueError, match="indices: got 0 to 4"):
        OPS.scan_step(*arguments, torch.zeros(1, 1, 4, 2, dtype=torch.float64), None, None, None)


@pytest.mark.parametrize("borders", [[0, 3, 2_000_000], [0, 4, 2, 5], [1, 5], [0, 4]])
def test_borders_are_checked_below_the_public_door(borders: list[int]) -> None:
    case = make(1, 5, 1, 4, 2, top_k=2)
    arguments = (case.update, case.merge, case.value, case.indices, case.indices, None)
    with pytest.raises(ValueError, match=r"cu_seqlens: got .*, takes a non-decreasing sequence from 0 to T = 5"):
        OPS.scan(*arguments, torch.tensor(borders), 4, False, False)


@pytest.mark.parametrize("places", [[7], [-2], None, [0, 1]])
def test_places_are_checked_below_the_public_door(places: list[int] | None) -> None:
    case = make(1, 1, 1, 4, 2, top_k=2)
    arguments = (case.update, case.merge, case.value, case.indices, case.indices, torch.zeros(3, 1, 4, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"places: got .*, takes 1 distinct numbers from 0 to 2, or -1"):
        OPS.scan_step(*arguments, None if places is None else torch.tensor(places), None, None)


def test_indices_are_checked_before_they_are_narrowed() -> None:
    case = make(1, 5, 1, 4, 2, top_k=2)
    case.indices[0, 0, 0, 0] = 2**32 + 1
    with pytest.raises(ValueError, match="indices: got 0 to 4294967297"):
        OPS.scan(case.update, case.merge, case.value, case.indices, case.indices, None, None, 4, False, False)


def test_a_step_is_seen_by_autograd() -> None:
    """A backward pass that needs the state as it was before the step is refused, as with PyTorch's own operations."""
    case = make(1, 1, 1, 4, 2, top_k=2, with_initial=False)
    state = torch.randn(1, 1, 4, 2, dtype=torch.float64)
    loss = (state * torch.ones_like(state, requires_grad=True)).sum()
    factorization_memory_step(case.update[:, 0], case.merge[:, 0], case.value[:, 0], state, case.indices[:, 0], backend="numba")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_short_sequences_keep_no_snapshots() -> None:
    """A sequence's first state is its initial one, which is kept anyway."""
    case = make(1, 160, 1, 9, 3, top_k=2, borders=[0, 16, 80, 160], with_initial=False)
    arguments = (case.update, case.merge, case.value, case.indices, case.indices, None, case.borders, 9, False, True)
    *_, snapshots = OPS.scan(*arguments)
    assert layout.interval(9) == 64
    assert len(snapshots) == 160 // 64
    assert layout.snapshots_needed(layout.sequences_of(case.value, case.borders, 9), 9) == 1


def test_one_graph_for_any_length() -> None:
    case = make(2, 90, 1, 9, 3, top_k=2, merge_top_k=2, with_initial=False)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def run(update: Tensor, merge: Tensor, value: Tensor, indices: Tensor, merge_indices: Tensor) -> Tensor:
        return factorization_memory(update, merge, value, indices, merge_indices, 9, backend="numba")[0]

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=count, dynamic=True, fullgraph=True)
    for length in (90, 71, 13):
        xs = [x[:, :length].clone() for x in (case.update, case.merge, case.value, case.indices, case.merge_indices)]
        torch.testing.assert_close(compiled(*xs), run(*xs))
    assert len(graphs) == 1


def test_auto_takes_it_for_few_of_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """As measured; never where Numba is missing, and then whoever asks for it by name is told."""
    value = torch.zeros(1, 4, 1, 8)

    def name(selected: int | None, num_states: int, backend: str = "auto") -> str:
        indices = None if selected is None else torch.zeros(1, 4, 1, selected, dtype=torch.int64)
        return backends.choose_backend(backend, value, indices, None, num_states, True, False).name

    assert [name(*sizes) for sizes in ((8, 256), (8, 16), (9, 16), (None, 16))] == ["numba", "numba", "chunked", "chunked"]
    with pytest.raises(
        ValueError, match=r"backend='numba': it computes selected states alone, and there are no indices .*; use 'auto'"
    ):
        name(None, 16, "numba")
    monkeypatch.setattr(runtime, "_numba_problem", lambda: "Numba is not installed (pip install numba)")
    assert name(8, 256) == "chunked"
    with pytest.raises(ValueError, match=r"backend='numba': Numba is not installed \(pip install numba\); use 'auto'"):
        name(8, 256, "numba")


def test_loops_compile_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba raises RuntimeError where it finds no folder to write to."""
    numba = pytest.importorskip("numba")
    from factorization_memory.ops.runtime import loops

    njit = numba.njit

    def nowhere(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", nowhere)
    assert loops.compiled(lambda x: x + 1)(2) == 3


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("raise ImportError('needs NumPy 2.0 or less')", "Numba cannot be imported (needs NumPy 2.0 or less)"),
        ("__version__ = '0.50.1'", "Numba is 0.50.1, the loops need 0.61 or newer"),
        (None, "Numba is not installed (pip install numba)"),
    ],
)
def test_a_numba_that_does_not_work_is_passed_by(
    package: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package is None:
        monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    else:
        (tmp_path / "numba.py").write_text(package)
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
            monkeypatch.delitem(sys.modules, name)
    runtime._numba_problem.cache_clear()
    try:
        assert runtime.why_no_numba(torch.zeros(1)) == reason
    finally:
        runtime._numba_problem.cache_clear()


def test_it_runs_while_the_interpreter_ends() -> None:
    """When no more threads are started."""
    script = """if True:
        import atexit, torch
        from factorization_memory.ops import factorization_memory
        from factorization_memory.ops.memory.scan import layout
        torch.set_num_threads(2)
        layout.MIN_SHARED_ELEMENTS = 0
        x, i = torch.rand(2, 8, 1, 2), torch.arange(2).expand(2, 8, 1, 2)
        def run():
            print(factorization_memory(x, x, x, i, None, 9, backend="numba")[0].shape)
        atexit.register(run)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "torch.Size([2, 8, 1, 2])\n", done.stderr
