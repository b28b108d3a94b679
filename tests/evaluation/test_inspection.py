from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from factorization_memory.config import ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation import inspect_text
from factorization_memory.evaluation.inspection import MAX_TOKENS, memory_length, whole_pieces
from factorization_memory.models import LanguageModel
from factorization_memory.models.routing import RoutingHealth, observe_routing
from factorization_memory.reports import inspection_html

TOKENIZER = Tokenizer.bytes_level()
TEXT = "The cat </script> sat.\n吾輩は猫である。"


def build(top_k: int | None) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_layers=2, num_states=8, num_heads=2, top_k=top_k)
    )


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_strongest_states_are_those_of_the_routing(top_k: int | None) -> None:
    model = build(top_k)
    result = inspect_text(model, TOKENIZER, TEXT, strongest=2)
    tokens = torch.tensor([TOKENIZER.encode(TEXT)])
    with torch.no_grad(), observe_routing(model) as observed:
        model(tokens)
    assert result["tokens"] == tokens[0].tolist()
    assert len(result["layers"]) == 2
    assert result["num_states"] == 8
    for layer, (routing,) in zip(result["layers"], observed, strict=True):
        for head, record in enumerate(layer["heads"]):
            for kind, weights in (("writes", routing.update), ("reads", routing.merge)):
                values, places = weights[0, :, head].sort(dim=-1, descending=True)
                states = places if routing.indices is None else routing.indices[0, :, head].gather(-1, places)
                assert record[kind]["states"] == states[:, :2].tolist()
                np.testing.assert_allclose(record[kind]["weights"], values[:, :2].numpy(), atol=6e-5)


@pytest.mark.parametrize("top_k", [None, 2])
def test_memory_length_and_shares(top_k: int | None) -> None:
    model = build(top_k)
    result = inspect_text(model, TOKENIZER, TEXT)
    health = RoutingHealth(model)
    with torch.no_grad(), health.observe():
        model(torch.tensor([TOKENIZER.encode(TEXT)]))
    for layer, measured in zip(result["layers"], health.summary(), strict=True):
        for head, record in enumerate(layer["heads"]):
            states = record["states"]
            assert sorted(s["state"] for s in states) == list(range(8))
            assert sum(s["write_share"] for s in states) == pytest.approx(1, abs=1e-3)
            assert sum(s["read_share"] for s in states) == pytest.approx(1, abs=1e-3)
            assert [s["write_share"] for s in states] == sorted((s["write_share"] for s in states), reverse=True)
            for s in states:
                expected = measured["memory_length"][head][s["state"]]
                assert s["memory_length"] == (None if expected is None else pytest.approx(expected, rel=1e-2, abs=0.06))


def test_a_state_is_written_after_one_piece_and_holds_what_followed() -> None:
    """One state for each letter, strong writes: "b" follows "a", "c" follows "b"."""
    letters = {letter: TOKENIZER.encode(letter)[0] for letter in "abc"}
    model = LanguageModel(
        ModelConfig(
            vocab_size=TOKENIZER.vocab_size, hidden_size=4, num_layers=1, num_states=4, top_k=1, update_lag=1, rates="head",
            feed_forward=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.embedding.weight.zero_()
        for state, token in enumerate(letters.values()):
            model.embedding.weight[token, state] = 1
        model.blocks[0].mixer.affinity.weight.copy_(torch.eye(4))
    result = inspect_text(model, TOKENIZER, "abcabc")
    assert result["update_lag"] == 1
    states = {state["state"]: state for state in result["layers"][0]["heads"][0]["states"]}
    for state, (own, following) in enumerate(("ab", "bc", "ca")):
        assert [piece["text"] for piece in states[state]["read_at"]] == [own]
        assert [piece["text"] for piece in states[state]["written_after"]] == [own]
        assert [piece["text"] for piece in states[state]["pieces"]] == [following]
    html = inspection_html(result)
    assert '"written after"' in html
    assert "the previous token reads" in html
    assert "written after" not in inspection_html(inspect_text(build(2), TOKENIZER, TEXT))


def test_memory_length_of_known_rates() -> None:
    assert memory_length(np.full(10, 1 - np.exp(-1 / 20))) == pytest.approx(20)
    assert memory_length(np.zeros(10)) is None
    assert memory_length(np.ones(10)) == pytest.approx(0.1)


def test_pieces_of_a_state_count_the_text() -> None:
    result = inspect_text(build(2), TOKENIZER, "aab猫猫猫")
    for layer in result["layers"]:
        for head in layer["heads"]:
            for state in head["states"]:
                assert len(state["pieces"]) <= 8
                assert all({"a": 2, "b": 1, "猫": 3}[piece["text"]] == piece["count"] for piece in state["pieces"])
                assert all(piece["weight"] >= 0 for piece in state["pieces"])


def test_pieces_are_whole_characters_and_cover_every_token() -> None:
    tokens = TOKENIZER.encode(TEXT)
    pieces = whole_pieces(TOKENIZER, tokens)
    assert [piece["text"] for piece in pieces] == list(TEXT)
    assert [piece["start"] for piece in pieces[1:]] == [piece["end"] for piece in pieces[:-1]]
    assert pieces[0]["start"] == 0
    assert pieces[-1]["end"] == len(tokens)
    cut = whole_pieces(TOKENIZER, tokens[:-1])
    assert cut[-1]["end"] == len(tokens) - 1
    assert cut[-1]["text"] == "�"


def test_a_token_that_ends_inside_a_character_joins_the_next() -> None:
    halves = SimpleNamespace(token_bytes=["猫".encode()[:2], "猫".encode()[2:] + "犬".encode()[:1], "犬".encode()[1:], b"x"])
    pieces = whole_pieces(halves, [0, 1, 2, 3])
    assert pieces == [{"text": "猫犬", "start": 0, "end": 3}, {"text": "x", "start": 3, "end": 4}]


def test_html_is_one_page_that_carries_its_data() -> None:
    result = inspect_text(build(2), TOKENIZER, TEXT)
    html = inspection_html(json.loads(json.dumps(result)), title="A <b> title")
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|https?://", html)
    assert "A &lt;b&gt; title" in html
    assert "<b> title" not in html
    found = re.search(r'<script type="application/json">(.*?)</script>', html, re.S)
    assert found is not None
    data = json.loads(found[1])
    assert "".join(piece["text"] for piece in data["pieces"]) == TEXT
    assert len(data["layers"][1]["heads"]) == 2
    assert html.count("<script") == 2


def test_bad_text() -> None:
    model = build(2)
    with pytest.raises(ValueError, match="empty; give at least one"):
        inspect_text(model, TOKENIZER, "")
    with pytest.raises(ValueError, match=f"at most {MAX_TOKENS}"):
        inspect_text(model, TOKENIZER, "a" * (MAX_TOKENS + 1))
