"""Full evaluation of a trained model on the held-out text of a packed corpus: the contents of `evaluation.json`.

context_length   tokens of a training sequence, and of the windows used to measure the loss
sources          {name: {loss, perplexity, bits_per_byte, tokens, bytes}}: see loss.py
total            the same for all sources together
recall           {name: {kind: the same for tokens that the window could predict, or not}}: see recall.py; for repeated ones
                 also `by_distance`, a list
ngram            the baseline, for small corpora: {orders, training_bytes, sources: {name: {"3": bits per byte, ...}},
                 total: {...}}
position         {name: loss by position, see position.py, and "beyond": {"16": one bin for 8 to 16 training contexts, ...}}
recall_tasks     if requested: see recall_suite.py
routing          use of the memory states, a list per memory layer: see RoutingHealth.summary

and `evaluated`, which records what was evaluated and how: see experiments/evaluation.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from factorization_memory.evaluation.loss import evaluate_corpus, has_text
from factorization_memory.evaluation.ngram import NgramModel
from factorization_memory.evaluation.position import beyond_context, loss_by_position, reading_stretches
from factorization_memory.evaluation.recall_suite import LENGTHS, evaluate_recall, held_out_texts
from factorization_memory.models.routing import RoutingHealth

if TYPE_CHECKING:
    from factorization_memory.config import RunConfig
    from factorization_memory.data.shards import PackedCorpus, Split
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel
    from factorization_memory.runs.evaluation_record import EvaluationRecord, NgramFigures

NGRAM_BYTES = 1 << 23
"""Maximum bytes of training text for fitting an n-gram model: more would take too much memory and time for a baseline."""


def evaluate_run(
    model: LanguageModel,
    corpus: PackedCorpus,
    config: RunConfig,
    *,
    max_position: int | None = None,
    max_tokens: int | None = None,
    stretches: int = 8,
    batch_size: int = 16,
    ngram_orders: tuple[int, ...] = (3, 5),
    recall_items: int | None = None,
    recall_lengths: Sequence[int] = LENGTHS,
    progress: Callable[[str, int, int], None] | None = None,
) -> EvaluationRecord:
    """Evaluate a model on the validation split of every source.

    Args:
        max_position: last position of the loss by position; None means 16 training contexts, 0 skips it.
        max_tokens: tokens per source to measure the loss on; None means all.
        stretches: stretches of text per source for the loss by position.
        batch_size: windows per forward pass.
        ngram_orders: orders of the n-gram baselines, fitted if the training text has at most `NGRAM_BYTES`; () for none.
        recall_items: if given, run the recall suite too, with this many items.
        recall_lengths: tokens of its haystacks.
        progress: called with (current task, amount done, total amount).

    Returns the record described in the module docstring. Raises ValueError if no source has held-out text, or there is too
    little for the recall suite.
    """
    context_length = config.data.context_length
    health = RoutingHealth(model)
    with health.observe():
        losses = evaluate_corpus(
            model,
            corpus,
            context_length=context_length,
            max_tokens=max_tokens,
            batch_size=batch_size,
            recall=True,
            progress=None if progress is None else lambda name, done, total: progress(f"loss, {name}", done, total),
        )
    result: EvaluationRecord = {"context_length": context_length, **losses}
    yardstick = ngram_yardstick(corpus, ngram_orders)
    if yardstick is not None:
        result["ngram"] = yardstick
    farthest = 16 * context_length if max_position is None else max_position
    if farthest:
        result["position"] = {}
    for name in losses["sources"] if farthest else ():
        split = corpus.sources[name].splits["validation"]
        by_position = loss_by_position(
            model,
            reading_stretches(split.tokens, split.document_starts, max_position=farthest, count=stretches),
            corpus.tokenizer,
            context_length=context_length,
            max_position=farthest,
            batch_size=stretches,
            progress=None if progress is None else partial(progress, f"loss by position, {name}"),
        )
        multiples = [2**k for k in range(1, 30) if 2**k * context_length <= by_position["max_position"]]
        shown = [m for m in multiples if m in (2, 4, 16, 64, 256) or m == multiples[-1]]
        parts = {str(multiple): beyond_context(by_position, multiple) for multiple in shown}
        result["position"][name] = {**by_position, "beyond": {key: part for key, part in parts.items() if part is not None}}
    if recall_items is not None:
        texts = held_out_texts(corpus)
        result["recall_tasks"] = evaluate_recall(
            model, corpus.tokenizer, texts, items=recall_items, lengths=recall_lengths, batch_size=batch_size, progress=progress
        )
    result["routing"] = health.summary()
    return result


def ngram_yardstick(corpus: PackedCorpus, orders: tuple[int, ...]) -> NgramFigures | None:
    """Bits per byte of byte n-gram models fitted on the training text of all sources together; None if it is too large."""
    size = sum(source.splits["train"].text_bytes for source in corpus.sources.values())
    if not orders or not 0 < size <= NGRAM_BYTES:
        return None
    tokenizer = corpus.tokenizer
    training = [text for source in corpus.sources.values() for text in document_texts(source.splits["train"], tokenizer)]
    held_out = {
        name: document_texts(source.splits["validation"], tokenizer)
        for name, source in corpus.sources.items()
        if has_text(source.splits["validation"].document_starts)
    }
    sources: dict[str, dict[str, float]] = {name: {} for name in held_out}
    total: dict[str, float] = {}
    for order in orders:
        model = NgramModel(training, order)
        for name, texts in held_out.items():
            sources[name][str(order)] = model.bits_per_byte(texts)
        total[str(order)] = model.bits_per_byte([text for texts in held_out.values() for text in texts])
    return {"orders": list(orders), "training_bytes": sum(map(len, training)), "sources": sources, "total": total}


def document_texts(split: Split, tokenizer: Tokenizer) -> list[bytes]:
    """The text of each document of a split, in bytes."""
    pieces = np.array(tokenizer.token_bytes, dtype=object)
    starts = split.document_starts
    return [b"".join(pieces[split.tokens[a:b]]) for a, b in pairwise(starts)]
