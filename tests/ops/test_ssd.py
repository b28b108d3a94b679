"""Mamba-2's recurrence: every form against the float64 loop, outputs, final states and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from factorization_memory.ops.ssd import chunked as ssd_chunked
from factorization_memory.ops.ssd import kernels as ssd_kernels
from factorization_memory.ops.ssd import ssd, ssd_step

NAMES = ("output", "final state", "d_x", "d_dt", "d_decay_rate", "d_input_map", "d_output_map", "d_initial")


@dataclass
class Case:
    """Arguments of one call, and the output gradients to test with."""

    arguments: list[Tensor]
    initial: Tensor | None
    borders: Tensor | None
    d_output: Tensor
    d_final: Tensor
    chunk: int = 8

    def run(self, backend: str, dtype: torch.dtype = torch.float64, function: Any = ssd) -> list[Tensor]:
        """Output, final state and all gradients, in float64."""
        leaves = [x.to(dtype).requires_grad_() for x in self.arguments]
        if self.initial is not None:
            wide = torch.promote_types(dtype, torch.float32)
            leaves.append(self.initial.to(wide).requires_grad_())
        initial = leaves[5] if self.initial is not None else None
        y, final = function(*leaves[:5], self.chunk, initial, True, self.borders, backend)
        assert y.dtype == dtype
        loss = (y.double() * self.d_output).sum() + (final.double() * self.d_final).sum()
        return [x.detach().double() for x in (y, final, *torch.autograd.grad(loss, leaves))]


def make(
    batch: int, length: int, heads: int = 4, groups: int = 2, width: int = 3, size: int = 5, chunk: int = 8,
    with_initial: bool = True, borders: list[int] | None = None, strength: float = 1.0, seed: int = 0,
) -> Case:  # fmt: skip
    torch.manual_seed(seed)
    tokens, sequences, double = (batch, length), batch if borders is None else len(borders) - 1, torch.float64
    dt = torch.nn.functional.softplus(2 * torch.randn(*tokens, heads, dtype=double))
    dt[torch.rand(dt.shape) < 0.1] = 0
    state = (sequences, heads, width, size)
    return Case(
        [
            torch.randn(*tokens, heads, width, dtype=double),
            dt,
            -strength * torch.rand(heads, dtype=double),
            torch.randn(*tokens, groups, size, dtype=double),
            torch.randn(*tokens, groups, size, dtype=double),
        ],
        torch.randn(state, dtype=double) if with_initial else None,
        None if borders is None else torch.tensor(borders, dtype=torch.int32),
        torch.randn(*tokens, heads, width, dtype=double),
        torch.randn(state, dtype=double),
        chunk,
    )


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=False):
        assert torch.isfinite(a).all(), name
        error = (a - b).norm() / b.norm() if b.numel() and b.norm() > 0 else a.norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6)) if packed else [draw(st.integers(1, 90))]
    lengths[-1] = max(lengths[-1], 1)
    groups = draw(st.integers(1, 3))
    return make(
        batch=1 if packed else draw(st.integers(1, 3)),
        length=sum(lengths),
        heads=groups * draw(st.integers(1, 2)),
        groups=groups,
        width=draw(st.integers(1, 4)),
        size=draw(st.integers(1, 4)),
        chunk=draw(st.sampled_from([1, 7, 16, 64])),
        with_initial=draw(st.booleans()),
        borders=[0, *torch.tensor(lengths).cumsum(0).tolist()] if packed else None,
        strength=draw(st.sampled_from([0.01, 1.0, 16.0, 1000.0])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=50, deadline=None)
@given(cases())
def test_chunked_equals_reference(case: Case) -> None:
    assert_close(case.run("chunked"), case.run("reference"), 1e-10)


@pytest.mark.parametrize("borders", [None, [0, 1, 1, 40, 43, 200], [0, *range(3, 201, 3), 200], [0, 0, 200, 200]])
def test_blocks_of_blocks(borders: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """States pass over more chunks than one matrix of decays takes, and over blocks of such."""
    monkeypatch.setattr(ssd_chunked, "BLOCK", 3)
    monkeypatch.setattr(ssd_chunked, "MIN_CHUNK", 2)
    case = make(1 if borders else 2, 200, chunk=4, strength=0.05, borders=borders)
    assert_close(case.run("chunked"), case.run("reference"), 1e-10)


@pytest.mark.parametrize("strength", [1.0, 16.0, 1e4, 1e8])
def test_float32_and_strong_decay(strength: float) -> None:
    """Nothing overflows, and what is left keeps its digits."""
    case = make(2, 150, chunk=64, strength=strength)
    assert_close(case.run("chunked", torch.float32), case.run("reference"), 3e-4)


def test_weak_tokens_beside_strong_ones() -> None:
    """However strong a decay, those after it keep their digits in float32."""
    case = make(2, 150, chunk=64)
    dt = case.arguments[1]
    strong = torch.rand(dt.shape) < 0.05
    dt.copy_(torch.where(strong, 1e6, 0.1 * torch.rand(dt.shape)))
    case.arguments[0][strong] *= 1e-6
    assert_close(case.run("chunked", torch.float32)[:2], case.run("reference")[:2], 1e-4)


def test_step_size_zero_leaves_the_state() -> None:
    case = make(2, 20)
    case.arguments[1].zero_()
    y, final = ssd(*case.arguments, 8, case.initial, True)
    assert torch.equal(final, case.initial)
    torch.testing.assert_close(y, torch.einsum("bhpn,bthn->bthp", final, case.arguments[4].repeat_interleave(2, 2)))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("borders", [None, [0, 0, 0]])
def test_no_tokens(backend: str, borders: list[int] | None) -> None:
    case = make(1 if borders else 2, 0, borders=borders)
    y, final = ssd(*case.arguments, 8, case.initial, True, case.borders, backend)
    assert y.shape == case.arguments[0].shape
    assert torch.equal(final, case.initial)
    assert final.data_ptr() != case.initial.data_ptr()


def test_bfloat16() -> None:
    case = make(2, 100, chunk=32)
    rounded = replace(case, arguments=[x.bfloat16().double() for x in case.arguments])
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run("chunked", torch.bfloat16)
    assert_close(got, rounded.run("reference"), 0.02)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(packed: bool) -> None:
    case = make(1, 70, chunk=8, borders=[0, 30, 30, 70] if packed else None)
    torch._dynamo.reset()
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(case.run("chunked", function=compiled), case.run("chunked"), 1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_where_it_would_be_traced_wrongly_it_is_one_operator(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorization_memory.ops.ssd._traced_wrongly", lambda x: torch.compiler.is_compiling())
    case = make(1, 70, chunk=8, borders=[0, 30, 30, 70] if packed else None)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ssd, fullgraph=True, backend=graphs, dynamic=False)
    assert_close(case.run("chunked", function=compiled), case.run("chunked"), 1e-12)
    assert "ssd_chunked" in str(graphs.graphs[0].code)


def test_steps_equal_the_whole() -> None:
    case = make(2, 12)
    x, dt, rate, b, c = case.arguments
    whole, final = ssd(*case.arguments, 8, case.initial, True)
    state = case.initial.clone()
    y = torch.stack([ssd_step(x[:, t], dt[:, t], rate, b[:, t], c[:, t], state) for t in range(12)], dim=1)
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-12)


class Gla(torch.autograd.Function):
    """What fla's `chunk_simple_gla` computes, as a loop with its own backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, borders: list[int]) -> Any:
        sequences = len(borders) - 1
        shape = (q.shape[0] if sequences == 1 else sequences, q.shape[2], q.shape[3], v.shape[3])
        state = v.new_zeros(shape) if initial is None else initial.to(v).clone()
        y, finals, before = torch.empty_like(v), [], {}
        for n in range(sequences):
            s = state if sequences == 1 else state[n : n + 1]
            for t in range(borders[n], borders[n + 1]):
                before[t] = s
                s = g[:, t].exp()[..., None, None] * s + k[:, t, :, :, None] * v[:, t, :, None]
                y[:, t] = (s * q[:, t, :, :, None]).sum(2)
            finals.append(s)
        ctx.save_for_backward(q, k, v, g)
        ctx.before, ctx.borders, ctx.with_initial = before, borders, initial is not None
        return y, torch.cat(finals)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor, d_final: Tensor) -> Any:
        q, k, v, g = ctx.saved_tensors
        d_q, d_k, d_v, d_g = (torch.empty_like(x) for x in (q, k, v, g))
        starts, sequences = [], len(ctx.borders) - 1
        for n in range(sequences):
            d_s = d_final if sequences == 1 else d_final[n : n + 1]
            for t in reversed(range(ctx.borders[n], ctx.borders[n + 1])):
                kept = g[:, t].exp()[..., None, None] * ctx.before[t]
                s = kept + k[:, t, :, :, None] * v[:, t, :, None]
                d_s = d_s + q[:, t, :, :, None] * d_y[:, t, :, None]
                d_q[:, t] = (s * d_y[:, t, :, None]).sum(3)
                d_k[:, t], d_v[:, t] = (d_s * v[:, t, :, None]).sum(3), (d_s * k[:, t, :, :, None]).sum(2)
                d_g[:, t] = (d_s * kept).sum((2, 3))
                d_s = g[:, t].exp()[..., None, None] * d_s
            starts.append(d_s)
        return d_q, d_k, d_v, d_g, torch.cat(starts) if ctx.with_initial else None, None


