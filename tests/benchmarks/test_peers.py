"""Other people's mixers: what they compute, and what is said where they are not there."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from factorization_memory.benchmarks import peers
from factorization_memory.benchmarks.correctness import Problem, Shape

SMALL = Shape(batch=2, length=40, heads=2, num_states=5, value_size=16)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_needs_gpu", lambda problem, what: None)


def install(monkeypatch: pytest.MonkeyPatch, module: str, function: str, call: Any) -> None:
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    monkeypatch.setattr(sys.modules[module], function, call, raising=False)


def gated_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float) -> Any:
    """What chunk_gla documents: h = exp(g) h + k v, o = scale q h."""
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(v.shape[1]):
        state = g[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, :, None] * state).sum(2))
    return torch.stack(outputs, 1), None


@pytest.mark.parametrize("name", ["gla", "ssd"])
def test_kernels_need_a_gpu(name: str) -> None:
    with pytest.raises(peers.MissingPeerError, match="GPU"):
        peers.build(name, Problem.random(SMALL))


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(("name", "remedy"), [("gla", "pip install fla-core"), ("ssd", "pip install mamba-ssm")])
def test_a_missing_package_is_named_with_its_remedy(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fla", "mamba_ssm"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(peers.MissingPeerError, match=remedy):
        peers.build(name, Problem.random(SMALL))


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("top_k", [None, 3])
def test_gla_is_given_the_same_maths(top_k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "fla.ops.gla", "chunk_gla", gated_linear_attention)
    problem = Problem.random(Shape(2, 40, 2, 5, 16, top_k))
    problem.update[0, 3, 0, 1] = 1.0  # a full overwrite, whose log decay is not finite
    result = peers.same_maths("gla", problem)
    assert result["passed"]
    assert result["error"] < 1e-6
    contender = peers.build("gla", problem)
    assert contender.same_maths
    assert [gradient.shape for gradient in contender.forward_backward()] == [leaf.shape for leaf in contender.leaves]


@pytest.mark.usefixtures("anywhere")
def test_other_maths_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def decaying_less(q: Any, k: Any, v: Any, g: Any, scale: float) -> Any:
        return gated_linear_attention(q, k, v, g / 2, scale)

    install(monkeypatch, "fla.ops.gla", "chunk_gla", decaying_less)
    assert not peers.same_maths("gla", Problem.random(SMALL))["passed"]
    install(monkeypatch, "fla.ops.gla", "chunk_gla", lambda *arguments, scale: 1 / 0)
    assert "ZeroDivisionError" in peers.same_maths("gla", Problem.random(SMALL))["reason"]


@pytest.mark.usefixtures("anywhere")
def test_ssd_takes_mamba_or_else_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.random(Shape(2, 12, 2, 5, 32))  # width 64, inner width 128: two heads of 64

    def scan(x: Any, step: Any, rate: Any, inputs: Any, outputs: Any, chunk: int) -> torch.Tensor:
        assert inputs.shape == outputs.shape == (2, 12, 1, 128)
        assert bool((rate < 0).all())
        assert bool((step > 0).all())
        return x * (step * rate)[..., None] + (inputs * outputs).sum(-1, keepdim=True)

    install(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", scan)
    contender = peers.build("ssd", problem)
    assert contender.forward().shape == (2, 12, 2, 64)
    assert len(contender.forward_backward()) == 5
    assert contender.note.startswith("mamba-ssm")

    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    for name in [name for name in sys.modules if name.startswith("mamba_ssm.")]:
        monkeypatch.delitem(sys.modules, name)

    def simple(q: Any, k: Any, v: Any, g: Any, scale: float) -> Any:
        assert bool((g < 0).all())
        return (q * k).sum(-1, keepdim=True) * v * g[..., None], None

    install(monkeypatch, "fla.ops.simple_gla", "chunk_simple_gla", simple)
    contender = peers.build("ssd", problem)
    assert contender.note.startswith("fla")
    assert [gradient.shape for gradient in contender.forward_backward()] == [leaf.shape for leaf in contender.leaves]
    with pytest.raises(ValueError, match="inner width 20"):
        peers.build("ssd", Problem.random(Shape(2, 12, 2, 5, 5)))


@pytest.mark.parametrize(("heads", "width", "expected"), [(1, 256, (2, 128)), (3, 64, (2, 96)), (1, 7, (1, 7))])
def test_attention_has_the_whole_width(heads: int, width: int, expected: tuple[int, int]) -> None:
    contender = peers.build("attention", Problem.random(Shape(2, 9, heads, 4, width)))
    count, size = expected
    assert contender.forward().shape == (2, count, 9, size)
    assert not contender.same_maths
    assert len(contender.forward_backward()) == 3
    q, k, v = (leaf.detach().clone() for leaf in contender.leaves)
    v[:, :, -1] += 1  # causal: the last token is seen by itself alone
    changed = contender.function(q, k, v) - contender.forward()
    assert bool((changed[:, :, :-1] == 0).all())
    assert bool((changed[:, :, -1] != 0).any())
