"""Loss by position: how prediction improves or degrades as the memory reads far beyond the training context.

Each stretch of text is read from its beginning with the state carried from segment to segment, in memory that does not grow
with the position. The same tokens are also scored with the memory restarted every `context_length` tokens, as in training.
Different positions have different text, so the curve over positions alone says little; the paired difference of the two on
the same tokens (`gain`) measures what the long memory contributes there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from factorization_memory.evaluation.loss import IGNORED, evaluating, token_lengths

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel
    from factorization_memory.runs.evaluation_record import PositionBin, PositionLoss, StretchLoss


def position_edges(context_length: int, max_position: int) -> np.ndarray:
    """Edges of the position bins, int64: 1, powers of sqrt(2) times the training context (from 1/32 of it), `max_position`.

    Every power of two of the context is an edge, so no bin mixes positions within the training context with those beyond.
    """
    steps = np.arange(-10, 2 * math.ceil(math.log2(max(max_position / context_length, 1))) + 1)
    edges = np.rint(context_length * 2.0 ** (steps / 2)).astype(np.int64)
    # An edge just below the last one would leave a bin of a single position.
    return np.unique(np.concatenate([[1], edges[(edges > 1) & (edges < max_position - 1)], [max_position]]))


def reading_stretches(tokens: np.ndarray, document_starts: np.ndarray, *, max_position: int, count: int) -> list[np.ndarray]:
    """About `count` stretches of at most `max_position + 1` tokens to evaluate by position, none crossing a document's end.

    The longest documents are read from their beginnings. If there are fewer documents than `count`, more stretches start
    inside them, evenly spaced as far as a whole stretch fits (in shorter documents, up to the middle). These overlap, so their
    tokens appear at several positions, and standard errors that assume independence are too small.
    """
    lengths = np.diff(document_starts)
    longest = [int(i) for i in np.argsort(-lengths, kind="stable")[:count] if lengths[i] >= 2]
    stretches: list[np.ndarray] = []
    for rank, document in enumerate(longest):
        begin, end = int(document_starts[document]), int(document_starts[document + 1])
        share = count // len(longest) + (rank < count % len(longest))
        last = max(end - begin - max_position - 1, (end - begin) // 2)
        # Starts closer together than this add work, but hardly any evidence.
        share = min(share, 1 + last // 64)
        for start in np.linspace(begin, begin + last, share).astype(np.int64):
            stretches.append(tokens[start : min(start + max_position + 1, end)])
    return stretches


def loss_by_position(
    model: LanguageModel,
    stretches: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    *,
    context_length: int,
    max_position: int = 131072,
    segment: int = 1024,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> PositionLoss:
    """Loss of text tokens by the number of tokens read before, in log-spaced bins, with memory carried and restarted.

    Args:
        stretches: 1-D token arrays, each read from its first token with empty memory (see `reading_stretches`).
        context_length: the training context; the restarted pass empties the memory this often, and it is a bin edge.
        max_position: tokens beyond this position are not read.
        segment: tokens per forward pass; the state is carried from one segment to the next.
        batch_size: stretches read in lockstep.
        progress: called with (tokens read, tokens to read), counting both passes.

    Returns `context_length`, `max_position` (the last one reached), `stretches`, `tokens`, and `bins`, a list with, for
    positions `start <= position < end`: `tokens`, `bytes`, `loss` and `restarted_loss` (nats per token), `loss_error`,
    `bits_per_byte`, `restarted_bits_per_byte`, `gain` (restarted minus carried loss of the same tokens), `gain_error` and
    `gain_stretch_error`. Errors are standard errors that treat tokens as independent; `gain_stretch_error` treats only
    stretches as independent, allowing for correlation within a stretch (None if only one stretch reaches the bin). Special
    tokens are read but not scored. Raises ValueError if there is nothing to score.
    """
    for name, value in (("context_length", context_length), ("max_position", max_position), ("segment", segment)):
        if value < 1:
            raise ValueError(f"{name}={value}: use 1 or more")
    text_length = token_lengths(tokenizer)
    edges = position_edges(context_length, max_position + 1)
    sums = np.zeros((len(edges) - 1, 7))
    gains_of_stretches: list[np.ndarray] = []  # for each, tokens and summed gain by bin, [bins, 2]
    ordered = sorted((s[: max_position + 1] for s in stretches if len(s) >= 2), key=len, reverse=True)
    total, done, reached = 2 * sum(len(s) - 1 for s in ordered), 0, 0

    def report(read: int) -> None:
        nonlocal done
        done += read
        if progress is not None:
            progress(done, total)

    with evaluating(model) as device:
        for first in range(0, len(ordered), batch_size):
            group = [np.asarray(s, dtype=np.int64) for s in ordered[first : first + batch_size]]
            carried = _read(model, group, segment, True, text_length, device, report)
            restarted = _read(model, group, context_length, False, text_length, device, report)
            for stretch, with_memory, without in zip(group, carried, restarted, strict=True):
                lengths = text_length[stretch[1:]]
                position = np.flatnonzero(lengths) + 1
                if not position.size:
                    continue
                reached = max(reached, int(position[-1]))
                loss, other = with_memory[position - 1], without[position - 1]
                gain = other - loss
                columns = (np.ones_like(loss), lengths[position - 1], loss, loss**2, other, gain, gain**2)
                bin_of = np.searchsorted(edges, position, side="right") - 1
                own = np.stack([np.bincount(bin_of, weights=values, minlength=len(sums)) for values in columns], axis=1)
                sums += own
                gains_of_stretches.append(own[:, [0, 5]])
    if not reached:
        raise ValueError(f"stretches: none of {len(stretches)} has a token to score; give documents of at least two tokens")
    gains = np.stack(gains_of_stretches, axis=1)
    bins: list[PositionBin] = [
        {"start": int(start), "end": int(end), **_summary(row), "gain_stretch_error": _error_of_ratio(own[own[:, 0] > 0])}
        for start, end, row, own in zip(edges[:-1], edges[1:], sums, gains, strict=True)
        if row[0]
    ]
    return {
        "context_length": context_length,
        "max_position": reached,
        "stretches": len(ordered),
        "tokens": int(sums[:, 0].sum()),
        "bins": bins,
    }


def beyond_context(result: PositionLoss, multiple: int = 16) -> PositionBin | None:
    """One bin of `loss_by_position` results for positions from half of `multiple` training contexts to `multiple` of them.

    Has the fields of a bin except `gain_stretch_error`; with a power of two as `multiple`, the limits are bin edges. None if
    no tokens are at such positions.
    """
    low, high = result["context_length"] * multiple // 2, result["context_length"] * multiple
    bins = [b for b in result["bins"] if b["start"] >= low and b["end"] <= high + 1]
    if not bins:
        return None
    row = np.zeros(7)
    for b in bins:
        n = b["tokens"]
        means = ((b["loss"], b["loss_error"]), (b["gain"], b["gain_error"]))
        squares = [(error**2 * max(n - 1, 1) + mean**2) * n for mean, error in means]
        row += [n, b["bytes"], b["loss"] * n, squares[0], b["restarted_loss"] * n, b["gain"] * n, squares[1]]
    return {"start": bins[0]["start"], "end": bins[-1]["end"], **_summary(row)}


def _read(
    model: LanguageModel,
    group: list[np.ndarray],
    segment: int,
    carry: bool,
    text_length: np.ndarray,
    device: torch.device,
    report: Callable[[int], None],
) -> list[np.ndarray]:
    """Loss of every target of each stretch (longest first), float64 [length - 1]; the memory is carried or restarted at
    every segment."""
    losses = [np.zeros(len(stretch) - 1) for stretch in group]
    state = None
    alive = len(group)
    for start in range(0, len(group[0]) - 1, segment):
        still = sum(len(stretch) - 1 > start for stretch in group)
        if carry and state is not None and still < alive:
            state = state.select(list(range(still)))
        alive = still
        width = min(segment, len(group[0]) - 1 - start)
        inputs = np.zeros((alive, width), dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        for row, stretch in enumerate(group[:alive]):
            piece = stretch[start : start + width + 1]
            inputs[row, : len(piece) - 1] = piece[:-1]
            targets[row, : len(piece) - 1] = np.where(text_length[piece[1:]] > 0, piece[1:], IGNORED)
        out, state = model(
            torch.from_numpy(inputs).to(device),
            torch.from_numpy(targets).to(device),
            state=state if carry else None,
            reduction="none",
        )
        values = out.double().cpu().numpy()
        for row in range(alive):
            length = min(width, len(losses[row]) - start)
            losses[row][start : start + length] = values[row, :length]
            report(length)
    return losses


def _error_of_ratio(parts: np.ndarray) -> float | None:
    """Standard error of the mean per token from (tokens, sum) of each stretch [S, 2], treating stretches as independent."""
    if len(parts) < 2:
        return None
    tokens, total = parts.sum(axis=0)
    residuals = parts[:, 1] - total / tokens * parts[:, 0]
    return float(math.sqrt(len(parts) / (len(parts) - 1) * (residuals**2).sum()) / tokens)


def _summary(row: np.ndarray) -> StretchLoss:
    """One bin of the result, from its sums of: tokens, bytes, loss, loss squared, restarted loss, gain, gain squared."""
    tokens, text_bytes, loss, loss_squares, restarted, gain, gain_squares = (float(x) for x in row)

    def error(total: float, squares: float) -> float:
        return math.sqrt(max(squares / tokens - (total / tokens) ** 2, 0.0) / max(tokens - 1, 1.0))

    return {
        "tokens": int(tokens),
        "bytes": int(text_bytes),
        "loss": loss / tokens,
        "loss_error": error(loss, loss_squares),
        "bits_per_byte": loss / math.log(2) / text_bytes,
        "restarted_loss": restarted / tokens,
        "restarted_bits_per_byte": restarted / math.log(2) / text_bytes,
        "gain": gain / tokens,
        "gain_error": error(gain, gain_squares),
    }
