"""A gradient of a gradient is right or an error, by whichever tensors it runs: never a number that lacks some terms."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factorization_memory import FactorizationMemory, LanguageModel
from factorization_memory.config import GatedDeltaNetConfig, Mamba2Config, ModelConfig
from factorization_memory.layers import Attention, FeedForward, GatedDeltaNet, Mamba2
from factorization_memory.layers.norm import rms_norm
from factorization_memory.ops import factorization_memory, gated_delta_rule, ssd
from factorization_memory.ops.attention import rotate
from factorization_memory.ops.convolution import causal_convolution
from factorization_memory.ops.cross_entropy import linear_cross_entropy
from factorization_memory.ops.routing import route
from factorization_memory.ops.ssd import kernels as ssd_kernels

REFUSED = "once_differentiable; take the difference of two gradients"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.mark.skipif(not INTERPRETED, reason="small sizes of the kernels are interpreted")

Function = Callable[..., Any]
B, T, H, M, K, D = 2, 5, 2, 6, 3, 4


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1


def recurrence(backend: str, sparse: bool, keep: bool = False) -> tuple[Function, list[Tensor]]:
    indices = torch.rand(B, T, H, M).topk(K).indices if sparse else None
    width = K if sparse else M

    def call(update: Tensor, merge: Tensor, value: Tensor, state: Tensor) -> Tensor:
        y, final = factorization_memory(
            update, merge, value, indices, num_states=M, initial_state=state, output_final_state=True, backend=backend
        )
        return final if keep else y  # type: ignore[return-value]

    return call, [rand(B, T, H, width), rand(B, T, H, width), rand(B, T, H, D), rand(B, H, M, D)]


def routing() -> tuple[Function, list[Tensor]]:
    def call(*logits: Tensor) -> Tensor:
        affinity, update, merge, _ = route(*logits, top_k=K, backend="triton")
        return affinity * update * merge  # type: ignore[operator]

    return call, [rand(B, T, H, M) for _ in range(3)]


def convolution(backend: str) -> tuple[Function, list[Tensor]]:
    return (
        lambda x, weight, bias: causal_convolution(x, weight, bias, backend=backend),
        [rand(B, T, D), rand(3, D), rand(D)],
    )


def mamba2(backend: str) -> tuple[Function, list[Tensor]]:
    return (
        lambda *xs: ssd.ssd(*xs, chunk_size=2, backend=backend)[0],
        [rand(B, T, H, D), rand(B, T, H), -rand(H), rand(B, T, 1, D), rand(B, T, 1, D)],
    )


def delta_rule() -> tuple[Function, list[Tensor]]:
    return (
        lambda *xs: gated_delta_rule.gated_delta_rule(*xs, backend="chunked")[0],
        [rand(B, T, H, D) / 4, rand(B, T, H, D) / 4, rand(B, T, H, D), -rand(B, T, H), rand(B, T, H)],
    )


def loss(backend: str, rows: int = 7) -> tuple[Function, list[Tensor]]:
    targets = torch.arange(rows) % 5
    return lambda h, w: linear_cross_entropy(h, w, targets, backend=backend), [rand(rows, D), rand(9, D)]


def rotation() -> tuple[Function, list[Tensor]]:
    position = torch.arange(1, T + 1)[None]
    # Rotation is written into its argument, which may be no leaf.
    return lambda x: rotate(x * x, position, H, D, 100.0), [rand(B, T, 2 * H * D)]


def feed_forward() -> tuple[Function, list[Tensor]]:
    layer = FeedForward(D, 8).double()
    return lambda x, *weights: call_with(layer, weights, x), [rand(B, T, D), *copies(layer)]


def layer(made: nn.Module) -> tuple[Function, list[Tensor]]:
    made = made.double()
    return lambda x, *weights: call_with(made, weights, x)[0], [rand(B, T, 16) - 0.5, *copies(made)]


def language_model(**options: Any) -> tuple[Function, list[Tensor]]:
    sizes = {"mamba2": Mamba2Config(8, 8), "gated_deltanet": GatedDeltaNetConfig(head_size=8)}
    config = ModelConfig(vocab_size=11, hidden_size=16, num_layers=2, num_states=M, **sizes, **options)  # type: ignore[arg-type]
    model = LanguageModel(config).double()
    tokens, targets = torch.arange(2 * T).view(2, T), torch.arange(2 * T).view(2, T).flip(1)
    names = [name for name, _ in model.named_parameters()]

    def call(*weights: Tensor) -> Tensor:
        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> Tensor:
                return self.model(tokens, targets)[0]

        given = {f"model.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return torch.func.functional_call(Loss(), given, ())

    return call, copies(model)


def call_with(module: nn.Module, weights: tuple[Tensor, ...], x: Tensor) -> Any:
    names = [name for name, _ in module.named_parameters()]
    return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))


def copies(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


CASES: dict[str, Callable[[], tuple[Function, list[Tensor]]]] = {
    "memory, reference": lambda: recurrence("reference", sparse=False),
    "memory, reference, sparse": lambda: recurrence("reference", sparse=True),
    "memory, chunked": lambda: recurrence("chunked", sparse=False),
    "memory, chunked, sparse": lambda: recurrence("chunked", sparse=True),
    "memory, chunked, final state": lambda: recurrence("chunked", sparse=True, keep=True),
    "convolution": lambda: convolution("plain"),
    "Mamba-2's recurrence, reference": lambda: mamba2("reference"),
    "Mamba-2's recurrence, chunked": lambda: mamba2("chunked"),
    "delta rule": delta_rule,
    "loss": lambda: loss("plain"),
    "rotary positions": rotation,
    "feed-forward": feed_forward,
    "norm": lambda: (lambda x, w: rms_norm(x, w, 1e-6), [rand(B, T, D), rand(D)]),
    "layer": lambda: layer(FactorizationMemory(16, M)),
    "layer, all of it": lambda: layer(
        FactorizationMemory(16, M, K, 2, conv_size=3, update_lag=1, output_gate=True, value_skip=True)
    ),
    "layer, reference": lambda: layer(FactorizationMemory(16, M, backend="reference")),
    "attention": lambda: layer(Attention(16, 2, 1, sliding_window=3)),
    "Mamba-2": lambda: layer(Mamba2(16, Mamba2Config(8, 8))),
    "Gated DeltaNet": lambda: layer(GatedDeltaNet(16, GatedDeltaNetConfig(head_size=8))),
    "model": language_model,
    "model, all mixers": lambda: language_model(mixers=("attention", "mamba2", "gated_deltanet"), num_heads=2),
}
KERNELS = {
    "memory, kernels": lambda: recurrence("triton-dense", sparse=False),
    "memory, sparse kernels": lambda: recurrence("triton-sparse", sparse=True),
    "memory, kernels, final state": lambda: recurrence("triton-dense", sparse=True, keep=True),
    "routing": routing,
    "convolution by kernels": lambda: convolution("triton"),
    "loss by kernels": lambda: loss("triton"),
}


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name: str, squared: bool) -> None:
    function, arguments = CASES[name]()
    check(function, arguments, squared, exact=True)


@kernels
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_refuse(name: str, squared: bool) -> None:
    function, arguments = KERNELS[name]()
    check(function, [x.float() for x in arguments], squared, exact=False)


@pytest.mark.parametrize("squared", [True, False])
def test_kernels_of_other_packages(monkeypatch: pytest.MonkeyPatch, squared: bool) -> None:
    """Autograd functions that say nothing of second derivatives, as those of fla and mamba-ssm."""
    monkeypatch.setattr(ssd_kernels, "why_unsupported", lambda *_: None)
    monkeypatch.setattr(ssd_kernels, "_find", lambda _: lambda q, k, v, g, **_: (Foreign.apply(q, k, v, g), None))
    check(*mamba2("fla"), squared, exact=False)
    monkeypatch.setattr(gated_delta_rule, "why_not_fla", lambda *_: None)
    monkeypatch.setattr(gated_delta_rule, "_find", lambda: lambda q, k, v, g, **_: (Foreign.apply(q, k, v, g), None))
    _, arguments = delta_rule()
    *leaves, beta = arguments
    check(lambda *xs: gated_delta_rule.gated_delta_rule(*xs, beta, backend="fla")[0], leaves, squared, exact=False)


class Foreign(torch.autograd.Function):
    """`q k v g` of heads of one size, whose backward makes no graph."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given)
        q, k, v, g = given
        return q * k * v * g[..., None]

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            q, k, v, g = ctx.saved_tensors
            g = g[..., None]
            return d_y * k * v * g, d_y * q * v * g, d_y * q * k * g, (d_y * q * k * v).sum(-1)


