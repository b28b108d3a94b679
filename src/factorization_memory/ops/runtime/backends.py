"""Backends of an operator and the choice among them, shared by all operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar


def _runs_everywhere(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One backend of an operator. `why_unsupported` and `pays` receive the `request` of `choose`: a tensor, then whatever the
    operator's choice depends on.

    Attributes:
        name: its public name.
        forward: the operator over whole sequences.
        family: public name of a group of backends, of which `choose` picks one; "" for none.
        needs_gpu: whether "auto" skips it for a tensor that is not on a GPU.
        why_unsupported: why it cannot run here; None if it can.
        pays: whether it beats the backends after it; ignored if it is requested by name.
    """

    name: str
    forward: Callable[..., Any]
    family: str = ""
    needs_gpu: bool = False
    why_unsupported: Callable[..., str | None] = _runs_everywhere
    pays: Callable[..., bool] = lambda *_: True


AnyBackend = TypeVar("AnyBackend", bound=Backend)


def backend_names(backends: Sequence[Backend]) -> tuple[str, ...]:
    """Names that users may request, the plainest backend first."""
    return tuple(dict.fromkeys(("auto", *(name for one in reversed(backends) for name in (one.family, one.name) if name))))


def choose(backends: Sequence[AnyBackend], name: str, *request: Any) -> AnyBackend:
    """Picks the backend: the one of that name; for "auto" or a family, the first that pays and can run.

    Args:
        backends: backends of one operator, fastest first. One of them runs everywhere.
        name: the requested name.
        request: a tensor, and whatever else the backends' functions accept.

    Raises:
        ValueError: an unknown name, or a backend that cannot run here; the message says why, and what can.
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
