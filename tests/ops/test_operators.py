"""`torch.library.opcheck` of every registered operator: schema, fake tensors, autograd, and tracing with dynamic shapes."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

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
for module in ("cross_entropy", "memory.chunked", *KERNELS):
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


CASES: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "chunked": lambda: (OPS.chunked, (*weights(M), rand(B, H, M, D, grad=True), None, True)),
    "chunked, packed": lambda: (OPS.chunked, (*weights(M, 1), None, BORDERS, True)),
    "chunked_backward": lambda: (
        OPS.chunked_backward, (rand(B, T, H, D), rand(B, H, M, D), *weights(M, grad=False), rand(B, H, M, D), None)
    ),
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
    "convolve": lambda: (OPS.convolve, (rand(B, T, D, grad=True), rand(3, D, grad=True), rand(D, grad=True), None, None, None)),
    "convolve_backward": lambda: (
        OPS.convolve_backward, (rand(B, T, D), rand(3, D), rand(D), rand(B, 2, D), None, None, rand(B, T, D))
    ),
    "route": lambda: (OPS.route, (*(rand(B, T, H, M, grad=True) for _ in range(3)), K, 1.0)),
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
def test_opcheck(name: str) -> None:
    operator, arguments = CASES[name]()
    torch.library.opcheck(operator.default, arguments)


def test_every_operator_is_checked() -> None:
    """But those of other packages' kernels, and the backward operators that take what forward kept, which autograd calls."""
    made = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("factorization_memory::")}
    by_autograd = {"dense_backward", "sparse_backward", "route_backward", "ssd", "ssd_backward"}
    assert {name.split(",")[0] for name in CASES} == made - by_autograd
