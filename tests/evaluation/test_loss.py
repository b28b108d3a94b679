from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from factorization_memory.config import ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation import evaluate_corpus, evaluate_loss
from factorization_memory.models import LanguageModel

TOKENIZER = Tokenizer.bytes_level()
TEXTS = ["It was the best of times, it was the worst of times.", "吾輩は猫である。", "ab", "a", ""]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_layers=2, num_states=4))


def packed(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    documents = [[*TOKENIZER.encode(text), TOKENIZER.document_end] for text in texts]
    starts = np.cumsum([0, *map(len, documents)])
    return np.array([token for document in documents for token in document], dtype=np.uint16), starts.astype(np.int64)


def by_hand(model: LanguageModel, texts: list[str], context_length: int) -> list[float]:
    """Nats of every scored token, one window at a time through plain logits."""
    nats = []
    for text in texts:
        tokens = TOKENIZER.encode(text)
        for start in range(0, len(tokens) - 1, context_length):
            window = tokens[start : start + context_length + 1]
            with torch.no_grad():
                logits = model(torch.tensor([window[:-1]]))[0][0].double()
            nats += (-logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]]).tolist()
    return nats


@pytest.mark.parametrize("context_length", [1, 7, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_token_once_from_an_empty_memory(model: LanguageModel, context_length: int, batch_size: int) -> None:
    tokens, starts = packed(TEXTS)
    result = evaluate_loss(model, tokens, starts, TOKENIZER, context_length=context_length, batch_size=batch_size)
    nats = by_hand(model, TEXTS, context_length)
    scored = sum(max(len(TOKENIZER.encode(text)) - 1, 0) for text in TEXTS)
    assert result["tokens"] == len(nats) == scored
    assert result["bytes"] == scored  # a byte-level token is a byte
    assert result["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(np.sum(nats) / math.log(2) / scored, rel=1e-5)


def test_bytes_are_those_of_the_scored_tokens(model: LanguageModel) -> None:
    text = "the cat and the hat and the bat " * 20
    trained = Tokenizer.train([text], 290)
    bigger = LanguageModel(ModelConfig(vocab_size=trained.vocab_size, hidden_size=16, num_layers=1, num_states=4))
    tokens = trained.encode(text)
    stream = np.array([*tokens, trained.document_end], dtype=np.uint16)
    result = evaluate_loss(bigger, stream, np.array([0, len(stream)]), trained, context_length=16)
    assert result["tokens"] == len(tokens) - 1
    assert result["bytes"] == len(text) - len(trained.token_bytes[tokens[0]])
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * result["tokens"] / math.log(2) / result["bytes"])


def test_max_tokens_takes_windows_spread_over_the_text(model: LanguageModel) -> None:
    tokens, starts = packed(["a" * 500 + "b" * 500])
    part = evaluate_loss(model, tokens, starts, TOKENIZER, context_length=10, max_tokens=100)
    assert part["tokens"] == pytest.approx(100, abs=10)
    whole = evaluate_loss(model, tokens, starts, TOKENIZER, context_length=10)
    assert part["loss"] == pytest.approx(whole["loss"], rel=0.05)


def test_corpus_by_source_and_in_total(model: LanguageModel) -> None:
    def source(texts: list[str]) -> SimpleNamespace:
        tokens, starts = packed(texts)
        return SimpleNamespace(splits={"validation": SimpleNamespace(tokens=tokens, document_starts=starts)})

    corpus = SimpleNamespace(
        tokenizer=TOKENIZER, sources={"en": source(TEXTS[:1]), "ja": source(TEXTS[1:]), "none": source([])}
    )
    seen: list[tuple[str, int, int]] = []
    result = evaluate_corpus(model, corpus, context_length=8, batch_size=2, progress=lambda *told: seen.append(told))
    nats = {name: by_hand(model, texts, 8) for name, texts in {"en": TEXTS[:1], "ja": TEXTS[1:]}.items()}
    assert list(result["sources"]) == ["en", "ja"]
    for name, values in nats.items():
        assert result["sources"][name]["loss"] == pytest.approx(np.mean(values), rel=1e-5)
    everything = nats["en"] + nats["ja"]
    assert result["total"]["tokens"] == len(everything)
    assert result["total"]["bits_per_byte"] == pytest.approx(np.sum(everything) / math.log(2) / len(everything), rel=1e-5)
    assert {name for name, _, _ in seen} == {"en", "ja"}
    assert all(0 < done <= total for _, done, total in seen)
    assert seen[-1][1] == seen[-1][2]
    with pytest.raises(ValueError, match="split='validation'"):
        evaluate_corpus(model, SimpleNamespace(tokenizer=TOKENIZER, sources={"none": source([""])}), context_length=8)


def test_padding_is_masked(model: LanguageModel) -> None:
    """Who observes the routing must be able to tell text from padding: real tokens are as many as predictions."""
    tokens, starts = packed(TEXTS)
    real = []

    def spy(_: object, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
        mask = options["padding_mask"]
        real.append(inputs[0].numel() if mask is None else int(mask.sum()))

    hook = model.register_forward_pre_hook(spy, with_kwargs=True)
    evaluate_loss(model, tokens, starts, TOKENIZER, context_length=16, batch_size=4)
    hook.remove()
    assert sum(real) == sum(len(TOKENIZER.encode(text)) for text in TEXTS)


def test_mode_is_as_before_and_no_graph_is_kept(model: LanguageModel) -> None:
    tokens, starts = packed(TEXTS)
    model.train()
    evaluate_loss(model, tokens, starts, TOKENIZER, context_length=8)
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("field", "value"), [("context_length", 0), ("batch_size", 0), ("max_tokens", -1)])
def test_bad_arguments(model: LanguageModel, field: str, value: int) -> None:
    tokens, starts = packed(TEXTS)
    with pytest.raises(ValueError, match=f"{field}={value}"):
        evaluate_loss(model, tokens, starts, TOKENIZER, **{"context_length": 8, field: value})


def test_nothing_to_score(model: LanguageModel) -> None:
    tokens, starts = packed(["a", ""])
    with pytest.raises(ValueError, match="to score; give"):
        evaluate_loss(model, tokens, starts, TOKENIZER, context_length=8)
