"""Held-out loss on a packed corpus: scores every text token of a split once, in windows that start from empty memory.

Each document is cut into windows of `context_length` predictions; every token of a document except the first is a target
exactly once. Special tokens such as "</s>" are not scored: loss, perplexity and bits per byte all cover the same tokens, and
bits per byte is comparable with byte models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from factorization_memory.evaluation.recall import distances, kinds
from factorization_memory.runs.recall_names import DISTANCES, KINDS, distance_ranges

if TYPE_CHECKING:
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel
    from factorization_memory.runs.evaluation_record import CorpusLoss, LossFigures, TextLoss

IGNORED = -100
"""Target at positions that are not scored."""


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """Puts the model in evaluation mode without gradients, and restores its mode afterwards; yields its device.

    Uses `no_grad`, not `inference_mode`: anything the model caches here must remain usable when training continues.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text per token id, int64 [V]; 0 for special tokens."""
    return np.fromiter(map(len, tokenizer.token_bytes), dtype=np.int64, count=len(tokenizer.token_bytes))


def summarize(nats: float, tokens: int, text_bytes: int) -> LossFigures:
    """Mean loss (nats per token), perplexity and bits per byte of `tokens` scored tokens, which cover `text_bytes` bytes."""
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / text_bytes,
        "tokens": tokens,
        "bytes": text_bytes,
    }


def evaluate_loss(
    model: LanguageModel,
    tokens: np.ndarray,
    document_starts: np.ndarray,
    tokenizer: Tokenizer,
    *,
    context_length: int,
    max_tokens: int | None = None,
    batch_size: int = 16,
    recall: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TextLoss:
    """Held-out loss of documents stored one after the other in `tokens`.

    Args:
        tokens: ids of all documents, [N]; may be memory-mapped.
        document_starts: index of each document's first token and, last, N: int64 [documents + 1].
        context_length: predictions per window; each window starts from empty memory.
        max_tokens: score about this many tokens, in windows spread evenly over the text; None scores all.
        batch_size: windows per forward pass.
        recall: whether to break the loss down by what the window contained before, see recall.py.
        progress: called with (tokens done, total tokens).

    Returns `loss` (nats per token), `perplexity`, `bits_per_byte`, `tokens`, `bytes`, and with `recall` a dict `recall` of the
    same for each kind of token that occurs; for repeated tokens, `by_distance` lists the same by distance, with `start` and
    `end` (None: open). Raises ValueError if no token can be scored.
    """
    for name, value in (("context_length", context_length), ("batch_size", batch_size), ("max_tokens", max_tokens or 1)):
        if value < 1:
            raise ValueError(f"{name}={value}: use 1 or more")
    starts, lengths = _windows(np.asarray(document_starts), context_length)
    if max_tokens is not None and lengths.sum() > max_tokens:
        kept = max(1, round(max_tokens * len(starts) / int(lengths.sum())))
        chosen = (np.arange(kept) + 0.5) * len(starts) / kept
        starts, lengths = starts[chosen.astype(np.int64)], lengths[chosen.astype(np.int64)]
    # Windows of similar length share a batch, so that padding costs little for short documents.
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    text_length = token_lengths(tokenizer)
    done = 0
    of_kind = np.zeros((len(KINDS) + 1, 3))  # nats, tokens, bytes; the last row is for tokens not scored
    at_distance = np.zeros((len(DISTANCES) + 1, 3))  # the same; the first row is for tokens not repeated
    with evaluating(model) as device:
        for first in range(0, len(starts), batch_size):
            rows = slice(first, first + batch_size)
            inputs, targets = _batch(tokens, starts[rows], lengths[rows], text_length)
            real = np.arange(inputs.shape[1]) < lengths[rows, None]
            losses, _ = model(
                torch.from_numpy(inputs).to(device),
                torch.from_numpy(targets).to(device),
                # Right padding does not change the loss, but observers of the routing must not count it as text.
                padding_mask=None if real.all() else torch.from_numpy(real).to(device),
                reduction="none",
                keep_state=False,
            )
            kind = np.where(targets == IGNORED, len(KINDS), 0)  # without recall, all in one row
            if recall:
                kind = np.stack([kinds(*row) for row in zip(inputs, targets, strict=True)])
                distance = np.stack([distances(*row) for row in zip(inputs, targets, strict=True)])
            scored = (losses.double().cpu().numpy(), np.ones(kind.shape), text_length[np.where(targets == IGNORED, 0, targets)])
            of_kind += _sums(kind, len(of_kind), scored)
            if recall:
                at_distance += _sums(np.searchsorted(DISTANCES, distance, side="right"), len(at_distance), scored)
            done += int(lengths[rows].sum())
            if progress is not None:
                progress(done, int(lengths.sum()))
    of_kind = of_kind[:-1]
    nats, count, size = of_kind.sum(0).tolist()
    if not count:
        raise ValueError(f"tokens: got {len(tokens)}, with none to score; give at least two")
    result: TextLoss = {**summarize(nats, int(count), int(size))}
    if recall:
        parts = zip(KINDS, of_kind.tolist(), strict=True)
        result["recall"] = {kind: {**summarize(nats, int(count), int(size))} for kind, (nats, count, size) in parts if count}
        if "repeated" in result["recall"]:
            result["recall"]["repeated"]["by_distance"] = [
                {"start": start, "end": end, **summarize(nats, int(count), int(size))}
                for (start, end), (nats, count, size) in zip(distance_ranges(), at_distance[1:].tolist(), strict=True)
                if count
            ]
    return result


def _sums(place: np.ndarray, places: int, figures: Sequence[np.ndarray]) -> np.ndarray:
    """Sums of each of `figures` over the tokens of each place, [places, figures]; all have the shape of `place`."""
    return np.stack([np.bincount(place.ravel(), each.ravel(), places) for each in figures], axis=1)


def evaluate_corpus(
    model: LanguageModel,
    corpus: PackedCorpus,
    *,
    split: str = "validation",
    context_length: int,
    max_tokens: int | None = None,
    batch_size: int = 16,
    recall: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> CorpusLoss:
    """`evaluate_loss` for each source of a packed corpus, and for all together.

    `max_tokens` applies to each source; `progress` is called with (source, tokens done, total tokens). Runs on the model's
    device, under the caller's autocast. Sources whose split has no text are omitted.

    Returns `{"sources": {name: {loss, perplexity, bits_per_byte, tokens, bytes}}, "total": {the same}}`; the total's bits per
    byte are all bits over all bytes. With `recall` also `{"recall": {name: {kind: {the same}}}}`. Raises ValueError if no
    source has text in the split.
    """
    sources: dict[str, TextLoss] = {}
    for name, source in corpus.sources.items():
        part = source.splits.get(split)
        if part is None or not has_text(part.document_starts):
            continue
        sources[name] = evaluate_loss(
            model,
            part.tokens,
            part.document_starts,
            corpus.tokenizer,
            context_length=context_length,
            max_tokens=max_tokens,
            batch_size=batch_size,
            recall=recall,
            progress=None if progress is None else partial(progress, name),
        )
    if not sources:
        raise ValueError(f"split={split!r}: no source of the corpus has text in it; pack it with a larger --holdout-fraction")
    parts = sources.values()
    tokens = int(sum(s["tokens"] for s in parts))
    nats = sum(s["loss"] * s["tokens"] for s in parts)
    total = summarize(nats, tokens, int(sum(s["bytes"] for s in parts)))
    result: CorpusLoss = {"sources": sources, "total": total}
    if recall:
        result["recall"] = {name: source.pop("recall") for name, source in sources.items()}
    return result


def has_text(document_starts: np.ndarray) -> bool:
    """Whether any document has a token to score, i.e. a first one, one predicted from it, and the end-of-document token."""
    return len(document_starts) > 1 and int(np.diff(document_starts).max()) >= 3


def _windows(document_starts: np.ndarray, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and number of predictions of each window, int64: documents cut every `context_length` predictions."""
    predictions = np.maximum(np.diff(document_starts) - 1, 0)
    windows = -(-predictions // context_length)
    document = np.repeat(np.arange(len(windows)), windows)
    offset = (np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)) * context_length
    return document_starts[:-1][document] + offset, np.minimum(predictions[document] - offset, context_length)


def _batch(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, text_length: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int64 [B, longest]; the targets of right padding and special tokens are `IGNORED`."""
    inputs = np.zeros((len(starts), int(lengths.max())), dtype=np.int64)
    targets = np.full_like(inputs, IGNORED)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        piece = np.asarray(tokens[start : start + length + 1], dtype=np.int64)
        inputs[row, :length] = piece[:-1]
        targets[row, :length] = np.where(text_length[piece[1:]] > 0, piece[1:], IGNORED)
    return inputs, targets
