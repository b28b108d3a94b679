from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from factorization_memory.config import DataConfig, ModelConfig, RunConfig
from factorization_memory.data.shards import PackedCorpus, pack
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation import NgramModel, evaluate_corpus, evaluate_run, run
from factorization_memory.evaluation.run import document_texts
from factorization_memory.models import LanguageModel


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PackedCorpus:
    folder = tmp_path_factory.mktemp("corpus")
    words = np.random.default_rng(0).choice(["river", "stone", "wind", "the", "of", "moon"], 3000)
    (folder / "en.txt").write_text(" ".join(words), encoding="utf-8")
    (folder / "ja.txt").write_text(
        "".join(np.random.default_rng(1).choice(list("猫犬川石風月のはが。"), 3000)), encoding="utf-8"
    )
    inputs = [("en", folder / "en.txt"), ("ja", folder / "ja.txt")]
    pack(inputs, Tokenizer.bytes_level(), folder / "packed", holdout="tail", holdout_fraction=0.2)
    return PackedCorpus.open(folder / "packed")


@pytest.fixture(scope="module")
def config(corpus: PackedCorpus) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocab_size=corpus.tokenizer.vocab_size, hidden_size=16, num_layers=2, num_states=8, top_k=2),
        data=DataConfig(context_length=32),
    )


@pytest.fixture(scope="module")
def model(config: RunConfig) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config.model)


def test_everything_in_one_record(model: LanguageModel, corpus: PackedCorpus, config: RunConfig) -> None:
    told: list[str] = []
    result = evaluate_run(model, corpus, config, stretches=3, progress=lambda what, done, total: told.append(what))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    losses = evaluate_corpus(model, corpus, context_length=32)
    assert result["sources"] == losses["sources"]
    assert result["total"] == losses["total"]
    assert list(result["position"]) == ["en", "ja"]
    for position in result["position"].values():
        assert position["max_position"] == 16 * 32
        assert {"2", "4", "16"} == set(position["beyond"])
    assert len(result["routing"]) == 2
    assert sum(result["routing"][0]["share"][0]) == pytest.approx(1, abs=1e-4)
    assert set(told) == {"loss, en", "loss, ja", "loss by position, en", "loss by position, ja"}


def test_yardstick_is_fitted_on_training_text_of_all_sources(corpus: PackedCorpus) -> None:
    result = run.ngram_yardstick(corpus, (2, 3))
    assert result is not None
    texts = {
        split: {name: document_texts(source.splits[split], corpus.tokenizer) for name, source in corpus.sources.items()}
        for split in ("train", "validation")
    }
    assert all(text.decode() for parts in texts["validation"].values() for text in parts)
    by_hand = NgramModel([*texts["train"]["en"], *texts["train"]["ja"]], 3)
    assert result["sources"]["ja"]["3"] == pytest.approx(by_hand.bits_per_byte(texts["validation"]["ja"]))
    everything = [*texts["validation"]["en"], *texts["validation"]["ja"]]
    assert result["total"]["3"] == pytest.approx(by_hand.bits_per_byte(everything))
    assert result["training_bytes"] == sum(source.splits["train"].text_bytes for source in corpus.sources.values())


def test_parts_that_can_be_left_out(
    model: LanguageModel, corpus: PackedCorpus, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "NGRAM_BYTES", 100)
    result = evaluate_run(model, corpus, config, max_position=0, max_tokens=200)
    assert "ngram" not in result
    assert "position" not in result
    assert result["sources"]["en"]["tokens"] <= 250
