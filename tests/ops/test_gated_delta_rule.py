"""The gated delta rule: every form against the float64 loop, outputs, final states and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from factorization_memory.ops import gated_delta_rule as module
from factorization_memory.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step

NAMES = ("output", "final state", "d_q", "d_k", "d_v", "d_g", "d_beta", "d_initial")


@dataclass
class Case:
    """Arguments of one call, and the output gradients to test with."""

    arguments: list[Tensor]
    initial: Tensor | None
    borders: Tensor | None
    d_output: Tensor
    d_final: Tensor

    def run(self, backend: str, dtype: torch.dtype = torch.float64, function: Any = gated_delta_rule) -> list[Tensor]:
        """Output, final state and all gradients, in float64."""
        leaves = [x.to(dtype).requires_grad_() for x in self.arguments]
        if self.initial is not None:
            leaves.append(self.initial.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        initial = leaves[5] if self.initial is not None else None
        y, final = function(*leaves[:5], None, initial, True, self.borders, backend)
        assert y.dtype == dtype
        loss = (y.double() * self.d_output).sum() + (final.double() * self.d_final).sum()
        return [x.detach().double() for x in (y, final, *torch.autograd.grad(loss, leaves))]


def make(
    batch: int, length: int, heads: int = 2, groups: int = 1, key: int = 5, value: int = 3, with_initial: bool = True,
    borders: list[int] | None = None, decay: float | None = None, beta: float | None = None, seed: int = 0,
) -> Case:  # fmt: skip
    """A case of random numbers; `decay` is g of every token, and `beta` its write strength, where they are given."""
    torch.manual_seed(seed)
    tokens, sequences, double = (batch, length), batch if borders is None else len(borders) - 1, torch.float64
    g = -nn.functional.softplus(2 * torch.randn(*tokens, heads, dtype=double))
    g[torch.rand(g.shape) < 0.1] = 0
    strength = torch.rand(*tokens, heads, dtype=double)
    strength[torch.rand(g.shape) < 0.1] = 0
    strength[torch.rand(g.shape) < 0.1] = 1
    keys = nn.functional.normalize(torch.randn(*tokens, groups, key, dtype=double), dim=-1)
    state = (sequences, heads, key, value)
    return Case(
        [
            nn.functional.normalize(torch.randn(*tokens, groups, key, dtype=double), dim=-1),
            keys,
            torch.randn(*tokens, heads, value, dtype=double),
            g if decay is None else torch.full_like(g, decay),
            strength if beta is None else torch.full_like(g, beta),
        ],
        torch.randn(state, dtype=double) if with_initial else None,
        None if borders is None else torch.tensor(borders, dtype=torch.int32),
        torch.randn(*tokens, heads, value, dtype=double),
        torch.randn(state, dtype=double),
    )


def errors(got: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative errors, by name."""
    result = {}
    for name, a, b in zip(NAMES, got, expected, strict=False):
        assert torch.isfinite(a).all(), name
        error = (a - b).norm() / b.norm() if b.numel() and b.norm() > 0 else a.norm()
        result[name] = float(error)
    return result


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    found = errors(got, expected)
    assert all(error <= tolerance for error in found.values()), found


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize(("key", "value"), [(5, 3), (4, 16)])
def test_chunked_equals_reference(length: int, with_initial: bool, key: int, value: int) -> None:
    case = make(2, length, heads=4, groups=2, key=key, value=value, with_initial=with_initial)
    assert_close(case.run("chunked"), case.run("reference"), 1e-10)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 80), min_size=1, max_size=6)) if packed else [draw(st.integers(1, 140))]
    lengths[-1] = max(lengths[-1], 1)
    groups = draw(st.integers(1, 2))
    return make(
        batch=1 if packed else draw(st.integers(1, 3)),
        length=sum(lengths),
        heads=groups * draw(st.integers(1, 2)),
        groups=groups,
        key=draw(st.integers(1, 5)),
        value=draw(st.integers(1, 5)),
        with_initial=draw(st.booleans()),
        borders=[0, *torch.tensor(lengths).cumsum(0).tolist()] if packed else None,
        decay=draw(st.sampled_from([None, 0.0, -1e-4, -50.0])),
        beta=draw(st.sampled_from([None, 0.0, 1.0])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=30, deadline=None)
@given(cases())
def test_any_case(case: Case) -> None:
    expected = case.run("reference")
    got = case.run("chunked")
    # Where nothing is left of the past (beta = 1 and keys of width 1, or strong decay) the gradient of g is rounding alone, so
    # it is judged by the size of the others.
    scale = max(float(x.norm()) for x in expected)
    for name, a, b in zip(NAMES, got, expected, strict=False):
        assert float((a - b).norm()) <= 1e-10 * max(float(b.norm()), 1e-3 * scale), name


@pytest.mark.parametrize("decay", [0.0, -1e-6, -50.0])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_ends_of_decay_and_strength(decay: float, beta: float) -> None:
    case = make(2, 130, decay=decay, beta=beta)
    got, expected = case.run("chunked"), case.run("reference")
    if decay == -50:  # a gradient of exp(-50) is nothing
        assert max(float(x[5].norm()) for x in (got, expected)) < 1e-18
        got[5] = expected[5]
    assert_close(got, expected, 1e-10)


@pytest.mark.parametrize("borders", [[0, 1, 1, 64, 128, 193, 200], [0, 0, 200, 200], [0, *range(3, 201, 3), 200]])
@pytest.mark.parametrize("with_initial", [False, True])
def test_packed(borders: list[int], with_initial: bool) -> None:
    case = make(1, 200, borders=borders, with_initial=with_initial)
    expected = case.run("reference")
    assert_close(case.run("chunked"), expected, 1e-10)
    for n in range(len(borders) - 1):
        span = slice(borders[n], borders[n + 1])
        alone = gated_delta_rule(
            *(x[:, span] for x in case.arguments), None, None if case.initial is None else case.initial[n : n + 1], True
        )
        torch.testing.assert_close(alone[0], expected[0][:, span], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(alone[1], expected[1][n : n + 1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decay", [None, 0.0, -50.0])
@pytest.mark.parametrize("beta", [None, 1.0])
def test_float32(decay: float | None, beta: float | None) -> None:
    """Nothing overflows, and what is left keeps its digits."""
    case = make(2, 200, key=16, value=8, decay=decay, beta=beta)
    got, expected = case.run("chunked", torch.float32), case.run("reference")
    if decay == -50:
        got[5] = expected[5]
    assert_close(got, expected, 1e-5)


def test_weak_decay_beside_strong() -> None:
    """However strong a decay, those after it keep their digits in float32."""
    case = make(2, 150)
    g = case.arguments[3]
    g.copy_(torch.where(torch.rand(g.shape) < 0.05, -1e6, -0.1 * torch.rand(g.shape, dtype=g.dtype)))
    assert_close(case.run("chunked", torch.float32)[:2], case.run("reference")[:2], 1e-4)


@pytest.mark.parametrize("key", [1, 2])
def test_equal_keys(key: int) -> None:
    """The hardest system to solve: each write overwrites the one before."""
    case = make(2, 200, key=key, beta=1.0, decay=0.0)
    case.arguments[1].copy_(torch.ones_like(case.arguments[1]) / key**0.5)
    assert_close(case.run("chunked"), case.run("reference"), 1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_what_a_write_does(backend: str) -> None:
    """A token of full strength is read back as it was written, whatever was there before; one of none leaves the state."""
    case = make(2, 20, decay=0.0, beta=1.0, heads=4, groups=2)
    q, k, v, g, beta = case.arguments
    y, _ = gated_delta_rule(k, k, v, g, beta, 1.0, case.initial, backend=backend)
    torch.testing.assert_close(y, v)
    y, final = gated_delta_rule(q, k, v, g, 0 * beta, 1.0, case.initial, True, backend=backend)
    assert torch.equal(final, case.initial)
    torch.testing.assert_close(y, torch.einsum("bhkv,bthk->bthv", final, q.repeat_interleave(2, 2)))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("borders", [None, [0, 0, 0]])
def test_no_tokens(backend: str, borders: list[int] | None) -> None:
    case = make(1 if borders else 2, 0, borders=borders)
    y, final = gated_delta_rule(*case.arguments, None, case.initial, True, case.borders, backend)
    assert y.shape == case.arguments[2].shape
    assert torch.equal(final, case.initial)
    assert final.data_ptr() != case.initial.data_ptr()


def test_bfloat16() -> None:
    case = make(2, 150, key=16, value=8)
    rounded = replace(case, arguments=[x.bfloat16().double() for x in case.arguments])
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run("chunked", torch.bfloat16)
    assert_close(got, rounded.run("reference"), 0.01)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(packed: bool) -> None:
    case = make(1, 150, borders=[0, 30, 30, 150] if packed else None)
    torch._dynamo.reset()
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(case.run("chunked", function=compiled), case.run("chunked"), 1e-12)


def test_steps_equal_the_whole() -> None:
    case = make(2, 12, heads=4, groups=2)
    whole, final = gated_delta_rule(*case.arguments, None, case.initial, True)
    state = case.initial.clone()
    y = torch.stack([gated_delta_rule_step(*(x[:, t] for x in case.arguments), state) for t in range(12)], dim=1)
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-12)


def chunk_gated_delta_rule(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None,
    output_final_state: bool, use_qk_l2norm_in_kernel: bool, cu_seqlens: Tensor | None,
) -> Any:  # fmt: skip
    """What fla's function computes of these arguments."""
    assert q.shape[2] == k.shape[2] == v.shape[2]
    assert q.dtype == k.dtype == v.dtype
    assert not use_qk_l2norm_in_kernel
    assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
    return gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, "chunked")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("borders", [None, [0, 3, 3, 11, 20]])
@pytest.mark.parametrize("with_initial", [False, True])
def test_what_fla_is_given(
    compiled: bool, borders: list[int] | None, with_initial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, the call stands between the graphs."""
    monkeypatch.setattr(module, "_find", lambda: chunk_gated_delta_rule)
    monkeypatch.setattr(module, "why_not_fla", lambda k, v: None)
    case = make(1 if borders else 2, 20, heads=4, groups=2, borders=borders, with_initial=with_initial)
    function = gated_delta_rule
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(gated_delta_rule, backend="aot_eager", dynamic=False)
    assert_close(case.run("fla", torch.float32, function), case.run("reference"), 1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch's own, while it traces
@pytest.mark.parametrize("backend", ["chunked", "fla"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("borders", [None, [0, 3, 3, 200, 300]])
def test_on_a_gpu(backend: str, compiled: bool, borders: list[int] | None) -> None:
    """Errors are relative to the loop on the same rounded numbers; `-s` shows them."""
    sample = torch.zeros(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    reason = None if backend == "chunked" else module.why_not_fla(sample, sample)
    if reason is not None:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(False)  # PyTorch's cumsum there is not
    case = make(1 if borders else 2, 300, heads=4, groups=4, key=64, value=128, borders=borders)
    leaves = [x.bfloat16() if i < 3 else x.float() for i, x in enumerate(case.arguments)]
    expected = replace(case, arguments=[x.double() for x in leaves]).run("reference")
    assert case.initial is not None
    leaves = [x.detach().cuda().requires_grad_() for x in (*leaves, case.initial.float())]
    cu_seqlens = None if case.borders is None else case.borders.cuda()
    function = torch.compile(gated_delta_rule, fullgraph=backend == "chunked", dynamic=False) if compiled else gated_delta_rule
    y, final = function(*leaves[:5], None, leaves[5], True, cu_seqlens, backend)
    loss = (y.double() * case.d_output.cuda()).sum() + (final.double() * case.d_final.cuda()).sum()
    got = [x.detach().double().cpu() for x in (y, final, *torch.autograd.grad(loss, leaves))]
    print({name: f"{error:.1e}" for name, error in errors(got, expected).items()})
    assert_close(got, expected, 0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 5, 4)}, r"v: got torch\.float32 \(2, 5, 4\), takes \[B, T, H, V\]"),
        ({"k": torch.zeros(2, 5, 3, 6)}, r"k: got shape \(2, 5, 3, 6\).* a divisor of 4 heads"),
        ({"q": torch.zeros(2, 5, 2, 7)}, r"q: got shape \(2, 5, 2, 7\), takes the shape of k, \(2, 5, 2, 6\)"),
        ({"g": torch.zeros(2, 5, 3)}, r"g: got shape \(2, 5, 3\), takes \(2, 5, 4\)"),
        ({"beta": torch.zeros(2, 5)}, r"beta: got shape \(2, 5\), takes \(2, 5, 4\)"),
        ({"beta": torch.zeros(2, 5, 4, dtype=torch.int64)}, r"beta: got dtype torch\.int64"),
        ({"q": torch.zeros(2, 5, 2, 6, device="meta")}, "q: is on meta, v on cpu; move them to one device"),
        ({"initial_state": torch.zeros(2, 4, 3, 6)}, r"initial_state: got shape \(2, 4, 3, 6\), takes \(2, 4, 6, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: got B = 2"),
        ({"backend": "triton"}, "backend='triton': use one of auto, reference, chunked, fla"),
        ({"backend": "fla"}, r"backend='fla': v has dtype torch\.float32, the kernels take bfloat16 or float16; use 'auto'"),
        (
            {"backend": "fla", "v": torch.zeros(2, 5, 4, 3, dtype=torch.bfloat16)},
            "backend='fla': v is on cpu, the kernels need a GPU; use 'auto', or 'chunked'",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    keys, rates = torch.zeros(2, 5, 2, 6), torch.zeros(2, 5, 4)
    given = {"q": keys, "k": keys, "v": torch.zeros(2, 5, 4, 3), "g": rates, "beta": rates}
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**(given | change))


def test_fla_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(module.importlib, "import_module", missing)
    module._find.cache_clear()
    try:
        assert "No module named 'fla.ops.gated_delta_rule'); pip install fla-core" in str(module._missing())
    finally:
        module._find.cache_clear()
