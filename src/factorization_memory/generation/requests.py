"""Requests to the engine: a prompt, as token ids or already prefilled, and how to sample its continuation.

Shapes: T tokens, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from factorization_memory.generation.sampling import SamplingConfig
from factorization_memory.layers.calling import device_of

if TYPE_CHECKING:
    from factorization_memory.models import LanguageModel, ModelState


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A prompt that has been read (`Engine.prefill`). Any number of requests can continue it, each from its own copy of the
    state."""

    model: LanguageModel
    """The model that read it."""
    tokens: Tensor
    """The prompt, int64 `[T]`."""
    logits: Tensor
    """Logits after its last token, `[V]`."""
    state: ModelState
    """State of all prompts read together; never modified."""
    row: int
    """Row of this prompt in `state`."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue. The tokens drawn depend only on these fields and the model."""

    prompt: Sequence[int] | Prefilled
    """At least one token id; or a prefilled prompt."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the next token is chosen."""
    sample: int = 0
    """Which sample of the prompt this is: the random numbers are a function of (`sampling.seed`, `sample`)."""
    barred: Tensor | None = None
    """Tokens never drawn, bool `[V]` on the model's device. Requests that share the same tensor are sampled together."""


def token_ids(name: str, prompt: Sequence[int], model: LanguageModel) -> Tensor:
    """The prompt as int64 `[T]` on the model's device. Raises ValueError, under this name, for ids outside the model's
    vocabulary."""
    size = model.config.vocab_size
    if len(prompt) == 0:
        raise ValueError(f"{name}={prompt!r}: no token to start from; give at least one id")
    try:
        tokens = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        tokens = torch.empty(0)
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{name}: got {_short(prompt)}, takes token ids, integers from 0 to {size - 1}")
    outside = tokens[(tokens < 0) | (tokens >= size)]
    if len(outside):
        raise ValueError(f"{name}: contains the id {int(outside[0])}; use ids from 0 to {size - 1}")
    return tokens.to(device_of(model), torch.int64)


def check_request(name: str, request: Request, model: LanguageModel) -> None:
    """Raises ValueError, under this name, for an invalid request. `token_ids` checks the token ids of a prompt."""
    size, device, barred = model.config.vocab_size, device_of(model), request.barred
    if isinstance(request.prompt, Prefilled) and request.prompt.model is not model:
        raise ValueError(f"{name}.prompt: was prefilled by another model; prefill it with this engine")
    if not isinstance(request.sample, int) or request.sample < 0:
        raise ValueError(f"{name}.sample={request.sample!r}: use a sample number, 0 or more")
    if barred is None:
        return
    if barred.dtype != torch.bool or tuple(barred.shape) != (size,):
        raise ValueError(f"{name}.barred: got {barred.dtype} of shape {tuple(barred.shape)}, takes torch.bool of ({size},)")
    if barred.device != device:
        raise ValueError(f"{name}.barred: is on {barred.device}, the model on {device}; move it there")
    if barred.all():
        raise ValueError(f"{name}.barred: bars all {size} ids; leave at least one")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
