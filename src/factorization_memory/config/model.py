"""Options of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from factorization_memory.config.checks import (
    LARGEST,
    LARGEST_WIDTH,
    MOST_LAYERS,
    MOST_TOKENS,
    ConfigError,
    require,
    require_at_most,
    require_finite,
    require_width,
)
from factorization_memory.config.memory import MemoryConfig
from factorization_memory.config.mixers import MixerChoice, add_mixer_choice, mixer_choice, mixer_names
from factorization_memory.config.plain import require_types


@dataclass(frozen=True)
class AttentionConfig:
    """Causal self-attention with rotary positions, as in Llama, in the blocks selected by `ModelConfig.mixers`."""

    num_heads: int = 0
    """Query heads; 0 means heads of width 64 (one head if hidden_size is not a multiple of 64)."""
    num_key_value_heads: int = 0
    """Key and value heads, each shared by the same number of query heads; 0 means num_heads."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    sliding_window: int | None = None
    """Tokens that each token attends to, itself included; None means all before it."""

    def __post_init__(self) -> None:
        require_types(self, "model.attention")
        require_finite(self, "model.attention")
        require_at_most(self, "model.attention", LARGEST, "num_heads", "num_key_value_heads")
        require_at_most(self, "model.attention", MOST_TOKENS, "sliding_window")
        for name in ("num_heads", "num_key_value_heads"):
            require(getattr(self, name) >= 0, f"model.attention.{name}", getattr(self, name), "use 0 (automatic) or more")
        require(self.rope_theta > 0, "model.attention.rope_theta", self.rope_theta, "use a positive number")
        window = self.sliding_window
        require(window is None or window >= 1, "model.attention.sliding_window", window, "use 1 or more tokens, or none")


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2 (arXiv 2405.21060), in the blocks selected by `ModelConfig.mixers`."""

    state_size: int = 128
    """N: state size per channel."""
    head_size: int = 64
    """P: width of one head's values."""
    expand: float = 2.0
    """Total width of the values of all heads over hidden_size."""
    num_groups: int = 1
    """Groups of heads, each with its own input and output maps (B and C)."""
    conv_size: int = 4
    """Taps of the causal convolution."""
    chunk_size: int = 64
    """Tokens per chunk of the parallel form; affects only speed."""

    def __post_init__(self) -> None:
        require_types(self, "model.mamba2")
        require_finite(self, "model.mamba2")
        require_at_most(self, "model.mamba2", LARGEST, "state_size", "head_size", "num_groups", "conv_size", "chunk_size")
        width = self.num_groups * self.state_size
        require(
            width <= LARGEST_WIDTH,
            "model.mamba2.state_size",
            self.state_size,
            f"times num_groups this is {width:,}; the limit is {LARGEST_WIDTH:,}",
        )
        for name in ("state_size", "head_size", "num_groups", "conv_size", "chunk_size"):
            require(getattr(self, name) >= 1, f"model.mamba2.{name}", getattr(self, name), "use 1 or more")
        require(self.expand > 0, "model.mamba2.expand", self.expand, "use a positive ratio")


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Gated DeltaNet (arXiv 2412.06464), in the blocks selected by `ModelConfig.mixers`."""

    num_heads: int = 0
    """Heads of queries and keys; 0 means a total width of about 3/4 of hidden_size, as in fla."""
    num_value_heads: int = 0
    """Heads of values, a multiple of num_heads: neighbours share a key head, as in Qwen3-Next; 0 means num_heads."""
    head_size: int = 128
    """K: width of one head's queries and keys."""
    expand_v: float = 2.0
    """Width of one head's values over head_size."""
    conv_size: int = 4
    """Taps of the causal convolution over queries, keys and values."""

    def __post_init__(self) -> None:
        require_types(self, "model.gated_deltanet")
        require_finite(self, "model.gated_deltanet")
        require_at_most(
            self, "model.gated_deltanet", LARGEST, "num_heads", "num_value_heads", "head_size", "conv_size", "expand_v"
        )
        for name in ("num_heads", "num_value_heads"):
            require(getattr(self, name) >= 0, f"model.gated_deltanet.{name}", getattr(self, name), "use 0 (automatic) or more")
        for name in ("head_size", "conv_size"):
            require(getattr(self, name) >= 1, f"model.gated_deltanet.{name}", getattr(self, name), "use 1 or more")
        require(self.expand_v > 0, "model.gated_deltanet.expand_v", self.expand_v, "use a positive ratio")
        require(
            float(self.expand_v * self.head_size).is_integer(),
            "model.gated_deltanet.expand_v",
            self.expand_v,
            f"expand_v * head_size, the width of a head's values, must be a whole number; head_size is {self.head_size}",
        )

    @property
    def value_head_size(self) -> int:
        """V: width of one head's values."""
        return int(self.expand_v * self.head_size)


