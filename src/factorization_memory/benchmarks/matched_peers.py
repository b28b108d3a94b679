"""Configurations of the inference benchmark's peers of this package's own layers, as large as the model to compare."""

from __future__ import annotations

from dataclasses import replace

from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.config import AttentionConfig, ConfigError, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from factorization_memory.models.matching import match_parameters, non_embedding_parameters, reach

MATCHED_PEERS = ("transformer", "mamba2", "gated-deltanet")
TOLERANCE = 0.01
"""Maximum relative difference in parameters; Mamba-2 without feed-forward layers cannot always come closer."""


def matched_peer(benchmark: InferenceBenchmark, peer: str) -> ModelConfig:
    """The peer, one of `MATCHED_PEERS`, with our model's vocabulary and width, and as many parameters outside embedding and
    head.

    The Transformer and Gated DeltaNet have our model's depth, and the width of their feed-forward layers is varied. Mamba-2, in
    its authors' layout, has none but twice the depth; that and the width of its layers are varied.

    Raises ConfigError if it cannot be made that large.
    """
    target = non_embedding_parameters(benchmark.model)
    try:
        config = _unmatched(benchmark, peer)
    except ConfigError as error:
        raise ConfigError(f"peers={peer!r}: {error}") from None
    try:
        return match_parameters(config, target, TOLERANCE).model
    except ConfigError:
        least, most = reach(config)
        raise ConfigError(
            f"peers={peer!r}: with model.hidden_size={config.hidden_size} and num_layers={config.num_layers} it can have "
            f"{least:,} to {most:,} parameters outside the embedding, none within {TOLERANCE:.0%} of the model's {target:,}; "
            "change the model's width or depth or the sizes of this peer's heads, or leave it out"
        ) from None


def _unmatched(benchmark: InferenceBenchmark, peer: str) -> ModelConfig:
    model = benchmark.model
    # A block without feed-forward layer has about half the parameters of one with it.
    depth = model.num_layers if model.feed_forward else max(1, model.num_layers // 2)
    layout = ModelConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=depth,
        tie_word_embeddings=model.tie_word_embeddings,
    )
    match peer:
        case "transformer":
            return replace(layout, mixers=("attention",), attention=AttentionConfig(num_heads=benchmark.transformer_heads))
        case "mamba2":
            mamba2 = Mamba2Config(state_size=benchmark.mamba2_state_size, head_size=benchmark.mamba2_head_size)
            return replace(layout, mixers=("mamba2",), num_layers=2 * depth, feed_forward=False, mamba2=mamba2)
        case "gated-deltanet":
            key_size = benchmark.gated_deltanet_key_size
            heads = 3 * model.hidden_size // (4 * key_size)
            delta = GatedDeltaNetConfig(num_heads=heads, head_size=key_size)
            return replace(layout, mixers=("gated_deltanet",), gated_deltanet=delta)
    raise ValueError(f"peer={peer!r}: use one of {', '.join(MATCHED_PEERS)}")
