"""The forms in which an operator can be computed, and the choice among them: the same for every operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar


def _runs_everywhere(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One form of an operator. Its functions are called with what `choose` is given: a tensor, then whatever the choice of
    that operator depends on.

    Attributes:
        name: what users call it.
        forward: the operator over whole sequences.
        family: name by which users leave it to us which of several is taken; "" for none.
        needs_gpu: whether "auto" passes it by for a tensor that is not on a GPU.
        why_unsupported: why it cannot compute here, or None.
        pays: whether it is worth taking before those after it, where it is not asked for by its own name.
    """

    name: str
    forward: Callable[..., Any]
    family: str = ""
    needs_gpu: bool = False
    why_unsupported: Callable[..., str | None] = _runs_everywhere
    pays: Callable[..., bool] = lambda *_: True


AnyBackend = TypeVar("AnyBackend", bound=Backend)


def backend_names(backends: Sequence[Backend]) -> tuple[str, ...]:
    """Names that users may ask for, the plainest form first."""
    return tuple(dict.fromkeys(("auto", *(name for one in reversed(backends) for name in (one.family, one.name) if name))))


def choose(backends: Sequence[AnyBackend], name: str, *request: Any) -> AnyBackend:
    """The backend that computes: the one of that name, or for "auto" and the name of a family the first that pays and can run.

    Args:
        backends: forms of one operator, the fastest first. One of them runs everywhere.
        name: what the user asked for.
        request: a tensor, and whatever else the functions of the backends take.

    Raises:
        ValueError: an unknown name, or a backend that cannot run here; says why and what can.
    """
    asked = [one for one in backends if name in ("auto", one.name, one.family or one.name)]
    if not asked:
        raise ValueError(f"backend={name!r}: use one of {', '.join(backend_names(backends))}")
    reason = None
    for one in asked:
        if name == "auto" and one.needs_gpu and not request[0].is_cuda:
            continue
        if len(asked) > 1 and not one.pays(*request):
            continue
        reason = one.why_unsupported(*request)
        if reason is None:
            return one
    everywhere = next(one.name for one in backends if one.why_unsupported is _runs_everywhere)
    raise ValueError(f"backend={name!r}: {reason}; use 'auto', or {everywhere!r}, which runs everywhere")
