"""Forward and backward passes of one optimizer step: gradient accumulation and the memory carried between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from factorization_memory.data.loader import Batch
    from factorization_memory.models import LanguageModel, ModelState


@dataclass(frozen=True)
class Gradient:
    """Results of a step's passes besides the parameters' gradients."""

    losses: list[Tensor]
    """Mean loss of each micro-batch that has targets, in nats per token; scalars on the model's device."""
    targets: list[int]
    """Number of targets of each of these micro-batches."""
    windows: list[list[str]]
    """Names of the rows of each."""
    carried: list[ModelState | None] | None
    """Detached memory after each micro-batch, or None if nothing is carried."""


def accumulate_gradient(
    model: LanguageModel,
    batches: Sequence[Batch],
    carried: Sequence[ModelState | None] | None,
    autocast: torch.autocast,
    device: torch.device,
    compiled: Callable[..., Any] | None = None,
) -> Gradient:
    """Adds the gradient of the mean loss over all targets of `batches` to the parameters' gradients.

    Micro-batches are weighted by their number of targets, so that any split of the rows gives the same gradient up to rounding.
    `carried` is the memory before each micro-batch (None for the initial state), or None if each step starts from the initial
    state. `compiled` replaces the model if no sequences are packed and no memory is carried; otherwise the borders, and so the
    graphs, would differ from step to step.
    """
    counts = [int((batch.targets >= 0).sum()) for batch in batches]
    total = sum(counts)
    if total == 0:
        raise ValueError(f"batch rows {', '.join(batches[0].windows)}: no token has a next token to predict")
    losses: list[Tensor] = []
    targets: list[int] = []
    windows: list[list[str]] = []
    finals: list[ModelState | None] = []
    for index, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        state = None if carried is None else initial_state(carried[index], batch)
        loss_of = model if compiled is None or batch.cu_seqlens is not None or carried is not None else compiled
        with autocast:
            loss, final = loss_of(
                batch.tokens.to(device),
                batch.targets.to(device),
                state=state,
                cu_seqlens=None if batch.cu_seqlens is None else batch.cu_seqlens.to(device),
                keep_state=carried is not None,
            )
        (loss * (count / total)).backward()
        if count:
            losses.append(loss.detach())
            targets.append(count)
            windows.append(batch.windows)
        if final is not None:
            finals.append(final_state(final, batch))
    return Gradient(losses, targets, windows, None if carried is None else finals)


def initial_state(carried: ModelState | None, batch: Batch) -> ModelState | None:
    """The memory that `batch` starts from: `carried`, one per row, reset where a row starts a new text.

    For packed sequences, each row's memory goes to the first sequence of the row; the others start from the initial state.
    """
    if carried is None or bool(batch.reset.all()):
        return None
    state = carried.reset(batch.reset) if bool(batch.reset.any()) else carried
    if batch.cu_seqlens is None:
        return state
    assert batch.row_starts is not None
    return state.place(batch.row_starts, len(batch.cu_seqlens) - 1)


def final_state(final: ModelState, batch: Batch) -> ModelState:
    """The detached memory after each row of `batch`; for packed sequences, that of each row's last."""
    final = final.detach()
    if batch.cu_seqlens is None:
        return final
    assert batch.row_starts is not None
    sequences = len(batch.cu_seqlens) - 1
    last = torch.cat([batch.row_starts[1:], batch.row_starts.new_tensor([sequences])]) - 1
    return final.select(last)


def clip_gradient(parameters: Sequence[nn.Parameter], clip_norm: float) -> Tensor:
    """Clips the gradients to global norm `clip_norm` (0 disables clipping); returns the norm before, a scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if clip_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm
