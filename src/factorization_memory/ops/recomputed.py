"""Operators of `torch.compile` and `torch.export` for what a graph cannot hold, such as a loop over chunks whose number depends
on the length: a graph with such an operator serves any length. Backward recomputes forward and differentiates it by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from factorization_memory.ops.autograd import once_differentiable, recording
from factorization_memory.ops.precision import state_dtype

Shape = tuple[int, ...]


def recomputed_operator(
    name: str,
    tensors: Sequence[str],
    options: Sequence[str],
    run: Callable[..., tuple[Tensor, Tensor | None]],
    value: str,
    state_shape: Callable[..., Shape],
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Registers a recurrence over whole sequences as an operator.

    Args:
        name: of the operator; that of its gradient is `name_backward`.
        tensors: names of its tensors, with a question mark behind those that may be None. Gradients flow to those of floating
            point.
        options: types and names of its other arguments, such as "float scale", but for `keep_final`, which is the last.
        run: called with the tensors, the options and `keep_final`; returns y and, with `keep_final`, the final state, in the
            `state_dtype` of y.
        value: the tensor whose shape and dtype y has.
        state_shape: called with the tensors and options; returns the shape of the final state.

    Returns:
        The operator, called like `run`. Double backward raises an error.
    """
    count, like = len(tensors), list(tensors).index(value)
    shared = ", ".join(f"Tensor{'?' * one.endswith('?')} {one.removesuffix('?')}" for one in tensors)
    more = "".join(f", {one}" for one in options)

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y, final = run(*arguments)
        return y.contiguous(), y.new_empty(0, dtype=state_dtype(y)) if final is None else final.contiguous()

    def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        y = arguments[like]
        shape = state_shape(*arguments[:-1]) if arguments[-1] else (0,)
        return y.new_empty(y.shape), y.new_empty(shape, dtype=state_dtype(y))

    def backward(d_output: Tensor, d_final: Tensor | None, *arguments: Any) -> list[Tensor]:
        given = [x.detach().requires_grad_() if _differentiable(x) else x for x in arguments[:count]]
        with recording():
            y, final = run(*given, *arguments[count:], d_final is not None)
        outputs, gradients = ([y], [d_output]) if final is None or d_final is None else ([y, final], [d_output, d_final])
        leaves = [x for x in given if _differentiable(x)]
        return [x.contiguous() for x in torch.autograd.grad(outputs, leaves, gradients, materialize_grads=True)]

    def fake_backward(d_output: Tensor, d_final: Tensor | None, *arguments: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in arguments[:count] if _differentiable(x)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:count])
        *ctx.options, ctx.keep_final = inputs[count:]
        ctx.set_materialize_grads(False)

    @once_differentiable
    def gradients(ctx: Any, d_output: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        d_output = torch.zeros_like(given[like]) if d_output is None else d_output
        found = iter(of_gradient(d_output, d_final if ctx.keep_final else None, *given, *ctx.options))
        return *(next(found) if _differentiable(x) else None for x in given), *[None] * (len(ctx.options) + 1)

    whole_name = f"factorization_memory::{name}"
    torch.library.define(whole_name, f"({shared}{more}, bool keep_final) -> (Tensor, Tensor)")
    torch.library.define(f"{whole_name}_backward", f"(Tensor d_output, Tensor? d_final, {shared}{more}) -> Tensor[]")
    torch.library.impl(whole_name, "default", forward)
    torch.library.impl(f"{whole_name}_backward", "default", backward)
    torch.library.register_fake(whole_name, fake_forward)
    torch.library.register_fake(f"{whole_name}_backward", fake_backward)
    torch.library.register_autograd(whole_name, gradients, setup_context=setup_context)
    operator, of_gradient = (getattr(torch.ops.factorization_memory, one).default for one in (name, f"{name}_backward"))

    def call(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        y, final = operator(*arguments)
        return y, final if arguments[-1] else None

    return call


def _differentiable(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()
