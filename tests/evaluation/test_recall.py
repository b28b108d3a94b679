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
from factorization_memory.evaluation.recall import KINDS, kinds
from factorization_memory.models import LanguageModel


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
    assert set(parts) == set(KINDS)
    assert sum(part["tokens"] for part in parts.values()) == plain["tokens"]
    assert sum(part["bytes"] for part in parts.values()) == plain["bytes"]
    assert sum(part["loss"] * part["tokens"] for part in parts.values()) == pytest.approx(plain["loss"] * plain["tokens"])
    one = evaluate_loss(model, tokens, np.array([0, len(tokens)]), tokenizer, context_length=100, recall=True)["recall"]
    losses, _ = model.loss(*(torch.from_numpy(x.copy())[None] for x in (tokens[:-1], tokens[1:])), reduction="none")
    text = tokens.tolist()
    names = expected(text[:-2], text[1:-1])  # the last is no text
    for name in KINDS:
        mean = np.mean([loss for loss, kind in zip(losses[0].tolist(), names, strict=False) if kind == name])
        assert one[name]["loss"] == pytest.approx(mean, rel=1e-5)
