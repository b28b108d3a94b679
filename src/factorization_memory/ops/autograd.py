"""Double backward through hand-written gradients raises an error.

PyTorch's own `once_differentiable` attaches the error to copies that `torch.autograd.grad(first, inputs)` never visits, so that
the result silently lacks the terms that go through the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Backward = TypeVar("Backward", bound=Callable[..., Any])


def once_differentiable(backward: Backward) -> Backward:
    """Makes differentiating the results of an autograd function's `backward(ctx, gradient, ...)` an error, whether with
    respect to the incoming gradients or the saved tensors. All inputs that the gradients depend on must be saved, or an
    output.

    Raises:
        RuntimeError: when a second derivative is computed through the function.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # no graph of backward is recorded
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        several = results if isinstance(results, tuple) else (results,)
        refused = _refuse(several, (*gradients, *ctx.saved_tensors))
        return refused if isinstance(results, tuple) else refused[0]

    return cast(Backward, wrapped)


def call_once_differentiable(
    function: Callable[..., tuple[Tensor | None, ...]], *arguments: Tensor | None
) -> tuple[Tensor | None, ...]:
    """`function(*arguments)` of another package, whose double backward may be silently wrong, with the same error."""
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in arguments):
        return function(*arguments)
    gradients: list[Tensor | None] = []
    entered = _Enter.apply(gradients, *arguments)
    return cast(tuple[Tensor | None, ...], _Leave.apply(gradients, *function(*entered)))


@contextmanager
def recording() -> Iterator[None]:
    """Context in which autograd records also inside an operator, where it is off if a mode, such as PyTorch's counter of FLOPs,
    watches the operator."""
    keys = torch._C.DispatchKey
    with (
        torch.enable_grad(),
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
    ):
        yield


def _refuse(results: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """`results`; differentiating them with respect to any of `sources` raises."""
    differentiable = [x for x in sources if x is not None and x.requires_grad]
    if not differentiable:
        return results
    refused = iter(_Refused.apply([x for x in results if x is not None], *differentiable))
    return tuple(None if x is None else next(refused) for x in results)


class _Refused(torch.autograd.Function):
    """Copies of tensors that depend on others in the graph, but whose backward raises."""

    @staticmethod
    def forward(ctx: Any, results: list[Tensor], *sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(
            "second derivative through a function whose gradient is once_differentiable; take the "
            "difference of two gradients instead"
        )


class _Enter(torch.autograd.Function):
    """Identity on the arguments of a function whose results pass through `_Leave`; `gradients` are those of the results."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *arguments: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.gradients = gradients
        ctx.save_for_backward(*arguments)
        return tuple(None if x is None else x.view_as(x) for x in arguments)

    @staticmethod
    def backward(ctx: Any, *found: Tensor | None) -> tuple[Tensor | None, ...]:
        sources = (*ctx.gradients, *ctx.saved_tensors) if torch.is_grad_enabled() else ()
        ctx.gradients.clear()
        return None, *_refuse(found, sources)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *results: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(None if x is None else x.view_as(x) for x in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.gradients[:] = gradients
        return None, *gradients


def written(*tensors: Tensor) -> None:
    """Tells autograd that these tensors were changed in place behind its back, through NumPy: a backward pass that needs their
    old values then raises its error instead of using the new ones."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])
