"""The order of training text: bijective, exact in its shares, a function of numbers alone."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factorization_memory.data import order

KEYS = st.integers(0, (1 << 64) - 1)


class TestPermute:
    @settings(max_examples=60, deadline=None)
    @given(size=st.integers(1, 700), key=KEYS)
    def test_is_a_bijection(self, size: int, key: int) -> None:
        assert sorted(order.permute(i, size, key) for i in range(size)) == list(range(size))

    def test_keys_give_unlike_orders(self) -> None:
        orders = {tuple(order.permute(i, 50, key) for i in range(50)) for key in range(40)}
        assert len(orders) == 40

    def test_places_are_even(self) -> None:
        # Each of 5 places is taken by index 0 under a fifth of the keys: 400 of 2000, standard deviation 18.
        taken = [0] * 5
        for key in range(2000):
            taken[order.permute(0, 5, order._key(key, "en", 0))] += 1
        assert all(abs(n - 400) < 90 for n in taken), taken

    def test_neighbours_part(self) -> None:
        places = [order.permute(i, 10_000, 7) for i in range(2000)]
        steps = [abs(a - b) for a, b in itertools.pairwise(places)]
        assert 2800 < sum(steps) / len(steps) < 3900  # a third of the size, as for independent draws


class TestMixture:
    @settings(max_examples=100, deadline=None)
    @given(weights=st.lists(st.integers(0, 1 << 32), min_size=1, max_size=6).filter(any), n=st.integers(0, 10**12))
    def test_counts_are_the_shares(self, weights: list[int], n: int) -> None:
        counts = order.counts(n, weights)
        assert sum(counts) == n
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction(n * weight, sum(weights))) < len(weights)
            assert weight or not count

    @settings(max_examples=40, deadline=None)
    @given(weights=st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any), start=st.integers(0, 10**6))
    def test_draws_number_each_source_without_gaps(self, weights: list[int], start: int) -> None:
        expected = order.counts(start, weights)
        for n in range(start, start + 60):
            source, k = order.draw(n, weights)
            assert k == expected[source]
            expected[source] += 1
        assert expected == order.counts(start + 60, weights)

    def test_integer_weights_keep_the_proportion_and_small_ones(self) -> None:
        assert order.integer_weights([1.0, 3.0, 0.0]) == [1 << 30, 3 << 30, 0]
        assert order.integer_weights([1e-30, 1.0])[0] == 1

    @settings(max_examples=60, deadline=None)
    @given(weights=st.lists(st.integers(0, 99), min_size=1, max_size=5).filter(any), extra=st.integers(0, 40))
    def test_rows_are_shared_out(self, weights: list[int], extra: int) -> None:
        positive = sum(weight > 0 for weight in weights)
        shares = order.shared_rows(positive + extra, weights)
        assert sum(shares) == positive + extra
        assert all((share > 0) == (weight > 0) for share, weight in zip(shares, weights, strict=True))

    def test_too_few_rows(self) -> None:
        with pytest.raises(ValueError, match=r"got 1 row\(s\) for 2 sources"):
            order.shared_rows(1, [1, 1])


class TestWindows:
    @settings(max_examples=60, deadline=None)
    @given(num_tokens=st.integers(1, 400), length=st.integers(1, 60), seed=st.integers(0, 99), epoch=st.integers(0, 9))
    def test_an_epoch_reads_no_token_twice_and_all_but_a_rest(
        self, num_tokens: int, length: int, seed: int, epoch: int
    ) -> None:
        if num_tokens < length:
            return
        windows = num_tokens // length
        read = []
        for k in range(epoch * windows, (epoch + 1) * windows):
            start = order.window_start(seed, "en", k, num_tokens, length)
            read += [(start + i) % num_tokens for i in range(length)]
        assert len(read) == len(set(read)) == windows * length

    def test_epochs_cut_elsewhere(self) -> None:
        cuts = {frozenset(order.window_start(0, "en", e * 10 + i, 1000, 100) % 100 for i in range(10)) for e in range(8)}
        assert all(len(cut) == 1 for cut in cuts)
        assert len(cuts) > 5

    def test_seed_and_source_matter(self) -> None:
        def starts(seed: int, source: str) -> list[int]:
            return [order.window_start(seed, source, k, 10_000, 100) for k in range(20)]

        assert starts(0, "en") == starts(0, "en")
        assert starts(0, "en") != starts(1, "en") != starts(1, "ja") != starts(0, "en")


class TestStreams:
    def test_rows_read_on_and_start_spread(self) -> None:
        def start(row: int, step: int) -> int:
            return order.stream_start(3, "en", row, 4, step, 1000, 30)

        for row in range(4):
            assert all((start(row, step + 1) - start(row, step)) % 1000 == 30 for step in range(100))
        assert {(start(row + 1, 0) - start(row, 0)) % 1000 for row in range(3)} == {250}
