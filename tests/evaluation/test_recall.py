"""Tokens by what the window before them held."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factorization_memory.config import ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation import evaluate_loss
from factorization_memory.evaluation.recall import distances, kinds
from factorization_memory.models import LanguageModel
from factorization_memory.reports.recall_text import as_text, distances_as_text
from factorization_memory.runs.recall_names import KINDS, distance_name, distance_ranges


def expected(inputs: list[int], targets: list[int]) -> list[str | None]:
    """Token by token."""
    followers: dict[int, set[int]] = {}
    found: list[str | None] = []
    for before, token in zip(inputs, targets, strict=True):
        seen = followers.setdefault(before, set())
        found.append(None if token < 0 else "repeated" if token in seen else "contradicted" if seen else "new")
        if token >= 0:
            seen.add(token)
    return found


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 5)), min_size=1, max_size=40))
def test_kinds(window: list[tuple[int, int]]) -> None:
    inputs, targets = (list(each) for each in zip(*window, strict=True))
    got = kinds(np.array(inputs), np.array([-100 if target < 0 else target for target in targets]))
    assert [(*KINDS, None)[place] for place in got] == expected(inputs, targets)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), min_size=1, max_size=40))
def test_distances(window: list[tuple[int, int]]) -> None:
    last: dict[tuple[int, int], int] = {}
    wanted = []
    for place, pair in enumerate(window):
        wanted.append(place - last[pair] if pair in last else 0)
        if pair[1] >= 0:
            last[pair] = place
    inputs, targets = (np.array(each) for each in zip(*window, strict=True))
    got = distances(inputs, np.where(targets < 0, -100, targets))
    assert got.tolist() == wanted
    assert ((got > 0) == (kinds(inputs, np.where(targets < 0, -100, targets)) == KINDS.index("repeated"))).all()


def test_distances_as_people_read_them() -> None:
    assert [distance_name(*part) for part in distance_ranges()] == ["1-15", "16-63", "64-255", "256+"]
    near = [{"start": 16, "end": 64, "loss": 1.25, "tokens": 10}]
    parts = {"repeated": {"loss": 1.5, "tokens": 10, "by_distance": near}, "new": {"loss": 4.0, "tokens": 30}}
    assert dict(zip(KINDS, as_text(parts), strict=True)) == {
        "repeated": "1.500 (25%)", "contradicted": "", "new": "4.000 (75%)",
    }  # fmt: skip
    far = {"repeated": {"loss": 2.0, "tokens": 1, "by_distance": [{"start": 256, "end": None, "loss": 2.0, "tokens": 1}]}}
    headings, cells = distances_as_text({"en": parts, "ja": far, "none": {"new": parts["new"]}})
    assert headings == ["16-63 ago", "256+ ago"]
    assert cells == {"en": ["1.250 (25%)", ""], "ja": ["", "2.000 (100%)"], "none": ["", ""]}
    assert distances_as_text({"none": {"new": parts["new"]}}) == ([], {"none": []})


def test_losses_of_the_kinds_make_up_the_whole() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.bytes_level()
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_states=4))
    tokens = np.array([*tokenizer.encode("to be, or not to be: that is the question: to be"), tokenizer.document_end])
    starts = np.array([0, 20, len(tokens)])
    plain = evaluate_loss(model, tokens, starts, tokenizer, context_length=15)
    result = evaluate_loss(model, tokens, starts, tokenizer, context_length=15, recall=True)
    parts = result.pop("recall")
    assert result == pytest.approx(plain)
    near = parts["repeated"].pop("by_distance")
    for name in ("tokens", "bytes"):
        assert sum(part[name] for part in near) == parts["repeated"][name]
    nats = sum(part["loss"] * part["tokens"] for part in near)
    assert nats == pytest.approx(parts["repeated"]["loss"] * parts["repeated"]["tokens"])
    assert set(parts) == set(KINDS)
    assert sum(part["tokens"] for part in parts.values()) == plain["tokens"]
    assert sum(part["bytes"] for part in parts.values()) == plain["bytes"]
    assert sum(part["loss"] * part["tokens"] for part in parts.values()) == pytest.approx(plain["loss"] * plain["tokens"])
    one = evaluate_loss(model, tokens, np.array([0, len(tokens)]), tokenizer, context_length=100, recall=True)["recall"]
    losses, _ = model(*(torch.from_numpy(x.copy())[None] for x in (tokens[:-1], tokens[1:])), reduction="none")
    text = tokens.tolist()
    names = expected(text[:-2], text[1:-1])  # the last is no text
    for name in KINDS:
        mean = np.mean([loss for loss, kind in zip(losses[0].tolist(), names, strict=False) if kind == name])
        assert one[name]["loss"] == pytest.approx(mean, rel=1e-5)
    ago = distances(tokens[:-1], tokens[1:])[: len(names)]
    assert [part["start"] for part in one["repeated"]["by_distance"]] == [1, 16]
    for part in one["repeated"]["by_distance"]:
        chosen = [loss for loss, far in zip(losses[0].tolist(), ago, strict=False) if part["start"] <= far < part["end"]]
        assert part["loss"] == pytest.approx(np.mean(chosen), rel=1e-5)
        assert part["tokens"] == len(chosen)
