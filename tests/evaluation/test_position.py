from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from factorization_memory.config import ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation import beyond_context, loss_by_position, reading_stretches
from factorization_memory.evaluation.position import _error_of_ratio, position_edges
from factorization_memory.models import LanguageModel

TOKENIZER = Tokenizer.bytes_level()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_layers=2, num_states=4, conv_size=3, affinity_init=2.0)
    )


def stretch(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(97, 123, length).astype(np.uint16)


def losses(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Loss at positions 1, 2, ... of a whole reading from an empty memory."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None, :-1])[0][0].double()
    return -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].numpy()


@pytest.mark.parametrize("context_length", [96, 256, 512])
@pytest.mark.parametrize("max_position", [100, 8192, 131072])
def test_edges_hold_the_context_and_its_powers_of_two(context_length: int, max_position: int) -> None:
    edges = position_edges(context_length, max_position)
    assert edges[0] == 1
    assert edges[-1] == max_position
    assert (np.diff(edges) > 0).all()
    doubled = [context_length * 2**k for k in range(12) if context_length * 2**k < max_position - 1]
    assert set(doubled) <= set(edges.tolist())


@pytest.mark.parametrize("segment", [16, 37, 4096])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_bins_are_those_of_a_whole_reading(model: LanguageModel, segment: int, batch_size: int) -> None:
    stretches = [stretch(150, 1), stretch(301, 2), stretch(40, 3)]
    context = 32
    result = loss_by_position(
        model, stretches, TOKENIZER, context_length=context, max_position=260, segment=segment, batch_size=batch_size
    )
    carried = [losses(model, s[:261]) for s in stretches]
    restarted = [
        np.concatenate([losses(model, s[i : i + context + 1]) for i in range(0, len(s) - 1, context)])
        for s in (s[:261] for s in stretches)
    ]
    assert result["max_position"] == 260
    assert result["tokens"] == 149 + 260 + 39
    assert sum(b["tokens"] for b in result["bins"]) == result["tokens"]
    for b in result["bins"]:
        here = slice(b["start"] - 1, b["end"] - 1)
        kept = np.concatenate([c[here] for c in carried])
        anew = np.concatenate([r[here] for r in restarted])
        assert b["tokens"] == b["bytes"] == len(kept)
        assert b["loss"] == pytest.approx(kept.mean(), rel=1e-4)
        assert b["restarted_loss"] == pytest.approx(anew.mean(), rel=1e-4)
        assert b["gain"] == pytest.approx((anew - kept).mean(), abs=1e-5)
        assert b["bits_per_byte"] == pytest.approx(kept.mean() / math.log(2), rel=1e-4)
        if len(kept) > 1:
            assert b["loss_error"] == pytest.approx(kept.std(ddof=1) / math.sqrt(len(kept)), rel=1e-3)
            assert b["gain_error"] == pytest.approx((anew - kept).std(ddof=1) / math.sqrt(len(kept)), rel=1e-2, abs=1e-6)
        gains = [(r[here] - c[here]) for r, c in zip(restarted, carried, strict=True) if len(c[here])]
        if len(gains) == 1:
            assert b["gain_stretch_error"] is None
        else:
            residuals = np.array([g.sum() - (anew - kept).mean() * len(g) for g in gains])
            expected = np.sqrt(len(gains) / (len(gains) - 1) * (residuals**2).sum()) / len(kept)
            assert b["gain_stretch_error"] == pytest.approx(expected, rel=1e-2, abs=1e-5)


def test_the_error_over_stretches_of_one_length_is_that_of_their_means() -> None:
    means = np.array([0.1, 0.4, 0.3])
    parts = np.stack((np.full(3, 50.0), 50 * means), axis=1)
    assert _error_of_ratio(parts) == pytest.approx(means.std(ddof=1) / math.sqrt(3))


def test_within_the_context_both_readings_are_the_same(model: LanguageModel) -> None:
    result = loss_by_position(model, [stretch(400)], TOKENIZER, context_length=64, max_position=399, segment=50)
    within = [b for b in result["bins"] if b["end"] <= 64]
    beyond = [b for b in result["bins"] if b["start"] > 64]
    assert within
    assert beyond
    assert all(abs(b["gain"]) < 1e-5 for b in within)
    assert all(abs(b["gain"]) > 1e-5 for b in beyond)


def test_beyond_context_joins_its_bins(model: LanguageModel) -> None:
    tokens = stretch(600)
    result = loss_by_position(model, [tokens], TOKENIZER, context_length=32, max_position=512)
    part = beyond_context(result, 16)
    kept = losses(model, tokens[:513])[255:512]
    assert part is not None
    assert (part["start"], part["end"]) == (256, 513)
    assert part["tokens"] == len(kept)
    assert part["loss"] == pytest.approx(kept.mean(), rel=1e-4)
    assert part["loss_error"] == pytest.approx(kept.std(ddof=1) / math.sqrt(len(kept)), rel=1e-3)
    assert beyond_context(result, 64) is None


def test_special_tokens_are_read_but_not_scored(model: LanguageModel) -> None:
    tokens = stretch(50)
    tokens[20] = TOKENIZER.document_end
    result = loss_by_position(model, [tokens], TOKENIZER, context_length=8, max_position=100)
    assert result["tokens"] == 48


def test_stretches_begin_documents_where_there_are_enough() -> None:
    starts = np.array([0, 100, 400, 450, 1000])
    tokens = np.arange(1000)
    found = reading_stretches(tokens, starts, max_position=200, count=2)
    assert [(s[0], len(s)) for s in found] == [(450, 201), (100, 201)]


def test_stretches_spread_over_a_long_document_and_stay_inside_it() -> None:
    tokens = np.arange(10_000)
    found = reading_stretches(tokens, np.array([0, 9_000, 9_001, 10_000]), max_position=2_000, count=5)
    long = [s for s in found if s[0] < 9_000]
    assert [s[0] for s in long] == [0, 3499, 6999]
    assert all(len(s) == 2_001 for s in long)
    assert all(s[-1] < 9_000 or s[0] >= 9_001 for s in found)
    assert len(found) == 5


def test_stretches_of_a_short_document_start_in_its_first_half() -> None:
    found = reading_stretches(np.arange(1_000), np.array([0, 1_000]), max_position=5_000, count=4)
    assert [s[0] for s in found] == [0, 166, 333, 500]
    assert all(s[-1] == 999 for s in found)
    # Hardly different starts would be the same evidence again.
    assert len(reading_stretches(np.arange(10), np.array([0, 10]), max_position=5_000, count=4)) == 1


def test_progress_counts_both_readings(model: LanguageModel) -> None:
    told: list[tuple[int, int]] = []
    loss_by_position(
        model,
        [stretch(50), stretch(80)],
        TOKENIZER,
        context_length=16,
        max_position=60,
        progress=lambda *x: told.append(x),
    )
    assert told[-1] == (2 * (49 + 60), 2 * (49 + 60))


def test_bad_arguments(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="context_length=0"):
        loss_by_position(model, [stretch(50)], TOKENIZER, context_length=0)
    with pytest.raises(ValueError, match="to score; give"):
        loss_by_position(model, [stretch(1)], TOKENIZER, context_length=8)
