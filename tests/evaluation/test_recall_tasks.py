"""What the recall tasks promise of their items, and learning one of them."""

from __future__ import annotations

import hashlib
from itertools import islice

import numpy as np
import pytest
import torch

from factorization_memory.config import AttentionConfig, ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation.recall_draws import Draws, Split, split_of
from factorization_memory.evaluation.recall_learning import learn_recall
from factorization_memory.evaluation.recall_needles import LANGUAGES, NUM_CANDIDATES, haystack, language_of
from factorization_memory.evaluation.recall_tasks import (
    IGNORED,
    associations,
    associative_recall,
    copied,
    random_stretch,
    text_stretch,
)

BYTES = Tokenizer.bytes_level()
ENGLISH = np.array(BYTES.encode("It was a dark night. The moor lay in silence.\n" * 100))
JAPANESE = np.array(BYTES.encode("親譲りの無鉄砲で小供の時から損ばかりしている。" * 100))
SPLITS: tuple[Split, ...] = ("train", "test")


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(each.astype("<i8").tobytes() for each in arrays)).hexdigest()[:16]


def test_items_are_the_same_forever() -> None:
    """With another digest, figures no longer compare with those written down before: give `VERSION` another name."""
    pairs = associations(np.arange(256), 8, "test", 3)
    stack = haystack(ENGLISH, BYTES, "en", 256, 2, "test", 3)
    assert stack is not None
    assert digest(*associative_recall(4, "test", 0, 256)) == "8b60cdfaf798abb0"
    assert digest(pairs.tokens, pairs.asked, pairs.distances) == "97d376add28a126a"
    assert digest(random_stretch(np.arange(256), 64, "test", 3), text_stretch(ENGLISH, 64, "test", 3)) == "e9a8c009fcbacb8c"
    assert digest(stack.tokens) == "e04fa1d292730d75"


def test_items_do_not_depend_on_how_they_are_asked_for() -> None:
    whole, part = associative_recall(4, "train", 0, 6, seed=1), associative_recall(4, "train", 2, 2, seed=1)
    for a, b in zip(whole, part, strict=True):
        assert (a[2:4] == b).all()
    assert (whole[0] != associative_recall(4, "train", 0, 6, seed=2)[0]).any()


