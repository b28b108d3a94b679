from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from factorization_memory.config import ConfigError, RunConfig
from factorization_memory.data.shards import pack
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.experiments.evaluation import held_out_corpus, require_recall_texts, told_by


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, False),
        ({"total": {"tokens": 90}}, True),
        ({"total": {"tokens": 110}}, False),
        ({"position": {}}, True),
        ({"total": {"tokens": 90}, "position": {"en": {"max_position": 2048, "stretches": 8}}}, False),
        ({"position": {"en": {"max_position": 1024, "stretches": 4}}}, True),
        ({"total": {"tokens": 90}, "evaluated": {"checkpoint": "step-2", "corpus_fingerprint": "a"}}, False),
    ],
)
def test_which_evaluation_stays(change: dict[str, Any], kept: bool) -> None:
    """Only one that the new one adds nothing to."""
    before = {
        "evaluated": {"checkpoint": "step-1", "corpus_fingerprint": "a"},
        "total": {"tokens": 100},
        "recall": {},
        "position": {"en": {"max_position": 1024, "stretches": 8}},
    }
    assert told_by(before | change, before) is kept
    assert told_by(before, before | {"recall_tasks": {"items": 8}})
    assert not told_by(before | {"recall_tasks": {"items": 8}}, before | {"recall_tasks": {"items": 4}})
    assert not told_by(before, {name: x for name, x in before.items() if name != "recall"})


def test_the_text_to_evaluate_on(tmp_path: Path) -> None:
    """That of the run, or another that is named, if its tokens are the model's."""
    (tmp_path / "text.txt").write_text("word " * 200)
    tokenizer = Tokenizer.bytes_level()
    packed = pack([(None, tmp_path / "text.txt")], tokenizer, tmp_path / "corpus", holdout="tail", holdout_fraction=0.5)
    nothing = RunConfig()
    trained = dataclasses.replace(nothing, data=dataclasses.replace(nothing.data, corpus=str(tmp_path / "corpus")))
    for corpus, config in ((None, trained), (tmp_path / "corpus", nothing)):
        with held_out_corpus(corpus, tmp_path / "model", tokenizer, config) as found:
            assert found.fingerprint == packed.fingerprint
    require_recall_texts(packed, (256, 4096))
    with pytest.raises(ConfigError, match="the shortest haystack needs 4096"):
        require_recall_texts(packed, (4096,))
    other = Tokenizer.train(["a few words, and a few more words"], 260)
    for corpus, model_tokenizer, message in (
        (None, tokenizer, "an exported model does not record its corpus"),
        (tmp_path / "gone", tokenizer, "the run's corpus no longer exists"),
        (tmp_path / "corpus", other, "packed with a different tokenizer"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            held_out_corpus(corpus, tmp_path / "model", model_tokenizer, nothing),
        ):
            pass


def test_the_books_are_held_out_for_the_packages_own_model() -> None:
    with held_out_corpus(None, None, Tokenizer.bytes_level(), RunConfig()) as books:
        assert books.folder.exists()
        splits = [each.splits for each in books.sources.values()]
        train, held_out = (sum(each[part].text_bytes for each in splits) for part in ("train", "validation"))
        assert held_out > 50 * train
    assert not books.folder.exists()