def chunk_simple_gla(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> Any:  # fmt: skip
    assert scale == 1.0
    y, final = Gla.apply(q, k, v, g, initial_state, [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist())
    return y, final if output_final_state else None


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, chunk_size: int, *, initial_states: Tensor | None,
    seq_idx: Tensor | None, return_final_states: bool,
) -> Any:  # fmt: skip
    """What mamba-ssm's function computes."""
    assert chunk_size == 256
    borders = None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        borders = torch.tensor([0, *(seq_idx[0].diff().nonzero()[:, 0] + 1).tolist(), x.shape[1]])
    y, final = ssd(x, dt, rate, b, c, 8, initial_states, return_final_states, borders, "chunked")
    return (y, final) if return_final_states else y


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of PyTorch in the place of the packages' kernels."""
    found = {"fla": chunk_simple_gla, "mamba-ssm": mamba_chunk_scan_combined}
    monkeypatch.setattr(ssd_kernels, "_find", found.__getitem__)
    monkeypatch.setattr(ssd_kernels, "why_unsupported", lambda backend, x, packed_states: None)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("borders", [None, [0, 3, 3, 11, 20]])
@pytest.mark.parametrize("with_initial", [False, True])
def test_what_fla_is_given(compiled: bool, borders: list[int] | None, with_initial: bool) -> None:
    case = make(1 if borders else 2, 20, borders=borders, with_initial=with_initial)
    function = ssd
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(ssd, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(case.run("fla", torch.float32, function), case.run("reference"), 1e-5)


@pytest.mark.usefixtures("stand_ins")
def test_what_mamba_ssm_is_given() -> None:
    case = make(2, 20)
    assert_close(case.run("mamba-ssm", torch.float32), case.run("reference"), 1e-5)
    case = make(1, 20, borders=[0, 3, 3, 11, 20], with_initial=False)
    y, final = ssd(*(x.float() for x in case.arguments), 8, None, False, case.borders, "mamba-ssm")
    assert final is None
    assert_close([y.double()], case.run("reference")[:1], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "mamba-ssm", "fla"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("borders", [None, [0, 3, 3, 200, 333]])
def test_on_a_gpu(backend: str, compiled: bool, borders: list[int] | None) -> None:
    reason = None if backend == "chunked" else ssd_kernels.why_unsupported(backend, torch.zeros(1, device="cuda"), False)
    if reason is not None:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(False)  # PyTorch's cumsum there is not
    case = make(1 if borders else 2, 333, heads=4, groups=1, width=64, size=64, strength=0.3, borders=borders)
    leaves = [x.detach().bfloat16() if i in (0, 3, 4) else x.detach().float() for i, x in enumerate(case.arguments)]
    rounded = replace(case, arguments=[x.double() for x in leaves])
    keep = borders is None or backend != "mamba-ssm"
    if not keep:
        rounded.initial, rounded.d_final = None, torch.zeros_like(case.d_final)
    expected = rounded.run("reference")
    leaves = [x.cuda().requires_grad_() for x in leaves]
    if keep:
        assert case.initial is not None
        leaves.append(case.initial.detach().float().cuda().requires_grad_())
    cu_seqlens = None if case.borders is None else case.borders.cuda()
    function = torch.compile(ssd, fullgraph=True, dynamic=False) if compiled else ssd
    y, final = function(*leaves[:5], 64, leaves[5] if keep else None, keep, cu_seqlens, backend)
    loss = (y.double() * case.d_output.cuda()).sum()
    if keep:
        loss = loss + (final.double() * case.d_final.cuda()).sum()
    got = [y, expected[1].cuda() if final is None else final, *torch.autograd.grad(loss, leaves)]
    assert_close([x.detach().double().cpu() for x in got], expected, 0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 4)}, r"x: got torch\.float32 \(2, 5, 4\), takes \[B, T, H, P\]"),
        ({"dt": torch.zeros(2, 5, 3)}, r"dt: got shape \(2, 5, 3\), takes \(2, 5, 4\)"),
        ({"decay_rate": torch.zeros(3)}, r"decay_rate: got shape \(3,\), takes \(4,\)"),
        ({"input_map": torch.zeros(2, 5, 3, 6)}, r"input_map: got shape \(2, 5, 3, 6\).* a divisor of 4 heads"),
        ({"output_map": torch.zeros(2, 5, 2, 7)}, r"output_map: got shape .* takes the shape of input_map"),
        ({"dt": torch.zeros(2, 5, 4, dtype=torch.int64)}, r"dt: got dtype torch\.int64"),
        ({"initial_state": torch.zeros(2, 4, 6, 3)}, r"initial_state: got shape \(2, 4, 6, 3\), takes \(2, 4, 3, 6\)"),
        ({"chunk_size": 0}, "chunk_size: got 0"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: got B = 2"),
        ({"backend": "triton"}, "backend='triton': use one of auto, reference"),
        ({"backend": "fla"}, "backend='fla': x is on cpu, the kernels need a GPU; use 'auto'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    maps = torch.zeros(2, 5, 2, 6)
    given = {"x": torch.zeros(2, 5, 4, 3), "dt": torch.zeros(2, 5, 4), "decay_rate": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        ssd(**({**given, "input_map": maps, "output_map": maps} | change))


@pytest.mark.parametrize(
    ("capability", "version", "refused"),
    [((9, 0), "3.6.0", True), ((9, 0), "3.7.1", False), ((9, 0), "3.3.1", False), ((8, 0), "3.6.0", False)],
)
def test_fla_is_not_taken_where_it_would_refuse(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: str, refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ssd_kernels.runtime, "triton_version", lambda: version)
    reason = ssd_kernels.fla_refusal("cuda:0")
    assert (reason is not None) == refused
    assert reason is None or f"Triton {version}" in reason