def check(function: Function, arguments: list[Tensor], squared: bool, *, exact: bool) -> None:
    """Of the gradient with respect to each argument (of many, some), the gradient with respect to each."""
    leaves = [x.clone().requires_grad_() for x in arguments]
    directions = [torch.randn_like(x) for x in leaves]

    def gradients(values: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        y = function(*values)
        total = (y.square() if squared else y).sum()
        return torch.autograd.grad(total, values, create_graph=create_graph, materialize_grads=True)

    some = range(0, len(leaves), -(-len(leaves) // 6))
    firsts = gradients(leaves, create_graph=True)
    for i in some:
        for j in some:
            try:
                (second,) = torch.autograd.grad(firsts[i], leaves[j], directions[i], retain_graph=True, materialize_grads=True)
            except RuntimeError as error:
                if not any(text in str(error) for text in (REFUSED, "is not implemented", "does not require grad")):
                    raise
                continue
            assert exact, f"gradient {i} by argument {j} is no error"
            step = 1e-6 * directions[j]
            ahead, behind = (moved(gradients, leaves, j, sign * step) for sign in (1, -1))
            along = ((ahead[i] - behind[i]) / 2e-6 * directions[i]).sum()
            torch.testing.assert_close((second * directions[j]).sum(), along, rtol=1e-4, atol=1e-6)


def moved(gradients: Callable[[list[Tensor]], tuple[Tensor, ...]], leaves: list[Tensor], which: int, by: Tensor) -> Any:
    return gradients([(x.detach() + by if n == which else x.detach()).requires_grad_() for n, x in enumerate(leaves)])
