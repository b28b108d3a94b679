"""The recall suite: can a language model retrieve what its context contained?

version        of the items: figures of different versions are not comparable
items          haystacks per length and number of needles; four times as many sequences per number of pairs, twice as many
               copies per length
associative    keys and values, random tokens: the pairs once, then again in another order
               by_pairs      a list: pairs, and the figures of all queries
               by_distance   a list: pairs (only the largest number), start, end, and the figures of the queries whose key
                             occurred `start` to `end` - 1 tokens earlier
needle         {source: the number of a name, in sentences hidden in the source's text}: language and
               by_length     a list: length of the haystack in tokens, needles in it, and the figures
               by_needles    a list: needles, over all lengths
               by_depth      a list: start and end of the share of the haystack before the needle
               by_distance   a list: start, end of the tokens between needle and question
copy           {"random" or source: the second copy of a stretch of tokens}
               by_length     a list: length, sequences, tokens, accuracy, loss (nats per token), first_loss (of the first copy)
left_out       a list of sentences: what was skipped, and why

Figures of queries are: sequences, asked, chance; choice, the share whose correct answer is the likeliest candidate; exact,
the share that greedy decoding answers correctly. Standard errors (choice_error, exact_error, accuracy_error) treat sequences,
not queries, as independent, and are never below those of independent queries; None for a single sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from factorization_memory.evaluation.loss import evaluating, token_lengths
from factorization_memory.evaluation.recall_draws import VERSION, Split
from factorization_memory.evaluation.recall_figures import doubling, fifth_of, grouped, standard_error
from factorization_memory.evaluation.recall_needles import NUM_CANDIDATES, Haystack, haystack, language_of
from factorization_memory.evaluation.recall_reading import Reader
from factorization_memory.evaluation.recall_tasks import associations, copied, random_stretch, text_stretch

if TYPE_CHECKING:
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel
    from factorization_memory.runs.recall_record import AssociativeFigures, CopyFigures, CopyLength, NeedleFigures, RecallRecord

ITEMS = 4
LENGTHS = (256, 512, 1024, 2048, 4096)
NEEDLES = (1, 4, 16)
PAIRS = (4, 8, 16, 32, 64)
COPIES = (16, 64, 256)
MAX_TEXT_TOKENS = 1 << 20
"""Maximum held-out tokens per source used for haystacks."""


def held_out_texts(corpus: PackedCorpus, split: str = "validation") -> dict[str, np.ndarray]:
    """The text of each source of a packed corpus, without special tokens, its documents joined: int64 [at most
    `MAX_TEXT_TOKENS`]."""
    lengths = token_lengths(corpus.tokenizer)
    found = {}
    for name, source in corpus.sources.items():
        tokens = np.asarray(source.splits[split].tokens[:MAX_TEXT_TOKENS] if split in source.splits else [], dtype=np.int64)
        found[name] = tokens[lengths[tokens] > 0]
    return found


def evaluate_recall(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Mapping[str, np.ndarray],
    *,
    items: int = ITEMS,
    lengths: Sequence[int] = LENGTHS,
    needles: Sequence[int] = NEEDLES,
    pairs: Sequence[int] = PAIRS,
    copies: Sequence[int] = COPIES,
    split: Split = "test",
    segment: int = 1024,
    batch_size: int = 16,
    progress: Callable[[str, int, int], None] | None = None,
) -> RecallRecord:
    """Asks a model items 0, 1, ... of each task; returns the record described in the module docstring.

    Args:
        texts: the text of each source without special tokens, int64 [N] (see `held_out_texts`).
        items: haystacks per length and number of needles, every needle being asked for; 4 * items sequences of pairs,
            2 * items copies.
        lengths: tokens per haystack.
        needles: needles per haystack.
        pairs: key-value pairs per sequence.
        copies: tokens of a stretch to copy.
        segment: maximum tokens per forward pass; the state is carried from one piece to the next.
        batch_size: sequences per forward pass.
        progress: called with (task, sequences done, total sequences).

    Raises ValueError for an argument out of range, or if no source has enough text for any haystack.
    """
    for name, values in {
        "items": [items],
        "lengths": lengths,
        "needles": needles,
        "pairs": pairs,
        "copies": copies,
        "segment": [segment],
        "batch_size": [batch_size],
    }.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name}={values[0] if len(values) == 1 else tuple(values)}: use 1 or more")
    vocabulary = np.flatnonzero(token_lengths(tokenizer))
    separator = tokenizer.encode("\n")
    left_out: list[str] = []
    read = Reader(model, segment, batch_size)
    report = progress or (lambda what, done, total: None)
    with evaluating(model):
        needle = _needles(read, tokenizer, texts, items, lengths, needles, split, report, left_out)
        associative = _associative(read, vocabulary, 4 * items, pairs, split, report, left_out)
        drawn: dict[str, Callable[[int, Split, int], np.ndarray]] = {
            "random": partial(random_stretch, np.setdiff1d(vocabulary, separator))
        }
        drawn |= {f"text: {name}" if name == "random" else name: partial(text_stretch, text) for name, text in texts.items()}
        copy = _copying(read, drawn, separator, 2 * items, copies, report, left_out, split)
    return {
        "version": VERSION,
        "items": items,
        "associative": associative,
        "needle": needle,
        "copy": copy,
        "left_out": left_out,
    }


def headline(record: RecallRecord) -> dict[str, dict[str, float]]:
    """One score per task and text: choice over all sizes for keys and values and for needles, accuracy for copies."""

    def over(parts: Sequence[Mapping[str, Any]], share: str, count: str) -> float:
        return float(sum(part[share] * part[count] for part in parts) / sum(part[count] for part in parts))

    result = {
        "needle": {source: over(parts["by_length"], "choice", "asked") for source, parts in record["needle"].items()},
        "copy": {name: over(parts["by_length"], "accuracy", "tokens") for name, parts in record["copy"].items()},
    }
    pairs = record["associative"]["by_pairs"]
    return {**({"associative": {"random": over(pairs, "choice", "asked")}} if pairs else {}), **result}


def _associative(
    read: Reader,
    vocabulary: np.ndarray,
    count: int,
    pairs: Sequence[int],
    split: Split,
    report: Callable[[str, int, int], None],
    left_out: list[str],
) -> AssociativeFigures:
    possible = [number for number in sorted(set(pairs)) if 2 * number <= len(vocabulary)]
    for number in sorted(set(pairs) - set(possible)):
        left_out.append(f"{number} pairs: need {2 * number} different tokens, but the vocabulary has {len(vocabulary)}")
    queries: list[dict[str, Any]] = []
    for done, number in enumerate(possible):
        for first in range(0, count, read.batch_size):
            indices = range(first, min(first + read.batch_size, count))
            batch = [associations(vocabulary, number, split, index) for index in indices]
            chosen, likeliest = read.associate(batch)
            for row, item in enumerate(batch):
                right = item.tokens[item.asked + 1]
                queries += [
                    {
                        "sequence": (number, first + row),
                        "pairs": number,
                        "distance": int(distance),
                        "chance": 1 / number,
                        "choice": bool(choice),
                        "exact": bool(exact),
                    }
                    for distance, choice, exact in zip(
                        item.distances, chosen[row] == right, likeliest[row] == right, strict=True
                    )
                ]
            report("keys and values", done * count + indices.stop, len(possible) * count)
    most = [query for query in queries if query["pairs"] == max(possible)]
    return {
        "by_pairs": grouped(queries, lambda query: {"pairs": query["pairs"]}),
        "by_distance": grouped(most, lambda query: {"pairs": query["pairs"], **doubling(query["distance"])}),
    }


def _needles(
    read: Reader,
    tokenizer: Tokenizer,
    texts: Mapping[str, np.ndarray],
    items: int,
    lengths: Sequence[int],
    needles: Sequence[int],
    split: Split,
    report: Callable[[str, int, int], None],
    left_out: list[str],
) -> dict[str, NeedleFigures]:
    result: dict[str, NeedleFigures] = {}
    for name, text in texts.items():
        language = language_of(text, tokenizer)
        cells: dict[tuple[int, int], list[Haystack]] = {}
        for length in sorted(set(lengths)):
            made = {n: [haystack(text, tokenizer, language, length, n, split, i) for i in range(items)] for n in set(needles)}
            fits = {n: [each for each in stacks if each is not None] for n, stacks in sorted(made.items())}
            fits = {n: stacks for n, stacks in fits.items() if len(stacks) == items}
            if missing := sorted(set(needles) - set(fits)):
                what = "" if not fits else f" with {', '.join(map(str, missing))} needles"
                why = f"its text has {len(text)} tokens" if len(text) < length else "the needles would take more than half"
                left_out.append(f"{name}, haystacks of {length} tokens{what}: {why}")
            cells |= {(length, n): stacks for n, stacks in fits.items()}
        queries: list[dict[str, Any]] = []
        total, done = sum(length * len(stacks) for (length, _), stacks in cells.items()), 0
        for (length, number), stacks in cells.items():
            for first in range(0, items, read.batch_size):
                group = stacks[first : first + read.batch_size]
                for row, needle, choice, exact in read.ask(group):
                    queries.append(
                        {
                            "sequence": (length, number, first + row),
                            "length": length,
                            "needles": number,
                            "depth": needle.depth,
                            "distance": needle.distance,
                            "chance": 1 / NUM_CANDIDATES,
                            "choice": choice,
                            "exact": exact,
                        }
                    )
                done += length * len(group)
                report(f"needles, {name}", done, total)
        if queries:
            result[name] = {
                "language": language,
                "by_length": grouped(queries, lambda query: {key: query[key] for key in ("length", "needles")}),
                "by_needles": grouped(queries, lambda query: {"needles": query["needles"]}),
                "by_depth": grouped(queries, lambda query: fifth_of(query["depth"])),
                "by_distance": grouped(queries, lambda query: doubling(query["distance"])),
            }
    if not result:
        sizes = ", ".join(f"{name} {len(text)}" for name, text in texts.items()) or "none"
        raise ValueError(
            f"recall: no text fills a haystack of {', '.join(map(str, sorted(set(lengths))))} tokens (available "
            f"tokens: {sizes}); use shorter lengths, or pack with a larger --holdout-fraction"
        )
    return result


def _copying(
    read: Reader,
    drawn: Mapping[str, Callable[[int, Split, int], np.ndarray]],
    separator: Sequence[int],
    count: int,
    copies: Sequence[int],
    report: Callable[[str, int, int], None],
    left_out: list[str],
    split: Split,
) -> dict[str, CopyFigures]:
    result: dict[str, CopyFigures] = {}
    total, done = count * len(drawn) * len(set(copies)), 0
    for name, draw in drawn.items():
        rows: list[CopyLength] = []
        for length in sorted(set(copies)):
            try:
                stretches = [draw(length, split, index) for index in range(count)]
            except ValueError as error:
                left_out.append(f"{name}, copies: {error}")
                continue
            right, losses, first_losses = [], [], []
            for first in range(0, count, read.batch_size):
                made = [copied(stretch, separator) for stretch in stretches[first : first + read.batch_size]]
                _, once, twice = made[0]
                nats, hit = read.score(np.stack([each[0] for each in made]))
                # The token at t is predicted at t - 1.
                right += hit[:, twice - 1 :].sum(1).tolist()
                losses += nats[:, twice - 1 :].mean(1).tolist()
                first_losses += nats[:, once - 1 : once - 1 + length].mean(1).tolist()
                done += len(made)
                report("copies", done, total)
            rows.append(
                {
                    "length": length,
                    "sequences": count,
                    "tokens": count * length,
                    "accuracy": sum(right) / (count * length),
                    "accuracy_error": standard_error(right, [length] * count),
                    "loss": float(np.mean(losses)),
                    "first_loss": float(np.mean(first_losses)),
                }
            )
        if rows:
            result[name] = {"by_length": rows}
    return result
