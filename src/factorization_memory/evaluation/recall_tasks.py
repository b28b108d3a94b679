"""Recall tasks: key-value pairs, needles in a haystack of real text, and copying.

Every item is a pure function of the task, its sizes, the split and an index, on every machine and with every version of numpy:
only the bit stream of PCG64 is used, which numpy guarantees to be stable, not `Generator`, whose draws may change. The splits
are disjoint by construction: a hash of what is drawn decides its split, and an item is redrawn until it falls into the right
one. Text is not split this way: pass text that the model was not trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer

VERSION = "recall-1"
"""Seeds every item: change it whenever the items change."""
IGNORED = -100
"""Target at positions where nothing is asked."""
NUM_CANDIDATES = 8
"""Number of candidate answers to a needle's question; chance is one in this many."""
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Depths of a single needle, indexed by the item's index."""
_SENTENCE_SEARCH = 128
"""How many tokens past its depth a needle may move to reach the end of a sentence."""

Split = Literal["train", "test"]


class Draws:
    """The random numbers of an item."""

    def __init__(self, *name: str | int) -> None:
        seed = hashlib.sha256("/".join(map(str, (VERSION, *name))).encode()).digest()[:16]
        self._bits = np.random.PCG64(int.from_bytes(seed, "little"))

    def below(self, bound: int, count: int) -> np.ndarray:
        """`count` integers from 0 to `bound` - 1, int64. The bias of the remainder is below bound / 2^64."""
        return (self._bits.random_raw(count) % np.uint64(bound)).astype(np.int64)

    def distinct(self, bound: int, count: int) -> np.ndarray:
        """`count` different integers from 0 to `bound` - 1 in random order, int64."""
        return np.argsort(self._bits.random_raw(bound), kind="stable")[:count]


def split_of(content: np.ndarray) -> Split:
    """The split that drawn numbers belong to: about a quarter is test."""
    return "test" if hashlib.sha256(content.astype("<i8").tobytes()).digest()[0] < 64 else "train"


def _drawn(draw: Callable[[], np.ndarray], split: Split) -> np.ndarray:
    """The first draw that belongs to `split`."""
    while split_of(drawn := draw()) != split:
        pass
    return drawn


