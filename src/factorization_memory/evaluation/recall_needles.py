"""Needles in a haystack of real text: sentences with a number of a name, and the questions for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from factorization_memory.evaluation.recall_draws import Draws, Split, split_of

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer

NUM_CANDIDATES = 8
"""Number of candidate answers to a needle's question; chance is one in this many."""
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Depths of a single needle, indexed by the item's index."""
_SENTENCE_SEARCH = 128
"""How many tokens past its depth a needle may move to reach the end of a sentence."""


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
        raise ValueError(f"needles={needles}: use at most {len(form.names)}, the number of names")

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
