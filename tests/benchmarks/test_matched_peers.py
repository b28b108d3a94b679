"""Peers of the inference benchmark that are as large as the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from factorization_memory.benchmarks.matched_peers import MATCHED_PEERS, matched_peer
from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.config import ConfigError, ModelConfig
from factorization_memory.models.counting import count
from factorization_memory.presets import PRESETS

MODELS = {
    "default": InferenceBenchmark().model,
    "paper": replace(PRESETS["paper"]().model, vocab_size=1000),
    "base": replace(PRESETS["base"]().model, vocab_size=1000),
    "without feed-forward": ModelConfig(vocab_size=1000, hidden_size=256, num_layers=8, feed_forward=False),
    "untied": ModelConfig(vocab_size=1000, hidden_size=256, tie_word_embeddings=False),
}


@pytest.mark.parametrize("peer", MATCHED_PEERS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_peers_have_as_many_parameters(model: ModelConfig, peer: str) -> None:
    config = matched_peer(InferenceBenchmark(model, peers=(peer,)), peer)
    assert count(config).parameters == pytest.approx(count(model).parameters, rel=0.01)
    assert count(config).embedding_parameters == count(model).embedding_parameters
    assert (config.hidden_size, config.vocab_size) == (model.hidden_size, model.vocab_size)
    assert config.feed_forward == (peer != "mamba2")


def test_heads_have_the_proportions_of_their_authors() -> None:
    for width, heads in ((256, (3, 64)), (512, (3, 128)), (1024, (6, 128)), (160, (1, 120))):
        benchmark = InferenceBenchmark(ModelConfig(vocab_size=50, hidden_size=width), peers=("gated-deltanet",))
        config = matched_peer(benchmark, "gated-deltanet")
        key_heads, value_heads = config.gated_deltanet_heads
        assert (key_heads, config.gated_deltanet.head_size) == heads
        assert 4 * key_heads * config.gated_deltanet.head_size == 3 * width
        assert 2 * value_heads * config.gated_deltanet.value_head_size == 3 * width


def test_heads_are_those_that_are_set() -> None:
    benchmark = InferenceBenchmark(
        ModelConfig(vocab_size=50, hidden_size=256), transformer_heads=8, mamba2_head_size=32, mamba2_state_size=64,
        gated_deltanet_head_size=96, peers=MATCHED_PEERS,
    )  # fmt: skip
    assert matched_peer(benchmark, "transformer").attention_heads == (8, 8)
    mamba2 = matched_peer(benchmark, "mamba2").mamba2
    assert (mamba2.head_size, mamba2.state_size) == (32, 64)
    assert matched_peer(benchmark, "gated-deltanet").gated_deltanet_heads == (2, 2)


def test_a_peer_that_cannot_be_as_large_says_so() -> None:
    small = ModelConfig(vocab_size=50, hidden_size=32, num_layers=2, num_states=8)
    message = r"peers='mamba2': with model.hidden_size=32 .* 1% of the model's [\d,]+; change the model's .* or leave it out"
    with pytest.raises(ConfigError, match=message):
        matched_peer(InferenceBenchmark(small, peers=("mamba2",)), "mamba2")
    with pytest.raises(ConfigError, match=r"peers='mamba2': model.mamba2.state_size="):
        matched_peer(InferenceBenchmark(small, peers=("mamba2",), mamba2_state_size=1 << 30), "mamba2")