@dataclass(frozen=True)
class ModelConfig(MemoryConfig):
    """A language model: the fields of its memory layers and those below."""

    vocab_size: int = 0
    """Number of token ids; 0 means the tokenizer's, filled in when a run starts."""
    num_layers: int = 4
    """Number of blocks, each a token mixer (see `mixers`) and, by default, a feed-forward layer."""
    intermediate_size: int = 0
    """Width of the SwiGLU feed-forward; 0 means 8/3 of hidden_size, rounded up to a multiple of 32."""
    feed_forward: bool = True
    """Whether blocks have a feed-forward layer after the mixer; Mamba-2's own layout has none, but twice as many blocks."""
    mixers: tuple[str, ...] = ("memory",)
    """Token mixer of each block, from the first on, repeated over the depth: memory, attention, mamba2, gated_deltanet, or one
    that an installed package adds. Three memory layers per attention layer are ("memory", "memory", "memory", "attention")."""
    tie_word_embeddings: bool = True
    """Whether the output head shares the embedding's weights."""
    embedding_multiplier: float = 1.0
    """Factor on the embeddings at the input of the blocks, not in a tied output head. Embeddings start at a standard
    deviation of 0.02, the outputs of blocks near 1: a multiplier of 50 puts both on the same scale."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Options of the attention layers, if `mixers` has any."""
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    """Options of the Mamba-2 layers, if `mixers` has any."""
    gated_deltanet: GatedDeltaNetConfig = field(default_factory=GatedDeltaNetConfig)
    """Options of the Gated DeltaNet layers, if `mixers` has any."""

    def __post_init__(self) -> None:
        if isinstance(self.mixers, list):
            object.__setattr__(self, "mixers", tuple(self.mixers))
        super().__post_init__()
        require_at_most(self, "model", LARGEST, "intermediate_size")
        require_at_most(self, "model", MOST_LAYERS, "num_layers")
        require_at_most(self, "model", MOST_TOKENS, "vocab_size")
        require(self.vocab_size >= 0, "model.vocab_size", self.vocab_size, "use 0 (the tokenizer's size) or more")
        require(self.num_layers >= 1, "model.num_layers", self.num_layers, "use 1 or more")
        require(self.intermediate_size >= 0, "model.intermediate_size", self.intermediate_size, "use 0 (automatic) or more")
        require_width("model.mamba2.expand", self.mamba2.expand, self.mamba2.expand * self.hidden_size)
        require(self.embedding_multiplier > 0, "model.embedding_multiplier", self.embedding_multiplier, "use a positive number")
        require(len(self.mixers) > 0, "model.mixers", self.mixers, f"use one or more of {', '.join(map(repr, mixer_names()))}")
        for place, mixer in enumerate(self.mixers):
            choice = mixer_choice(mixer)
            if choice is None:
                remedy = f"use one of {', '.join(map(repr, mixer_names()))}"
                raise ConfigError(f"model.mixers[{place}]={mixer!r}: {remedy}")
            if mixer in self.layer_mixers:
                choice.check(self)

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer of each block."""
        return tuple(self.mixers[i % len(self.mixers)] for i in range(self.num_layers))

    @property
    def state_grows(self) -> bool:
        """Whether the model's state grows with the length read without limit."""
        choices = (mixer_choice(mixer) for mixer in set(self.layer_mixers))
        return any(choice is not None and choice.grows(self) for choice in choices)

    @property
    def attention_heads(self) -> tuple[int, int]:
        """Query heads, and key and value heads, of an attention layer, with automatic choices resolved."""
        automatic = self.hidden_size // 64 if self.hidden_size % 64 == 0 else 1
        heads = self.attention.num_heads or automatic
        return heads, self.attention.num_key_value_heads or heads

    @property
    def gated_deltanet_heads(self) -> tuple[int, int]:
        """Key heads and value heads of a Gated DeltaNet layer, with automatic choices resolved."""
        sizes = self.gated_deltanet
        heads = sizes.num_heads or max(1, round(0.75 * self.hidden_size / sizes.head_size))
        return heads, sizes.num_value_heads or heads

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layer, with the automatic choice resolved."""
        return self.intermediate_size or 32 * -(-8 * self.hidden_size // (3 * 32))


def _check_attention(config: ModelConfig) -> None:
    heads, shared = config.attention_heads
    require(
        config.hidden_size % heads == 0 and (config.hidden_size // heads) % 2 == 0,
        "model.attention.num_heads",
        heads,
        f"must divide hidden_size={config.hidden_size} into heads of even width",
    )
    require(heads % shared == 0, "model.attention.num_key_value_heads", shared, f"must divide num_heads={heads}")


def _check_mamba2(config: ModelConfig) -> None:
    sizes, inner = config.mamba2, config.mamba2.expand * config.hidden_size
    require(
        float(inner).is_integer() and int(inner) % sizes.head_size == 0,
        "model.mamba2.head_size",
        sizes.head_size,
        f"must divide the inner width expand * hidden_size = {inner:g}",
    )
    heads = int(inner) // sizes.head_size
    require(heads % sizes.num_groups == 0, "model.mamba2.num_groups", sizes.num_groups, f"must divide {heads} heads")


def _check_gated_deltanet(config: ModelConfig) -> None:
    sizes, (heads, value_heads) = config.gated_deltanet, config.gated_deltanet_heads
    width = max(heads * sizes.head_size, value_heads * sizes.value_head_size)
    require(
        width <= LARGEST_WIDTH,
        "model.gated_deltanet.head_size",
        sizes.head_size,
        f"gives all heads a total width of {width:,}; the limit is {LARGEST_WIDTH:,}",
    )
    require(
        value_heads % heads == 0,
        "model.gated_deltanet.num_value_heads",
        value_heads,
        f"use a multiple of num_heads={heads}, or 0 to use num_heads",
    )


add_mixer_choice("memory", MixerChoice())
add_mixer_choice("attention", MixerChoice(_check_attention, grows=lambda config: config.attention.sliding_window is None))
add_mixer_choice("mamba2", MixerChoice(_check_mamba2))
add_mixer_choice("gated_deltanet", MixerChoice(_check_gated_deltanet))
