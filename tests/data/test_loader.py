"""Batches: what they hold, that they come in one order from any start, and that reading never hangs or hides an error."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from factorization_memory.config import ConfigError, DataConfig
from factorization_memory.data.loader import IGNORED_TARGET, Batch, BatchLoader
from factorization_memory.data.shards import PackedCorpus, pack
from factorization_memory.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PackedCorpus:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name, count in (("en", 40), ("ja", 20)):
        rows = [{"text": "".join(map(chr, rng.integers(97, 123, rng.integers(5, 90))))} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [(None, folder / "en.jsonl"), (None, folder / "ja.jsonl")]
    return pack(inputs, Tokenizer.bytes_level(), folder / "packed", holdout_fraction=0.2)


def loader(corpus: PackedCorpus, *, step: int = 0, carry: bool = False, rows: int = 6, micro: int = 3, seed: int = 1, **config):
    data = DataConfig(**{"context_length": 16, "read_ahead": 2, **config})
    return BatchLoader(
        corpus, data, sequences_per_step=rows, micro_batch_size=micro, carry_state=carry, seed=seed, start_step=step
    )


def take(batches: BatchLoader, steps: int) -> list[list[Batch]]:
    with batches:
        return [next(batches) for _ in range(steps)]


def same(one: list[list[Batch]], two: list[list[Batch]]) -> bool:
    def equal(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b

    return len(one) == len(two) and all(
        len(a) == len(b) and all(equal(getattr(x, f), getattr(y, f)) for x, y in zip(a, b, strict=True) for f in vars(x))
        for a, b in zip(one, two, strict=True)
    )


class TestContent:
    @pytest.mark.parametrize("boundary", ["reset", "continue"])
    @pytest.mark.parametrize("carry", [False, True])
    def test_rows_are_the_corpus(self, corpus: PackedCorpus, boundary, carry: bool) -> None:
        end = corpus.tokenizer.document_end
        packed_batches = 0
        for step, batches in enumerate(take(loader(corpus, document_boundary=boundary, carry=carry), 30)):
            assert len(batches) == 2
            for batch in batches:
                tokens, targets = batch.tokens.reshape(3, 16), batch.targets.reshape(3, 16)
                assert tokens.dtype == targets.dtype == torch.int64
                expected_begins = []
                for row, window in enumerate(batch.windows):
                    source, start = window.split(":")
                    text = corpus.sources[source].splits["train"].tokens
                    read = [int(text[(int(start) + i) % len(text)]) for i in range(17)]
                    assert tokens[row].tolist() == read[:-1]
                    assert targets[row].tolist() == [IGNORED_TARGET if a == end else b for a, b in itertools.pairwise(read)]
                    expected_begins += [16 * row] + [16 * row + i for i in range(1, 16) if read[i - 1] == end]
                    starts_document = int(text[int(start) - 1]) == end
                    assert batch.reset[row] == (not carry or step == 0 or (boundary == "reset" and starts_document))
                if boundary == "reset" and len(expected_begins) > 3:
                    packed_batches += 1
                    assert batch.tokens.shape == batch.targets.shape == (1, 48)
                    assert batch.cu_seqlens.dtype == torch.int32
                    assert batch.cu_seqlens.tolist() == [*expected_begins, 48]
                    assert [expected_begins[i] for i in batch.row_starts.tolist()] == [0, 16, 32]
                else:
                    assert batch.tokens.shape == (3, 16)
                    assert batch.cu_seqlens is None
                    assert batch.row_starts is None
        assert (packed_batches > 10) == (boundary == "reset")

    def test_an_epoch_reads_every_window_once(self, corpus: PackedCorpus) -> None:
        windows = len(corpus.sources["en"].splits["train"].tokens) // 16
        batches = take(loader(corpus, weights={"en": 1.0}, rows=windows, micro=windows), 2)
        for (batch,) in batches:
            assert len(set(batch.windows)) == windows
        assert set(batches[0][0].windows) != set(batches[1][0].windows)  # another epoch is cut elsewhere

    def test_carried_rows_read_on(self, corpus: PackedCorpus) -> None:
        steps = take(loader(corpus, carry=True), 40)
        for before, after in itertools.pairwise(steps):
            for a, b in zip(before, after, strict=True):
                for one, two in zip(a.windows, b.windows, strict=True):
                    source, start = one.split(":")
                    length = len(corpus.sources[source].splits["train"].tokens)
                    assert two == f"{source}:{(int(start) + 16) % length}"

    def test_shares_follow_the_weights(self, corpus: PackedCorpus) -> None:
        def shares(**config) -> Counter:
            steps = take(loader(corpus, rows=8, micro=8, **config), 50)
            return Counter(window.split(":")[0] for (batch,) in steps for window in batch.windows)

        assert shares(weights={"en": 1.0, "ja": 3.0}) == {"en": 100, "ja": 300}
        assert shares(weights={"ja": 2.0, "en": 0.0}) == {"ja": 400}
        tokens = {name: len(source.splits["train"].tokens) for name, source in corpus.sources.items()}
        assert abs(shares()["en"] - 400 * tokens["en"] / sum(tokens.values())) < 2


class TestOrder:
    @pytest.mark.parametrize("carry", [False, True])
    @pytest.mark.parametrize("read_ahead", [0, 3])
    def test_starting_late_is_going_on(self, corpus: PackedCorpus, carry: bool, read_ahead: int) -> None:
        whole = take(loader(corpus, carry=carry), 25)
        for step in (1, 7, 20):
            assert same(take(loader(corpus, carry=carry, step=step, read_ahead=read_ahead), 5), whole[step : step + 5])

    def test_micro_batches_cut_the_same_step(self, corpus: PackedCorpus) -> None:
        one, three = (
            [[w for batch in step for w in batch.windows] for step in take(loader(corpus, micro=m), 5)] for m in (6, 2)
        )
        assert one == three

    def test_seed_matters(self, corpus: PackedCorpus) -> None:
        assert same(take(loader(corpus), 3), take(loader(corpus), 3))
        assert not same(take(loader(corpus), 3), take(loader(corpus, seed=2), 3))


class TestRefusals:
    def test_context_longer_than_the_corpus(self, corpus: PackedCorpus) -> None:
        tokens = len(corpus.sources["en"].splits["train"].tokens)
        with pytest.raises(ConfigError, match=rf"data.context_length={tokens}: .*'en'.*{tokens} tokens"):
            loader(corpus, context_length=tokens, weights={"en": 1.0})
        take(loader(corpus, context_length=tokens - 1, weights={"en": 1.0}), 2)

    def test_unknown_source(self, corpus: PackedCorpus) -> None:
        with pytest.raises(ConfigError, match=r"data.weights.eng: .*did you mean 'en'"):
            loader(corpus, weights={"eng": 1.0})

    def test_micro_batches_that_do_not_divide(self, corpus: PackedCorpus) -> None:
        with pytest.raises(ConfigError, match="micro_batch_size=4: must divide the 6"):
            loader(corpus, micro=4)

    def test_carried_state_with_more_sources_than_rows(self, corpus: PackedCorpus) -> None:
        with pytest.raises(ConfigError, match=r"training.tokens_per_step=16: .*2 sources"):
            loader(corpus, carry=True, rows=1, micro=1)


class TestThread:
    def test_an_error_comes_out_where_the_batch_is_asked_for(self, corpus: PackedCorpus, monkeypatch) -> None:
        batches = loader(corpus)
        read = BatchLoader._batches

        def failing(self, step):
            if step == 3:
                raise OSError("the disk went away")
            return read(self, step)

        monkeypatch.setattr(BatchLoader, "_batches", failing)
        with batches:
            for _ in range(3):
                next(batches)
            for _ in range(2):
                with pytest.raises(OSError, match="went away"):
                    next(batches)

    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("taken", [0, 1, 5])
    def test_close_ends_the_thread(self, corpus: PackedCorpus, taken: int) -> None:
        batches = loader(corpus, read_ahead=2)
        for _ in range(taken):
            next(batches)
        time.sleep(0.05)  # the queue is full by now, the thread waits
        batches.close()
        batches.close()
        assert not any(thread.name == "batches" for thread in threading.enumerate())
        with pytest.raises(StopIteration):
            next(batches)

    def test_waiting_is_measured(self, corpus: PackedCorpus, monkeypatch) -> None:
        read = BatchLoader._batches

        def slow(self, step):
            time.sleep(0.02)
            return read(self, step)

        monkeypatch.setattr(BatchLoader, "_batches", slow)
        with loader(corpus) as batches:
            for _ in range(5):
                next(batches)
            assert 0.08 < batches.wait_seconds < 2
            time.sleep(0.5)
            waited = batches.wait_seconds
            next(batches)
            assert batches.wait_seconds - waited < 0.02  # it was ready


def test_stops_at_the_end_of_a_for_loop(corpus: PackedCorpus, tmp_path: Path) -> None:
    with loader(corpus) as batches:
        for count, _ in enumerate(batches):
            if count == 3:
                break
    assert list(batches) == []
