"""A model's configuration for `transformers`."""

from __future__ import annotations

import difflib
from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from factorization_memory.config import ConfigError, ModelConfig, without_retired
from factorization_memory.models.pretrained.format import MODEL_TYPE, RENAMED, config_fields, config_from_fields, field_names
from factorization_memory.models.pretrained.shim import AUTO_MAP

_DEFAULT = config_fields(ModelConfig())


class FactorizationMemoryConfig(PreTrainedConfig):
    """The configuration of a model: the fields of `factorization_memory.config.ModelConfig`, flat, three of them renamed: to
    the names of other models (`num_hidden_layers`, `rms_norm_eps`), or to avoid a clash with sampling
    (`affinity_temperature`).

    Raises:
        ConfigError: a field has the wrong type, conflicts with another, or is unknown and looks misspelt.
    """

    model_type = MODEL_TYPE
    # A list, as `Trainer` adds another to it.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    # Which modules FSDP2 shards together, and whether it keeps the full weights after a forward.
    base_model_fsdp_plan = {  # noqa: RUF012
        "embedding": "free_full_weight",
        "blocks.*": "free_full_weight",
        "final_norm": "keep_full_weight",
    }

    vocab_size: int = 32000
    hidden_size: int = _DEFAULT["hidden_size"]
    num_hidden_layers: int = _DEFAULT["num_hidden_layers"]
    intermediate_size: int = 0
    feed_forward: bool = _DEFAULT["feed_forward"]
    mixers: list[str] | tuple[str, ...] = tuple(_DEFAULT["mixers"])
    tie_word_embeddings: bool = _DEFAULT["tie_word_embeddings"]
    embedding_multiplier: float = _DEFAULT["embedding_multiplier"]
    rms_norm_eps: float = _DEFAULT["rms_norm_eps"]
    num_states: int = _DEFAULT["num_states"]
    top_k: int | None = _DEFAULT["top_k"]
    num_heads: int = _DEFAULT["num_heads"]
    expand: float = _DEFAULT["expand"]
    affinity_temperature: float = _DEFAULT["affinity_temperature"]
    affinity_init: float = _DEFAULT["affinity_init"]
    update_lag: int = _DEFAULT["update_lag"]
    rates: str = _DEFAULT["rates"]
    update_rate_init: list[float] | tuple[float, float] = tuple(_DEFAULT["update_rate_init"])
    conv_size: int = _DEFAULT["conv_size"]
    value_skip: bool = _DEFAULT["value_skip"]
    output_gate: bool = _DEFAULT["output_gate"]
    attention: dict[str, Any] = field(default_factory=lambda: dict(_DEFAULT["attention"]))
    mamba2: dict[str, Any] = field(default_factory=lambda: dict(_DEFAULT["mamba2"]))
    gated_deltanet: dict[str, Any] = field(default_factory=lambda: dict(_DEFAULT["gated_deltanet"]))
    backend: str = _DEFAULT["backend"]
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        names = field_names()
        kwargs = without_retired(ModelConfig.__name__, kwargs)
        for name in kwargs:
            near = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, names, n=1, cutoff=0.8)
            if near and not hasattr(PreTrainedConfig, name):
                raise ConfigError(f"{name}={kwargs[name]!r}: no such field; did you mean {near[0]!r}?")
        model = self.model_config()
        # Lists, as in JSON, and automatic choices resolved.
        for name, value in config_fields(model).items():
            setattr(self, name, value)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing; `transformers` would copy this file next to each saved model, but the shim there imports it."""

    def model_config(self) -> ModelConfig:
        """The configuration of the `LanguageModel`. Raises `ConfigError` for fields set to invalid values."""
        return config_from_fields({name: getattr(self, name) for name in field_names()})

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs: Any) -> FactorizationMemoryConfig:
        """The configuration of the same model; `kwargs` are further fields, such as `eos_token_id`."""
        return cls(**config_fields(config), **kwargs)
