"""`torch.library.opcheck` of every registered operator: schema, fake tensors, autograd, and tracing with dynamic shapes."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factorization_memory.ops.ssd import kernels as ssd_kernels

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("small sizes of the kernels are interpreted", allow_module_level=True)

KERNELS = (
    "convolution.kernels",
    "routing.kernels",
    "memory.kernels.dense",
    "memory.kernels.sparse",
    "memory.kernels.step",
    "memory.scan",
)
for module in ("cross_entropy", "memory.chunked", "ssd.chunked", "gated_delta_rule.chunked", *KERNELS):
    import_module(f"factorization_memory.ops.{module}")  # they register their operators

B, T, H, M, K, D = 2, 7, 2, 5, 2, 4
OPS = torch.ops.factorization_memory
BORDERS = torch.tensor([0, 3, 3, T], dtype=torch.int32)


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.rand(shape).requires_grad_(grad)


def weights(width: int, batch: int = B, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return rand(batch, T, H, width, grad=grad), rand(batch, T, H, width, grad=grad), rand(batch, T, H, D, grad=grad)


def selected(batch: int = B) -> Tensor:
    return torch.rand(batch, T, H, M).topk(K).indices


def delta_rule(batch: int = B, grad: bool = True) -> tuple[Tensor, ...]:
    keys = (nn.functional.normalize(torch.rand(batch, T, H, K), dim=-1).requires_grad_(grad) for _ in range(2))
    rates = -rand(batch, T, H), rand(batch, T, H)
    return *keys, rand(batch, T, H, D, grad=grad), *(rate.requires_grad_(grad) for rate in rates)


def mamba2(batch: int = B, grad: bool = True) -> tuple[Tensor, ...]:
    values = rand(batch, T, H, D, grad=grad), rand(batch, T, H, grad=grad), -rand(H)
    return *values[:2], values[2].requires_grad_(grad), *(rand(batch, T, 1, K, grad=grad) for _ in range(2))


def simple_gla(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: None, output_final_state: bool, cu_seqlens: None
) -> tuple[Tensor, None]:
    """What fla's function computes, from an empty state."""
    sums = g.cumsum(1).transpose(1, 2)
    decay = (sums[..., :, None] - sums[..., None, :]).exp().tril()
    return torch.einsum("bthn,bshn,bhts,bshp->bthp", q, k, decay, v), None


def gla(grad: bool = True) -> tuple[Any, ...]:
    maps = (rand(B, T, H, K, grad=grad) for _ in range(2))
    return rand(B, T, H, D, grad=grad), (-rand(B, T, H)).requires_grad_(grad), *maps, None, None, None


def dense_backward() -> tuple[Any, ...]:
    given = (*weights(M, grad=False), rand(B, H, M, D), None)
    _, _, *kept = OPS.dense(*given, True)
    return rand(B, T, H, D), rand(B, H, M, D), *given, *kept


def sparse_backward() -> tuple[Any, ...]:
    given = (*weights(K, grad=False), selected(), rand(B, H, M, D), None, M)
    _, _, *kept = OPS.sparse(*given, True)
    return rand(B, T, H, D), rand(B, H, M, D), *given, False, *kept


def route_backward() -> tuple[Any, ...]:
    affinity, _, _, *kept = OPS.route(*(rand(B, T, H, M) for _ in range(3)), K, 1.0)
    return affinity, *kept, *(rand(B, T, H, K) for _ in range(3)), M, M, 1.0, torch.float32, True


