"""Models made equally large: the count that is reached, and what cannot be."""

from __future__ import annotations

import dataclasses

import pytest

from factorization_memory.config import AttentionConfig, ConfigError, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from factorization_memory.models import LanguageModel
from factorization_memory.models.matching import (
    TOLERANCE,
    fitting_target,
    match_parameters,
    non_embedding_parameters,
    reach,
)

MEMORY = ModelConfig(vocab_size=50, hidden_size=128, num_layers=2, num_states=32)
ATTENTION = ModelConfig(
    vocab_size=50, hidden_size=128, num_layers=2, mixers=("attention",), attention=AttentionConfig(num_heads=2)
)
MAMBA2 = ModelConfig(
    vocab_size=50, hidden_size=128, num_layers=4, mixers=("mamba2",), feed_forward=False,
    mamba2=Mamba2Config(head_size=8, state_size=16),
)  # fmt: skip
GATED_DELTANET = ModelConfig(
    vocab_size=50, hidden_size=128, num_layers=2, mixers=("gated_deltanet",), gated_deltanet=GatedDeltaNetConfig(head_size=32)
)


def test_counts_what_the_model_has_outside_its_embedding() -> None:
    model = LanguageModel(MEMORY)
    expected = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    assert non_embedding_parameters(MEMORY) == expected
    untied = dataclasses.replace(MEMORY, vocab_size=0, tie_word_embeddings=False)
    assert non_embedding_parameters(untied) == expected


@pytest.mark.parametrize(
    "changes", [{"num_heads": 4, "conv_size": 4, "output_gate": True}, {"num_states": 64}, {"expand": 1.0}]
)
def test_varies_the_feed_forward_alone(changes: dict[str, object]) -> None:
    target = non_embedding_parameters(MEMORY)
    given = dataclasses.replace(MEMORY, **changes)
    match = match_parameters(given, target)
    assert match.parameters == non_embedding_parameters(match.model)
    assert abs(match.difference) <= TOLERANCE
    assert set(match.varied) == {"model.intermediate_size"}
    assert match.varied["model.intermediate_size"] == (given.feed_forward_size, match.model.intermediate_size)
    assert dataclasses.replace(match.model, intermediate_size=0) == given


def test_leaves_what_is_near_enough() -> None:
    match = match_parameters(MEMORY, round(non_embedding_parameters(MEMORY) / 1.004))
    assert (match.model, match.varied) == (MEMORY, {})
    assert match.difference == pytest.approx(0.004, abs=1e-4)


@pytest.mark.parametrize("given", [ATTENTION, MAMBA2, GATED_DELTANET], ids=["attention", "mamba2", "gated-deltanet"])
def test_baselines_of_equal_size(given: ModelConfig) -> None:
    target = non_embedding_parameters(MEMORY)
    match = match_parameters(given, target)
    assert abs(non_embedding_parameters(match.model) / target - 1) <= TOLERANCE
    assert match.varied
    assert (
        set(match.varied) <= {"model.intermediate_size"} if given.feed_forward else {"model.num_layers", "model.mamba2.expand"}
    )


def test_blocks_without_feed_forward_change_depth_and_width() -> None:
    given = dataclasses.replace(MEMORY, feed_forward=False, num_layers=4)
    match = match_parameters(given, non_embedding_parameters(MEMORY))
    assert set(match.varied) <= {"model.num_layers", "model.expand"}
    pattern = dataclasses.replace(given, mixers=("memory", "memory"))
    assert match_parameters(pattern, 2 * non_embedding_parameters(given)).model.num_layers % 2 == 0


def test_gated_deltanet_without_feed_forward_changes_depth_and_value_width() -> None:
    sizes = GatedDeltaNetConfig(num_heads=2, head_size=32)
    given = dataclasses.replace(GATED_DELTANET, feed_forward=False, num_layers=4, gated_deltanet=sizes)
    match = match_parameters(given, non_embedding_parameters(MEMORY))
    assert abs(match.difference) <= TOLERANCE
    assert match.varied
    assert set(match.varied) <= {"model.num_layers", "model.gated_deltanet.expand_v"}


def test_refuses_what_cannot_be_matched() -> None:
    with pytest.raises(ConfigError, match=r"model\.intermediate_size .* 1,000 parameters .* mixers alone have .* fewer layers"):
        match_parameters(MEMORY, 1000)
    own = non_embedding_parameters(MEMORY)
    for target, nearest in ((5 * own, 1408), (round(0.4 * own), 88)):
        message = (
            rf"model\.intermediate_size, up to a factor of 4 from 352, .* model\.intermediate_size={nearest}; .* nearer target"
        )
        with pytest.raises(ConfigError, match=message):
            match_parameters(MEMORY, target)
    given = dataclasses.replace(MEMORY, feed_forward=False)
    with pytest.raises(ConfigError, match=r"model\.num_layers .* a factor of 2, cannot .* nearest .*model\.num_layers=4"):
        match_parameters(given, 50 * non_embedding_parameters(given))


def test_where_one_cannot_be_matched_a_size_that_fits_all_is_found() -> None:
    """Each kind of blocks has its own range; what is proposed is one that every one of them takes."""
    memory = ModelConfig(vocab_size=1, hidden_size=64, num_layers=4, num_states=16)
    mamba = ModelConfig(
        vocab_size=1, hidden_size=64, num_layers=12, mixers=("mamba2",), feed_forward=False,
        mamba2=Mamba2Config(state_size=16, head_size=16),
    )  # fmt: skip
    for model in (memory, mamba):
        least, most = reach(model)
        assert least < non_embedding_parameters(model) < most
        for end, beyond in ((least, 0.9), (most, 1.1)):
            assert match_parameters(model, end).parameters == pytest.approx(end, rel=TOLERANCE)
            with pytest.raises(ConfigError):
                match_parameters(model, round(end * beyond))
    far = 10 * reach(memory)[1]
    number = fitting_target([memory, mamba], far)
    assert number is not None
    for model in (memory, mamba):
        match_parameters(model, number)
    deep = dataclasses.replace(mamba, num_layers=400)
    assert fitting_target([memory, deep], far) is None
