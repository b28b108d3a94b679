"""Batched generation on token ids: requests are admitted to slots, step together, and are released.

The slots share one pooled state of fixed size, so on a GPU a single CUDA graph serves all requests as they come and go.
`generate` adds text on top.

Shapes: S slots, T tokens, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from factorization_memory.generation.pool import StatePool, slot_bytes
from factorization_memory.generation.prefill import prefill_batch
from factorization_memory.generation.requests import Prefilled, Request, check_request, token_ids
from factorization_memory.generation.slot_sampling import SlotSampler
from factorization_memory.layers.calling import device_of
from factorization_memory.models.capacity import require_room

if TYPE_CHECKING:
    from factorization_memory.models import LanguageModel


class LogitsError(ValueError):
    """Logits of some slots are NaN or infinite.

    Attributes:
        slots: the slots affected. Once they are released, the others continue unaffected.
    """

    def __init__(self, message: str, slots: list[int]) -> None:
        super().__init__(message)
        self.slots = slots


@dataclass
class _Running:
    """A request running in a slot."""

    length: int
    """Number of tokens, prompt included."""
    logits: Tensor | None
    """Logits `[V]` after the prompt, until the first token is drawn from them."""
    unread: bool = False
    """Whether the model has yet to read the last token drawn."""


class Engine:
    """Continues prompts in a fixed number of slots, one token per step each; requests may come and go between steps.

    A request's tokens do not depend on other requests, on when it is admitted, or on its slot (except for rounding, which may
    vary with the number of slots and with the prompts read together). Free slots are computed too, so use few on a CPU. Not
    thread-safe.

    Args:
        model: in evaluation mode.
        slots: S, the number of requests that can run at once. Their state is allocated (and on a GPU the step captured) by the
            first step that needs it.
        prefill_chunk: prompt tokens per forward pass; None means `default_chunk`.

    Raises:
        ValueError: an argument out of range, or more slots than the machine can hold.

    Example:
        >>> engine = Engine(model, slots=8)
        >>> (slot,) = engine.admit([Request([72, 105])])
        >>> tokens = [engine.step()[slot] for _ in range(20)]
        >>> engine.release(slot)
    """

    @torch.inference_mode(False)
    def __init__(self, model: LanguageModel, slots: int, prefill_chunk: int | None = None) -> None:
        for name, value in (("slots", slots), ("prefill_chunk", prefill_chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: use 1 or more")
        device = device_of(model)
        require_room(f"slots={slots}: {slots:,} sequences at once", slots * slot_bytes(model), "use fewer", device)
        self.model, self.prefill_chunk = model, prefill_chunk
        self._running: dict[int, _Running] = {}  # by slot
        self._pool = StatePool(model, slots)
        self._sampler = SlotSampler(slots, model.config.vocab_size, device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)  # the last ones drawn
        self._logits: Tensor | None = None  # [S, V], until tokens are drawn from them

    @property
    def slots(self) -> int:
        """S, the number of requests that can run at once."""
        return self._pool.slots

    @property
    def running(self) -> list[int]:
        """Slots with a request."""
        return sorted(self._running)

    @property
    def free(self) -> list[int]:
        """Slots without one."""
        return [slot for slot in range(self.slots) if slot not in self._running]

    @property
    def capture_seconds(self) -> float:
        """On a GPU, time spent capturing CUDA graphs of the step so far."""
        return self._pool.capture_seconds

    @torch.inference_mode(False)
    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Prefilled]:
        """Read prompts, packed, for requests to continue from. Needs no slot.

        Raises:
            ValueError: a prompt is empty or has an id outside the model's vocabulary.
        """
        return self._prefill([token_ids(f"prompts[{i}]", prompt, self.model) for i, prompt in enumerate(prompts)])

    @torch.inference_mode(False)
    def admit(self, requests: Sequence[Request]) -> list[int]:
        """Read the prompts that are not yet prefilled, packed, and give each request a slot.

        Returns:
            The slots, in the order of the requests.

        Raises:
            ValueError: too few slots are free, or a request is invalid. No request is then admitted.
        """
        free = self.free
        if len(requests) > len(free):
            raise ValueError(
                f"requests: got {len(requests)}, and {len(free)} of {self.slots} slots are free; release some, or admit fewer"
            )
        ids = []
        for number, request in enumerate(requests):
            check_request(f"requests[{number}]", request, self.model)
            if not isinstance(request.prompt, Prefilled):
                ids.append(token_ids(f"requests[{number}].prompt", request.prompt, self.model))
        read = iter(self._prefill(ids))
        prompts = [request.prompt if isinstance(request.prompt, Prefilled) else next(read) for request in requests]
        slots = free[: len(requests)]
        for slot, request, prompt in zip(slots, requests, prompts, strict=True):
            self._sampler.begin(slot, request, prompt.tokens)
            self._pool.put(slot, prompt.state, prompt.row)
            self._running[slot] = _Running(len(prompt.tokens), prompt.logits)
        return slots

    def release(self, slot: int) -> None:
        """End the request in this slot and free the slot.

        Raises:
            ValueError: no request is running in it.
        """
        if slot not in self._running:
            raise ValueError(f"slot={slot!r}: no request runs in it; the running slots are {self.running}")
        del self._running[slot]
        self._pool.remove(slot)
        self._sampler.end(slot)

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """Draw the next token of every request; returns them by slot.

        Raises:
            LogitsError: logits are NaN or infinite. No token is drawn; release the slots it names to continue.
        """
        if not self._running:
            return {}
        self._logits = self._next_logits()
        draw = self._sampler.draw(self._logits)
        # Read together: each transfer waits for the device.
        tokens, finite = torch.stack([draw.tokens, draw.finite.to(draw.tokens.dtype)]).tolist()
        self._require_finite([slot for slot, fine in zip(draw.slots, finite, strict=True) if not fine])
        self._sampler.accept(draw)
        self._tokens, self._logits = self._tokens.index_copy(0, draw.index, draw.tokens), None
        for one in self._running.values():
            one.length, one.logits, one.unread = one.length + 1, None, True
        return dict(sorted(zip(draw.slots, tokens, strict=True)))

    def worth_compacting(self) -> bool:
        """Whether few enough slots are in use for `compact` to pay off: on a GPU it costs another capture."""
        return self._pool.worth_compacting()

    @torch.inference_mode(False)
    def compact(self) -> list[int]:
        """Permanently drop the free slots: the requests move to slots 0, 1, ... in order. At least one slot is kept.

        Returns:
            For each remaining slot, its previous number.
        """
        kept = self.running or [0]
        if len(kept) < self.slots:
            self._pool.compact(kept)
            self._sampler.compact(kept)
            self._tokens = self._tokens[kept]
            self._logits = None if self._logits is None else self._logits[kept]
            self._running = {new: self._running[old] for new, old in enumerate(kept) if old in self._running}
        return kept

    def _prefill(self, ids: list[Tensor]) -> list[Prefilled]:
        if not ids:
            return []
        logits, state = prefill_batch(self.model, ids, self.prefill_chunk)
        return [Prefilled(self.model, tokens, logits[row], state, row) for row, tokens in enumerate(ids)]

    def _next_logits(self) -> Tensor:
        """Logits of the next token of each slot, `[S, V]`; arbitrary for free slots."""
        logits = self._logits
        reading = [slot for slot, one in self._running.items() if one.unread]
        if reading:
            logits = self._pool.step(self._tokens, reading)
            for slot in reading:
                self._running[slot].unread = False
        new = {slot: one.logits for slot, one in sorted(self._running.items()) if one.logits is not None}
        if not new:
            assert logits is not None, "every request has logits of its prompt, an unread token, or logits not drawn from"
            return logits
        rows = torch.stack(list(new.values()))
        if len(rows) == self.slots:
            return rows
        if logits is None:
            logits = rows.new_zeros(self.slots, rows.shape[1])
        return logits.index_copy(0, torch.tensor(list(new), device=rows.device), rows.to(logits.dtype))

    def _require_finite(self, broken: list[int]) -> None:
        if broken:
            raise LogitsError(
                f"model: its logits are NaN or infinite after {self._running[broken[0]].length} tokens; its weights are "
                f"damaged, or too large for {next(self.model.parameters()).dtype}: use float32, or an earlier checkpoint",
                broken,
            )