def associative_recall(pairs: int, split: Split, first: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Items `first` to `first + count - 1` of multi-query associative recall (arXiv 2312.04927) with a vocabulary of its own.

    A sequence has P pairs of a key (out of 4 P, all different) and a value (out of 4 P), then 4 P positions: P have the keys
    again in random order, the others a filler. Ids: keys from 0, values from 4 P, filler 8 P.

    Args:
        pairs: P, at least 2.
        seed: different seeds give different items of the same split.

    Returns tokens and targets, int64 [count, 6 P]: the target of a repeated key is its value, all others are `IGNORED`.
    """
    if pairs < 2:
        raise ValueError(f"pairs={pairs}: use 2 or more; one pair has too few forms to be divided into splits")
    symbols = places = 4 * pairs
    tokens = np.full((count, 2 * pairs + places), 2 * symbols, dtype=np.int64)
    targets = np.full_like(tokens, IGNORED)
    for row in range(count):
        draws = Draws("associative", pairs, split, seed, first + row)
        head = _drawn(lambda d=draws: np.stack((d.distinct(symbols, pairs), d.below(symbols, pairs) + symbols), 1), split)  # type: ignore[misc]
        where = 2 * pairs + draws.distinct(places, pairs)
        tokens[row, : 2 * pairs] = head.ravel()
        tokens[row, where], targets[row, where] = head.T
    return tokens, targets


@dataclass(frozen=True)
class Associations:
    """Pairs of tokens, then the same pairs in another order: each key determines its value.

    Attributes:
        tokens: int64 [4 P].
        asked: positions of the repeated keys; the token after each is its value. Int64 [P], ascending.
        distances: how many tokens earlier each key first occurred, int64 [P].
        values: all values, the candidates, int64 [P].
    """

    tokens: np.ndarray
    asked: np.ndarray
    distances: np.ndarray
    values: np.ndarray


def associations(vocabulary: np.ndarray, pairs: int, split: Split, index: int) -> Associations:
    """An item of associative recall in a tokenizer's vocabulary: P keys and P values, all different ids of `vocabulary`."""
    if len(vocabulary) < 2 * pairs:
        raise ValueError(f"pairs={pairs}: needs {2 * pairs} different tokens, the vocabulary has {len(vocabulary)}")
    draws = Draws("associations", pairs, split, index)
    ids = _drawn(lambda: vocabulary[draws.distinct(len(vocabulary), 2 * pairs)], split).reshape(pairs, 2)
    order = draws.distinct(pairs, pairs)
    asked = 2 * pairs + 2 * np.arange(pairs)
    return Associations(np.concatenate((ids, ids[order])).ravel(), asked, asked - 2 * order, ids[:, 1])


def random_stretch(vocabulary: np.ndarray, length: int, split: Split, index: int) -> np.ndarray:
    """Tokens drawn from `vocabulary` with replacement, int64 [length]."""
    draws = Draws("random stretch", length, split, index)
    return _drawn(lambda: vocabulary[draws.below(len(vocabulary), length)].astype(np.int64), split)


def text_stretch(text: np.ndarray, length: int, split: Split, index: int) -> np.ndarray:
    """A stretch of `text`, int64 [length]."""
    if len(text) < length:
        raise ValueError(f"length={length}: the text has {len(text)} tokens; use shorter stretches or a longer text")
    start = int(Draws("text stretch", length, split, index).below(len(text) - length + 1, 1)[0])
    return np.asarray(text[start : start + length], dtype=np.int64)


def copied(stretch: np.ndarray, separator: Sequence[int]) -> tuple[np.ndarray, int, int]:
    """Separator, stretch, separator, stretch: int64; and where the two copies begin."""
    mark = np.asarray(separator, dtype=np.int64)
    return np.concatenate((mark, stretch, mark, stretch)), len(mark), 2 * len(mark) + len(stretch)


@dataclass(frozen=True)
class Language:
    """A needle is `{prompt}{answer}{end}`, its question `{prompt}`."""

    prompt: str
    answer: str
    end: str
    names: tuple[str, ...]


LANGUAGES = {
    "en": Language(
        "\nThe secret number of {name} is",
        " {number}",
        ".\n",
        (
            "Alice",
            "Arthur",
            "Barbara",
            "Charles",
            "Dorothy",
            "Edward",
            "Florence",
            "George",
            "Helen",
            "Henry",
            "Isabel",
            "James",
            "Julia",
            "Kate",
            "Laura",
            "Margaret",
            "Martin",
            "Nancy",
            "Oliver",
            "Peter",
            "Richard",
            "Sarah",
            "Thomas",
            "William",
        ),
    ),
    "ja": Language(
        "\n{name}の秘密の番号は",
        "{number}",
        "です。\n",
        (
            "佐藤",
            "鈴木",
            "高橋",
            "田中",
            "伊藤",
            "渡辺",
            "山本",
            "中村",
            "小林",
            "加藤",
            "吉田",
            "山田",
            "佐々木",
            "山口",
            "松本",
            "井上",
            "木村",
            "林",
            "清水",
            "山崎",
            "森",
            "池田",
            "橋本",
            "石川",
        ),
    ),
}


def language_of(text: np.ndarray, tokenizer: Tokenizer) -> str:
    """The language of `LANGUAGES` to ask in: Japanese if a tenth of the first characters are kana, else English."""
    start = b"".join(tokenizer.token_bytes[i] for i in text[:2000].tolist()).decode("utf-8", "ignore")
    kana = sum("ぁ" <= character <= "ヿ" for character in start)
    return "ja" if 10 * kana > len(start) else "en"


@dataclass(frozen=True)
class Needle:
    """A sentence to recall, and the question for it.

    Attributes:
        prompt: tokens that the needle begins with; also the question.
        answer: tokens of the number that follows.
        candidates: tokens of the numbers to choose from, sorted, so that the position of the correct one reveals nothing.
        depth: requested share of the text before it.
        place: position of the answer's first token in the haystack.
        distance: from there to the position of the answer to the question.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    depth: float
    place: int
    distance: int

    @property
    def right(self) -> int:
        """Index of the correct candidate."""
        return self.candidates.index(self.answer)


@dataclass(frozen=True)
class Haystack:
    """Text with needles in it, int64 [length]; each question asks for one of them."""

    tokens: np.ndarray
    needles: tuple[Needle, ...]


@cache
def _numbers(split: Split) -> np.ndarray:
    """The four-digit numbers that needles of a split use, int64."""
    return np.array([n for n in range(1000, 10000) if split_of(np.array([n])) == split])


def haystack(
    text: np.ndarray, tokenizer: Tokenizer, language: str, length: int, needles: int, split: Split, index: int
) -> Haystack | None:
    """A haystack of `length` tokens, including the given number of needles with different names and numbers.

    Each needle is placed at the end of a sentence at or after its depth. None if the needles would take more than half of the
    haystack, or the text is too short to fill the rest.
    """
    form, draws = LANGUAGES[language], Draws("needle", language, length, needles, split, index)
    if needles > len(form.names):
        raise ValueError(f"needles={needles}: use at most {len(form.names)}, one for each name")

    def encode(piece: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(piece))

    known = _numbers(split)
    numbers = known[draws.distinct(len(known), needles + NUM_CANDIDATES - 1)]
    answers = [encode(form.answer.format(number=number)) for number in numbers]
    prompts = [encode(form.prompt.format(name=form.names[i])) for i in draws.distinct(len(form.names), needles)]
    pieces = [prompt + answer + encode(form.end) for prompt, answer in zip(prompts, answers, strict=False)]
    filling = length - sum(map(len, pieces))
    if filling < length / 2 or len(text) < filling:
        return None
    start = int(draws.below(len(text) - filling + 1, 1)[0])
    straw = np.asarray(text[start : start + filling], dtype=np.int64)
    depths = [DEPTHS[index % len(DEPTHS)]] if needles == 1 else [(i + 0.5) / needles for i in range(needles)]
    cuts = [_sentence_end(straw, round(depth * filling), tokenizer) for depth in depths]
    parts: list[np.ndarray] = []
    found: list[Needle] = []
    used = before = 0
    for i, (cut, piece) in enumerate(zip(cuts, pieces, strict=True)):
        parts += [straw[before:cut], np.array(piece, dtype=np.int64)]
        place = cut + used + len(prompts[i])
        others = [answers[j] for j in range(needles) if j != i] + answers[needles:]
        candidates = tuple(sorted((answers[i], *others[: NUM_CANDIDATES - 1])))
        found.append(Needle(prompts[i], answers[i], candidates, depths[i], place, length + len(prompts[i]) - place))
        used, before = used + len(piece), cut
    return Haystack(np.concatenate([*parts, straw[before:]]), tuple(found))


def _sentence_end(tokens: np.ndarray, place: int, tokenizer: Tokenizer) -> int:
    """The first position from `place` on that follows the end of a sentence; `place` itself if none is near."""
    for end in range(max(place, 1), min(place + _SENTENCE_SEARCH, len(tokens))):
        # Without merges "。" is three tokens.
        before = b"".join(tokenizer.token_bytes[token] for token in tokens[max(0, end - 3) : end].tolist())
        if before.endswith((b"\n", b".", "。".encode())):
            return end
    return place
