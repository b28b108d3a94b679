"""Tokenizers give every text back, count its bytes exactly and never take text for control tokens."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
import tracemalloc
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factorization_memory.data import tokenizer as tokenizer_module
from factorization_memory.data.corpora import builtin_corpus, read_documents
from factorization_memory.data.pre_split import cut_into_blocks
from factorization_memory.data.tokenizer import Tokenizer, TokenizerError

MIXED = "It's  don’t 1902\n\n　　コーヒーを飲んだ。「それは、何だ？」　café 東京ﾃﾞﾊﾞｲｽ〳〵 ❤️👨‍👩‍👧 x=1;\r\n\tfoo \n end〇二三　"


@pytest.fixture(scope="module")
def books() -> dict[str, str]:
    return {document.source: document.text for document in read_documents(builtin_corpus())}


@pytest.fixture(scope="module")
def trained(books: dict[str, str]) -> Tokenizer:
    return Tokenizer.train([books["en"][:60_000], books["ja"][:20_000]], vocab_size=2000)


@pytest.fixture(scope="module", params=["bytes", "trained"])
def any_tokenizer(request: pytest.FixtureRequest, trained: Tokenizer) -> Tokenizer:
    return Tokenizer.bytes_level() if request.param == "bytes" else trained


# Characters at which the rules of the pre-split meet: scripts, marks, spaces of all kinds, letters common to scripts.
AWKWARD = st.text(alphabet="aé's’S l1２.,-—\"“、。「？…東京〇々〆あんゝーァカｶﾞ〳゙́ \t\n\r　\xa0\u2003\x1c\x85😀‍️ไท", max_size=40)


class TestLossless:
    @settings(max_examples=150, deadline=None)
    @given(text=st.one_of(AWKWARD, st.text(max_size=60)))
    def test_any_text(self, any_tokenizer: Tokenizer, text: str) -> None:
        normal = unicodedata.normalize("NFC", text)
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids) == normal
        assert b"".join(any_tokenizer.token_bytes[i] for i in ids) == normal.encode()

    def test_books_are_encoded_in_fewer_tokens_than_bytes(self, trained: Tokenizer, books: dict[str, str]) -> None:
        for text in books.values():
            ids = trained.encode(text)
            assert trained.decode(ids) == text
            assert len(text.encode()) > 2.5 * len(ids)

    def test_byte_ids_are_the_bytes(self) -> None:
        assert Tokenizer.bytes_level().encode(MIXED) == list(MIXED.encode())


class TestChunks:
    """Encoding chunk by chunk is encoding the whole: what the look-up of chunks rests on."""

    @settings(max_examples=400, deadline=None)
    @given(text=AWKWARD)
    def test_awkward_text(self, trained: Tokenizer, text: str) -> None:
        normal = unicodedata.normalize("NFC", text)
        assert trained.encode(text) == whole(trained, normal)

    def test_books(self, trained: Tokenizer, books: dict[str, str]) -> None:
        for text in books.values():
            assert trained.encode(text) == whole(trained, text)

    def test_blocks_join_to_the_whole(self, trained: Tokenizer, books: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        text = books["en"][:30_000] + "\n\n\n" + books["ja"][:5000]
        blocks = list(cut_into_blocks(text, 100))
        assert "".join(blocks) == text
        assert len(blocks) > 50
        assert [i for block in blocks for i in trained.encode(block)] == whole(trained, text)

    @settings(max_examples=300, deadline=None)
    @given(text=AWKWARD, size=st.integers(1, 12))
    def test_blocks_of_awkward_text(self, trained: Tokenizer, text: str, size: int) -> None:
        # A cut within a word is the one thing that may change its tokens.
        normal = unicodedata.normalize("NFC", text * 4)
        blocks = list(cut_into_blocks(normal, size))
        assert "".join(blocks) == normal
        assert all(len(block) <= 2 * size for block in blocks)
        pieces = [end for _, (_, end) in trained._backend.pre_tokenizer.pre_tokenize_str(normal)]
        ends = list(itertools.accumulate(map(len, blocks)))
        if set(ends) <= set(pieces):
            assert [i for block in blocks for i in trained.encode(block)] == whole(trained, normal)
        for start, end in itertools.pairwise([0, *ends]):
            assert end in pieces or not re.search("[al1][ \n]", normal[start + size - 1 : start + 2 * size])

    def test_one_long_line_is_encoded_in_blocks(self, trained: Tokenizer, books: dict[str, str], monkeypatch) -> None:
        monkeypatch.setattr(tokenizer_module, "_ENCODING_BLOCK", 500)
        for text in (books["en"][:20_000].replace("\n", " "), "".join(books["ja"][:5000].split()), "A1b2," * 2000):
            blocks = list(trained.encode_blocks(text))
            assert len(blocks) > 5
            assert np.concatenate(blocks).tolist() == whole(trained, text)

    def test_memory_of_one_long_line(self) -> None:
        text = "some words and more " * 500_000
        tokenizer = Tokenizer.bytes_level()
        tracemalloc.start()
        try:
            assert sum(map(len, tokenizer.encode_blocks(text))) == len(text)
            # Some 34 bytes a character where the whole line is one block.
            assert tracemalloc.get_traced_memory()[1] < 8 * len(text)
        finally:
            tracemalloc.stop()

    def test_a_full_cache_changes_nothing(
        self, trained: Tokenizer, books: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer_module, "_CACHED_CHARACTERS", 50)
        text = books["ja"][:3000]
        assert trained.encode(text) == whole(trained, text) == trained.encode(text)
        assert not trained._cache


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer._backend.encode(text, add_special_tokens=False).ids


class TestSpecialTokens:
    def test_text_is_never_a_control_token(self, any_tokenizer: Tokenizer) -> None:
        text = "before</s>after <pad> </s>"
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids) == text
        assert not {any_tokenizer.document_end, any_tokenizer.padding} & set(ids)

    def test_control_tokens_are_no_text(self, any_tokenizer: Tokenizer) -> None:
        assert any_tokenizer.token_bytes[any_tokenizer.document_end] == b""
        assert any_tokenizer.decode([any_tokenizer.document_end, any_tokenizer.padding]) == ""
        assert sum(not token for token in any_tokenizer.token_bytes) == 2


class TestPreSplit:
    def test_scripts_spaces_and_lines(self, trained: Tokenizer) -> None:
        pieces = [piece for piece, _ in trained._backend.pre_tokenizer.pre_tokenize_str(MIXED)]
        decoded = [trained._backend.decoder.decode([piece]) for piece in pieces]
        assert decoded[:14] == [
            "It",
            "'s",
            " ",
            " don",
            "’t",
            " 190",
            "2",
            "\n\n　　",
            "コーヒー",
            "を",
            "飲",
            "んだ",
            "。「",
            "それは",
        ]
        assert " café" not in decoded
        assert "café" in decoded
        assert " x" in decoded
        assert " ❤️👨‍👩‍👧" in decoded

    def test_no_token_spans_scripts_or_grows_long(self, trained: Tokenizer) -> None:
        for token in trained.token_bytes:
            assert len(token) <= 24
            text = token.decode("utf-8", errors="ignore")
            assert sum(any(low <= c <= high for c in text) for low, high in ("ぁん", "ァヶ", "一龥", "az")) <= 1


class TestStream:
    def test_gives_only_whole_characters(self, any_tokenizer: Tokenizer) -> None:
        stream = any_tokenizer.stream()
        given_out = [stream.push(i) for i in any_tokenizer.encode(MIXED)]
        assert "".join(given_out) == MIXED
        assert "\ufffd" not in MIXED

    def test_bytes_that_are_no_characters(self) -> None:
        """U+FFFD itself, and bytes that begin or continue no character, are given out; what may still become one at the end."""
        tokenizer = Tokenizer.bytes_level()
        stream = tokenizer.stream()
        assert [stream.push(i) for i in tokenizer.encode("日")[:2]] == ["", ""]
        assert stream.push(ord("a")) == "\ufffda"
        assert [stream.push(i) for i in tokenizer.encode("\ufffd")] == ["", "", "\ufffd"]
        assert stream.push(0x80) == "\ufffd"
        assert stream.flush() == ""
        stream.push(0xE6)
        assert stream.flush() == "\ufffd"


class TestFile:
    def test_saved_and_loaded_is_the_same(self, any_tokenizer: Tokenizer, tmp_path) -> None:
        any_tokenizer.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert loaded.fingerprint == any_tokenizer.fingerprint
        assert loaded.token_bytes == any_tokenizer.token_bytes
        assert loaded.encode(MIXED + "</s>") == any_tokenizer.encode(MIXED + "</s>")
        assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]

    def test_fingerprint_is_of_the_content_not_the_layout(self, trained: Tokenizer, tmp_path) -> None:
        trained.save(tmp_path / "tokenizer.json")
        definition = json.loads((tmp_path / "tokenizer.json").read_text())
        assert Tokenizer(json.dumps(definition, indent=4)).fingerprint == trained.fingerprint
        assert Tokenizer.bytes_level().fingerprint != trained.fingerprint

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: "{", "not a tokenizer definition"),
            (lambda d: "[" * 100_000, "not a tokenizer definition: JSON nested too deeply"),
            (lambda d: "[1]", "not a tokenizer definition"),
            (lambda d: json.dumps(d | {"normalizer": None}), "normalizer"),
            (lambda d: json.dumps(d | {"pre_tokenizer": None}), "pre_tokenizer"),
            (lambda d: json.dumps(d | {"added_tokens": [], "model": d["model"] | {"vocab": {"a": 0}, "merges": []}}), "</s>"),
        ],
    )
    def test_unusable_files(self, trained: Tokenizer, tmp_path, change, message: str) -> None:
        path = tmp_path / "tokenizer.json"
        trained.save(path)
        path.write_text(change(json.loads(path.read_text())))
        with pytest.raises(TokenizerError, match=message) as caught:
            Tokenizer.load(path)
        assert str(path) in str(caught.value)

    def test_missing_file(self, tmp_path) -> None:
        with pytest.raises(TokenizerError, match=r"none.json"):
            Tokenizer.load(tmp_path / "none.json")


class TestTraining:
    def test_vocabulary_too_small(self) -> None:
        with pytest.raises(TokenizerError, match=r"vocab_size=257.*258"):
            Tokenizer.train(["text"], vocab_size=257)

    def test_vocabulary_that_the_trainer_would_abort_at(self) -> None:
        with pytest.raises(TokenizerError, match=r"vocab_size=1000000000000: use 4,194,304 or fewer"):
            Tokenizer.train(["text"], vocab_size=10**12)

    def test_no_text(self) -> None:
        with pytest.raises(TokenizerError, match="no text"):
            Tokenizer.train([], vocab_size=300)

    def test_small_text_gives_a_small_vocabulary(self) -> None:
        assert 258 < Tokenizer.train(["again and again"] * 3, vocab_size=5000).vocab_size < 300

    def test_time_of_one_long_word_is_linear(self) -> None:
        word = "".join(random.Random(0).choices("ACGT", k=200_000))
        start = time.process_time()
        tokenizer = Tokenizer.train([word], 600)
        # Some 30 s where the library gets the word whole.
        assert time.process_time() - start < 8
        assert len(tokenizer.encode(word)) < len(word) / 3

    def test_is_repeatable(self, trained: Tokenizer, books: dict[str, str]) -> None:
        again = Tokenizer.train([books["en"][:60_000], books["ja"][:20_000]], vocab_size=2000)
        assert again.fingerprint == trained.fingerprint


def test_lone_surrogate(any_tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        any_tokenizer.encode("a\ud800b")