@pytest.mark.parametrize("pairs", [2, 4, 9])
def test_associative_recall(pairs: int) -> None:
    tokens, targets = associative_recall(pairs, "train", 0, 64)
    assert tokens.shape == targets.shape == (64, 6 * pairs)
    for row, target in zip(tokens, targets, strict=True):
        keys, values = row[: 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == pairs
        assert all(0 <= key < 4 * pairs <= value < 8 * pairs for key, value in zip(keys, values, strict=True))
        asked = np.flatnonzero(target != IGNORED)
        assert sorted(row[asked].tolist()) == sorted(keys)
        value_of = dict(zip(keys, values, strict=True))
        assert target[asked].tolist() == [value_of[key] for key in row[asked].tolist()]
        filler = np.setdiff1d(np.arange(2 * pairs, 6 * pairs), asked)
        assert (row[filler] == 8 * pairs).all()


def test_no_test_sequence_is_trained_on() -> None:
    """With two pairs there are few enough to meet again: 3,584 forms, and 4,096 items of each split."""
    forms = {split: {row[:4].tobytes() for row in associative_recall(2, split, 0, 4096)[0]} for split in SPLITS}
    assert len(forms["test"]) > 500
    assert not forms["test"] & forms["train"]
    for split in SPLITS:
        assert split_of(random_stretch(np.arange(256), 16, split, 0)) == split


def test_draws() -> None:
    assert sorted(Draws("a").distinct(50, 50).tolist()) == list(range(50))
    assert set(Draws("a").below(3, 200).tolist()) == {0, 1, 2}
    assert Draws("a", 1).below(1 << 40, 1) != Draws("a", 2).below(1 << 40, 1)


@pytest.mark.parametrize("pairs", [1, 4, 64])
def test_associations(pairs: int) -> None:
    vocabulary = np.arange(50, 250)
    for index in range(8):
        item = associations(vocabulary, pairs, "test", index)
        text = item.tokens.tolist()
        assert len(set(text[: 2 * pairs])) == 2 * pairs
        assert set(text) <= set(vocabulary.tolist())
        assert item.values.tolist() == text[1 : 2 * pairs : 2]
        for asked, distance in zip(item.asked.tolist(), item.distances.tolist(), strict=True):
            first = asked - distance
            assert first % 2 == 0
            assert 0 <= first < 2 * pairs
            assert text[first : first + 2] == text[asked : asked + 2]


def test_copies() -> None:
    tokens, first, second = copied(np.array([1, 2, 3]), [9, 9])
    assert tokens.tolist() == [9, 9, 1, 2, 3, 9, 9, 1, 2, 3]
    assert tokens[first : first + 3].tolist() == tokens[second:].tolist() == [1, 2, 3]
    part = text_stretch(ENGLISH, 32, "test", 5).tobytes()
    assert part in ENGLISH.astype(np.int64).tobytes()


@pytest.mark.parametrize(("language", "text"), [("en", ENGLISH), ("ja", JAPANESE)])
@pytest.mark.parametrize("needles", [1, 4])
def test_needles_stand_where_they_are_said_to(language: str, text: np.ndarray, needles: int) -> None:
    assert language_of(text, BYTES) == language
    form = LANGUAGES[language]
    for index in range(5):
        stack = haystack(text, BYTES, language, 600, needles, "test", index)
        assert stack is not None
        assert len(stack.tokens) == 600
        assert len(stack.needles) == needles
        read = bytes(stack.tokens.tolist()).decode("utf-8", "replace")
        straw = list(stack.tokens)
        for needle in reversed(stack.needles):
            prompt, answer = bytes(needle.prompt).decode(), bytes(needle.answer).decode()
            assert read.count(prompt + answer + form.end) == 1
            assert read.count(prompt) == 1
            assert tuple(stack.tokens[needle.place : needle.place + len(needle.answer)]) == needle.answer
            assert needle.distance == 600 + len(needle.prompt) - needle.place
            assert len(set(needle.candidates)) == NUM_CANDIDATES
            assert needle.candidates[needle.right] == needle.answer
            start = needle.place - len(needle.prompt)
            del straw[start : needle.place + len(needle.answer) + len(form.end.encode())]
        answers = {needle.answer for needle in stack.needles}
        assert all(answers <= set(needle.candidates) for needle in stack.needles)
        assert bytes(straw) in bytes(text.tolist())  # the text is whole but for the needles
        before = 0
        for needle in stack.needles:
            cut = needle.place - len(needle.prompt) - before
            before += len(needle.prompt) + len(needle.answer) + len(form.end.encode())
            assert 0 <= cut - round(needle.depth * len(straw)) < 128
            assert bytes(straw[:cut]).endswith((b"\n", b".", "。".encode()))


def test_what_does_not_fit() -> None:
    assert haystack(ENGLISH[:200], BYTES, "en", 256, 1, "test", 0) is None  # too little text
    assert haystack(ENGLISH, BYTES, "en", 256, 4, "test", 0) is None  # needles take more than half
    with pytest.raises(ValueError, match="needles=25: use at most 24"):
        haystack(ENGLISH, BYTES, "en", 256, 25, "test", 0)
    with pytest.raises(ValueError, match="pairs=200: needs 400 different tokens, but the vocabulary has 256"):
        associations(np.arange(256), 200, "test", 0)
    with pytest.raises(ValueError, match="pairs=1: use 2 or more"):
        associative_recall(1, "test", 0, 1)
    with pytest.raises(ValueError, match="length=64: the text has 20 tokens"):
        text_stretch(ENGLISH[:20], 64, "test", 0)


ATTENTION = ModelConfig(
    hidden_size=32, num_layers=2, intermediate_size=64, mixers=("attention",), attention=AttentionConfig(num_heads=2),
    embedding_multiplier=8.0,
)  # fmt: skip


def test_a_model_learns_it() -> None:
    reports = list(learn_recall(ATTENTION, pairs=2, steps=250, seed=0, every=100, batch_size=64))
    assert [report.step for report in reports] == [100, 200, 250]
    assert reports[-1].accuracy > 0.9
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].seconds >= reports[0].seconds > 0
    tokens, targets = (torch.from_numpy(x) for x in associative_recall(2, "test", 0, 256))
    with torch.no_grad():
        right = (reports[-1].model(tokens)[0].argmax(-1) == targets)[targets != IGNORED]
    assert right.double().mean().item() == reports[-1].accuracy


def test_learning_repeats_and_leaves_random_numbers_alone() -> None:
    def learned(seed: int) -> tuple[float, float, int]:
        report = next(iter(learn_recall(ATTENTION, pairs=2, steps=3, seed=seed, every=2, batch_size=4)))
        return report.loss, report.accuracy, report.parameters

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = learned(0)
    assert torch.equal(torch.rand(3), expected)
    assert learned(0) == first
    assert learned(1)[0] != first[0]


@pytest.mark.parametrize("change", [{"steps": 0}, {"every": 0}, {"batch_size": 0}, {"warmup_steps": 0}, {"pairs": 1}])
def test_learning_refuses(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}={next(iter(change.values()))}: use"):
        next(iter(islice(learn_recall(ATTENTION, **change), 1)))  # type: ignore[arg-type]
