from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factorization_memory.evaluation import NgramModel

TEXT = ("the cat sat on the mat. the dog sat on the log. " * 8 + "吾輩は猫である。名前はまだ無い。" * 5).encode()


@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize("context", [b"", b"t", b"the ", "猫で".encode(), b"zq\xff\x00unseen", b"a cat sat on the "])
def test_distribution_sums_to_one(order: int, context: bytes) -> None:
    probabilities = NgramModel([TEXT, b"short", b"x"], order).probabilities(context)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert (probabilities > 0).all()


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.binary(max_size=60), min_size=1).filter(any), order=st.integers(1, 8), context=st.binary(max_size=12)
)
def test_distribution_sums_to_one_on_any_text(documents: list[bytes], order: int, context: bytes) -> None:
    probabilities = NgramModel(documents, order).probabilities(context)
    assert probabilities.sum() == pytest.approx(1, abs=1e-9)
    assert (probabilities > 0).all()


@pytest.mark.parametrize("order", [1, 3, 8])
def test_bits_are_those_of_the_distribution_before_each_byte(order: int) -> None:
    model = NgramModel([TEXT], order)
    text = "the cog 猫は".encode()
    expected = [-np.log2(model.probabilities(text[:i])[byte]) for i, byte in enumerate(text)]
    np.testing.assert_allclose(model.bits(text), expected, rtol=1e-12)


def test_bigram_by_hand() -> None:
    # "abab" and "ac": bigrams ab 2, ba 1, ac 1; contexts in which a byte was seen: a 2 (b, start of text), b 1, c 1. Those are
    # too few to estimate discounts from: with none of a kind taken as one, n1 = 2, n2 = 1 for both orders.
    model = NgramModel([b"abab", b"ac"], 2)
    y = 2 / (2 + 2 * 1)
    discounts = [0, 1 - 2 * y * 1 / 2, 2 - 3 * y * 1 / 1, 0.1]
    bigram_total, unigram_total = 3, 4  # after "a"; all continuations
    unigram_backoff = (discounts[2] + 2 * discounts[1]) / unigram_total
    unigram_b = (1 - discounts[1]) / unigram_total + unigram_backoff / 256
    backoff = (discounts[2] + discounts[1]) / bigram_total
    expected = (2 - discounts[2]) / bigram_total + backoff * unigram_b
    assert model.probabilities(b"a")[ord("b")] == pytest.approx(expected, rel=1e-12)


def test_higher_orders_predict_repetitive_text_better() -> None:
    costs = [NgramModel([TEXT], order).bits_per_byte([TEXT[40:200]]) for order in (1, 2, 3, 5)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] < 8


def test_nothing_crosses_from_one_document_to_the_next() -> None:
    apart = NgramModel([b"aaaa", b"bbbb"], 2)
    joined = NgramModel([b"aaaabbbb"], 2)
    assert apart.probabilities(b"a")[ord("b")] < joined.probabilities(b"a")[ord("b")]


def test_random_bytes_cost_about_eight_bits() -> None:
    generator = np.random.default_rng(0)
    text = generator.integers(0, 256, 40_000, dtype=np.uint8).tobytes()
    assert NgramModel([text[:30_000]], 3).bits_per_byte([text[30_000:]]) == pytest.approx(8, abs=0.35)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="order=9: use 1 to 8"):
        NgramModel([b"a"], 9)
    with pytest.raises(ValueError, match="no text to fit"):
        NgramModel([b"", b""], 3)
    with pytest.raises(ValueError, match="no text to score"):
        NgramModel([b"a"], 3).bits_per_byte([b""])
