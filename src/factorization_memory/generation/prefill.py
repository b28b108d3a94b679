"""Prefill: prompts of any lengths are packed and cut into chunks, one forward pass each.

Shapes: N prompts, T tokens, V vocabulary size.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from factorization_memory.models import LanguageModel, ModelState


def default_chunk(device: torch.device) -> int:
    """Prompt tokens per chunk: enough to fill a GPU, few enough for the caches of a CPU."""
    return 16384 if device.type == "cuda" else 1024


def prefill(model: LanguageModel, tokens: Tensor, chunk: int | None = None) -> tuple[Tensor, ModelState]:
    """Logits [1, V] after the last of `tokens` (int64 [T], T >= 1) and the state of one row; `chunk` tokens per forward."""
    return prefill_batch(model, [tokens], chunk)


@torch.no_grad()
def prefill_batch(model: LanguageModel, prompts: Sequence[Tensor], chunk: int | None = None) -> tuple[Tensor, ModelState]:
    """Logits [N, V] after the last token of each of N prompts, and the state of N rows.

    The prompts are packed and cut every `chunk` tokens (None means `default_chunk`): every forward pass but the last is full,
    and a prompt that is cut continues from its state in the next one.

    Args:
        model: in evaluation mode.
        prompts: int64 [T] each, T >= 1.
        chunk: tokens per forward pass.
    """
    device = prompts[0].device
    packed = torch.cat(list(prompts))
    borders = [0, *accumulate(len(prompt) for prompt in prompts)]
    chunk = chunk or default_chunk(device)
    last_logits: list[Tensor] = []
    final: ModelState | None = None
    carried: ModelState | None = None
    for start in range(0, borders[-1], chunk):
        stop = min(start + chunk, borders[-1])
        # Prompts with tokens in this piece: `first` up to but excluding `end`. The last may be cut.
        first, end = bisect_right(borders, start) - 1, bisect_left(borders, stop)
        whole = end if borders[end] == stop else end - 1
        cu_seqlens = None
        if end - first > 1:  # a single sequence needs no boundaries, and is cheaper without
            cuts = [0, *(border - start for border in borders[first + 1 : end]), stop - start]
            cu_seqlens = torch.tensor(cuts, dtype=torch.int32, device=device)
            carried = None if carried is None else carried.place([0], end - first)
        logits, state = model(packed[None, start:stop], state=carried, cu_seqlens=cu_seqlens, last_only=True)
        last_logits.append(logits[0, : whole - first])
        carried = None if whole == end else state if end - first == 1 else state.select([whole - first])
        if first == 0 and whole == len(prompts):
            final = state
        elif whole > first:
            # Copy into one state of all prompts, so that none is stored twice.
            final = model.initial_state(len(prompts)) if final is None else final
            # Slices (views) leave out the last prompt if it is cut.
            final.load(state.apply(lambda tensor, ended=whole - first: tensor[:ended]), list(range(first, whole)))
    assert final is not None, "there is no prompt without tokens"
    return torch.cat(last_logits), final