CASES: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "chunked": lambda: (OPS.chunked, (*weights(M), rand(B, H, M, D, grad=True), None, True)),
    "chunked, packed": lambda: (OPS.chunked, (*weights(M, 1), None, BORDERS, True)),
    "chunked_backward": lambda: (
        OPS.chunked_backward, (rand(B, T, H, D), rand(B, H, M, D), *weights(M, grad=False), rand(B, H, M, D), None)
    ),
    "gated_delta_rule": lambda: (OPS.gated_delta_rule, (*delta_rule(), rand(B, H, K, D, grad=True), None, 0.5, True)),
    "gated_delta_rule, packed": lambda: (OPS.gated_delta_rule, (*delta_rule(1), None, BORDERS, 0.5, False)),
    "gated_delta_rule_backward": lambda: (
        OPS.gated_delta_rule_backward,
        (rand(B, T, H, D), rand(B, H, K, D), *delta_rule(grad=False), rand(B, H, K, D), None, 0.5),
    ),
    "ssd_chunked": lambda: (OPS.ssd_chunked, (*mamba2(), rand(B, H, D, K, grad=True), None, 4, True)),
    "ssd_chunked, packed": lambda: (OPS.ssd_chunked, (*mamba2(1), None, BORDERS, 4, False)),
    "ssd_chunked_backward": lambda: (
        OPS.ssd_chunked_backward, (rand(B, T, H, D), None, *mamba2(grad=False), None, None, 4)
    ),
    "ssd": lambda: (OPS.ssd, (*gla(), "fla", False)),
    "ssd_backward": lambda: (OPS.ssd_backward, (rand(B, T, H, D), None, *gla(grad=False), "fla")),
    "dense": lambda: (OPS.dense, (*weights(M), rand(B, H, M, D, grad=True), None, True)),
    "dense, packed": lambda: (OPS.dense, (*weights(M, 1), None, BORDERS, False)),
    "sparse": lambda: (OPS.sparse, (*weights(K), selected(), rand(B, H, M, D, grad=True), None, M, True)),
    "scan": lambda: (OPS.scan, (*weights(K), selected(), selected(), rand(B, H, M, D, grad=True), None, M, True, True)),
    "scan, packed": lambda: (OPS.scan, (*weights(K, 1), selected(1), selected(1), None, BORDERS, M, False, False)),
    "scan_backward": lambda: (
        OPS.scan_backward,
        (rand(B, T, H, D), rand(B, H, M, D), *weights(K, grad=False), selected(), selected(), rand(B, H, M, D), None, M,
         rand(B, H, M, D)),
    ),
    "scan_step": lambda: (
        OPS.scan_step,
        (*weights(K, grad=False), selected(), selected(), rand(B, H, M, D), None, None, None),
    ),
    "dense_backward": lambda: (OPS.dense_backward, dense_backward()),
    "sparse_backward": lambda: (OPS.sparse_backward, sparse_backward()),
    "convolve": lambda: (OPS.convolve, (rand(B, T, D, grad=True), rand(3, D, grad=True), rand(D, grad=True), None, None, None)),
    "convolve_backward": lambda: (
        OPS.convolve_backward, (rand(B, T, D), rand(3, D), rand(D), rand(B, 2, D), None, None, rand(B, T, D))
    ),
    "route": lambda: (OPS.route, (*(rand(B, T, H, M, grad=True) for _ in range(3)), K, 1.0)),
    "route_backward": lambda: (OPS.route_backward, route_backward()),
    "route_step": lambda: (
        OPS.route_step,
        (*(rand(B, H, M) for _ in range(3)), rand(B, 1, H, K), torch.zeros(B, 1, H, K, dtype=torch.int64), K, 1.0),
    ),
    "step": lambda: (
        OPS.step, (*weights(M, grad=False), rand(B, H, M, D), None, None, None, None, None, None)
    ),
    "undo": lambda: (
        OPS.undo, (rand(B, H, M, D), rand(1, B, T, H, M, D), None, None, torch.zeros(1, dtype=torch.int64), 1)
    ),
    "linear_cross_entropy": lambda: (
        OPS.linear_cross_entropy, (rand(T, D, grad=True), rand(M, D, grad=True), torch.arange(T) % M, True, True, False)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_kernels, "_find", lambda package: simple_gla)
    operator, arguments = CASES[name]()
    torch.library.opcheck(operator.default, arguments)


def test_every_operator_is_checked() -> None:
    made = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("factorization_memory::")}
    assert {name.split(",")[0] for name in CASES} == made
