"""Converts configurations and weights between well-known models, as `transformers` writes them, and ours.

The converted model computes the same function: `LanguageModel(config)` with these weights returns the logits of the original.
Unsupported are Llamas with scaled rotary positions (`rope_scaling`, Llama 3.1 and later) or head width other than d / H.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from factorization_memory.config import ConfigError, ModelConfig, from_dict

NATIVE = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mamba2": "Mamba2ForCausalLM"}
"""Model types that `transformers` supports without our code, and their classes there."""


def native_type(config: ModelConfig) -> str | None:
    """The type in `NATIVE` that a model matches; None if there is none."""
    kinds = set(config.layer_mixers)
    if kinds == {"attention"} and config.feed_forward:
        return "llama" if config.attention.sliding_window is None else "mistral"
    if kinds == {"mamba2"} and not config.feed_forward and float(config.mamba2.expand).is_integer():
        return "mamba2"
    return None


def native_fields(config: ModelConfig, context_length: int) -> dict[str, Any]:
    """The fields of config.json of a model with a `native_type`.

    They lack `embedding_multiplier`: unless it is 1, it is folded into the embedding, which is then not tied to the head.

    Args:
        context_length: tokens of a training sequence, for `max_position_embeddings`.
    """
    kind = native_type(config)
    assert kind is not None, "asked for by callers"
    fields = {
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings and config.embedding_multiplier == 1,
    }
    if kind == "mamba2":
        sizes = config.mamba2
        return fields | {
            "state_size": sizes.state_size,
            "num_heads": int(sizes.expand * config.hidden_size) // sizes.head_size,
            "head_dim": sizes.head_size,
            "expand": int(sizes.expand),
            "n_groups": sizes.num_groups,
            "conv_kernel": sizes.conv_size,
            "chunk_size": sizes.chunk_size,
            "layer_norm_epsilon": config.norm_eps,
            "use_bias": False,
            "use_conv_bias": True,
        }
    heads, shared = config.attention_heads
    theta = config.attention.rope_theta
    fields |= {
        "intermediate_size": config.feed_forward_size,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": config.hidden_size // heads,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": context_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    return fields | ({"sliding_window": config.attention.sliding_window} if kind == "mistral" else {})


def native_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The inverse: our configuration from a config.json whose `model_type` is in `NATIVE`.

    Raises:
        ConfigError: our models do not support it, or it is not such a configuration; the message names the field.
    """
    kind = fields["model_type"]
    try:
        return from_dict(ModelConfig, _mamba2_values(fields) if kind == "mamba2" else _llama_values(fields), "")
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"{error.args[0]}: missing; use the complete config.json of such a model") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"a field of the wrong kind ({error}); use the config.json of a {kind} model as it was saved"
        ) from None


def _mamba2_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(fields, use_bias=False, use_conv_bias=True, hidden_act="silu")
    low, high = fields.get("time_step_limit") or (0.0, math.inf)
    # JSON has no infinity; this is how `transformers` writes it.
    if low != 0 or high not in (math.inf, {"__float__": "Infinity"}):
        raise ConfigError(f"time_step_limit={[low, high]!r}: not supported; use [0.0, Infinity]")
    heads, inner = fields["num_heads"], fields["expand"] * fields["hidden_size"]
    if heads * fields["head_dim"] != inner:
        raise ConfigError(f"num_heads={heads}: heads of head_dim={fields['head_dim']} must fill expand * hidden_size = {inner}")
    sizes = {
        "state_size": fields["state_size"],
        "head_size": fields["head_dim"],
        "expand": fields["expand"],
        "num_groups": fields["n_groups"],
        "conv_size": fields["conv_kernel"],
        "chunk_size": fields["chunk_size"],
    }
    common = {"mixers": ["mamba2"], "feed_forward": False, "norm_eps": fields["layer_norm_epsilon"]}
    return _common(fields) | common | {"mamba2": sizes}


def _llama_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(fields, attention_bias=False, mlp_bias=False, hidden_act="silu")
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or fields.get("rope_theta") or 10000.0
    scaled = {name: value for name, value in rope.items() if value not in (None, "default")}
    if scaled:
        raise ConfigError(f"rope_parameters={scaled!r}: scaled rotary positions are not supported; use rope_type='default'")
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    if (fields.get("head_dim") or width // heads) * heads != width:
        raise ConfigError(
            f"head_dim={fields['head_dim']!r}: only heads of width hidden_size / heads are supported; use {width // heads}"
        )
    attention = {
        "num_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads") or heads,
        "rope_theta": theta,
        "sliding_window": fields.get("sliding_window") if fields["model_type"] == "mistral" else None,
    }
    sizes = {"intermediate_size": fields["intermediate_size"], "norm_eps": fields["rms_norm_eps"]}
    return _common(fields) | sizes | {"mixers": ["attention"], "attention": attention}


def _common(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_layers": fields["num_hidden_layers"],
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
    }


def _refuse(fields: Mapping[str, Any], **takes: Any) -> None:
    """Raises ConfigError for a field whose value differs from what our models fix."""
    for name, value in takes.items():
        if fields.get(name, value) != value:
            raise ConfigError(f"{name}={fields[name]!r}: not supported; use {value!r}")


def to_native(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `LanguageModel` under the names of its `native_type`."""
    left = dict(weights)
    kind = native_type(config)
    stem, embedding, norm = ("backbone", "embeddings", "norm_f") if kind == "mamba2" else ("model", "embed_tokens", "norm")
    table, head = left.pop("embedding.weight"), left.pop("head.weight", None)
    result = {f"{stem}.{norm}.weight": left.pop("final_norm.weight")}
    if config.embedding_multiplier == 1:
        result[f"{stem}.{embedding}.weight"] = table
        if not config.tie_word_embeddings:
            assert head is not None, "part of a whole state"
            result["lm_head.weight"] = head
    else:
        result[f"{stem}.{embedding}.weight"] = table * config.embedding_multiplier
        result["lm_head.weight"] = table if head is None else head
    for i in range(config.num_layers):
        old, new = f"blocks.{i}.", f"{stem}.layers.{i}."
        if kind == "mamba2":
            result[f"{new}norm.weight"] = left.pop(f"{old}mixer_norm.weight")
            result[f"{new}mixer.conv1d.weight"] = left.pop(f"{old}mixer.convolution.weight").T[:, None]
            for ours, theirs in _MAMBA2:
                result[f"{new}mixer.{theirs}"] = left.pop(f"{old}mixer.{ours}")
            continue
        heads, shared = config.attention_heads
        sizes = [config.hidden_size // heads * count for count in (heads, shared, shared)]
        joined = left.pop(f"{old}mixer.query_key_value.weight").split(sizes)
        result |= {f"{new}self_attn.{part}_proj.weight": tensor for part, tensor in zip("qkv", joined, strict=True)}
        result[f"{new}self_attn.o_proj.weight"] = left.pop(f"{old}mixer.output.weight")
        result[f"{new}input_layernorm.weight"] = left.pop(f"{old}mixer_norm.weight")
        result[f"{new}post_attention_layernorm.weight"] = left.pop(f"{old}feed_forward_norm.weight")
        joined = left.pop(f"{old}feed_forward.gate_up.weight").chunk(2)
        result |= {f"{new}mlp.{part}_proj.weight": tensor for part, tensor in zip(("gate", "up"), joined, strict=True)}
        result[f"{new}mlp.down_proj.weight"] = left.pop(f"{old}feed_forward.down.weight")
    assert not left, f"weights without a place: {sorted(left)}"
    return result


def from_native(kind: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model of type `kind`, one of `NATIVE`, under our names; raises ValueError as the functions below do."""
    return from_mamba2(weights) if kind == "mamba2" else from_llama(weights)


def from_llama(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `LanguageModel` with `mixers=("attention",)` from that of a `LlamaForCausalLM`, or a `MistralForCausalLM`
    (whose window is `attention.sliding_window`).

    Raises:
        ValueError: a weight is missing, or has no counterpart in our model, such as a bias.
    """
    names = _Names(weights)
    result = names.ends("model.embed_tokens.weight", "model.norm.weight")
    for i in names.layers("model.layers."):
        old, new = f"model.layers.{i}.", f"blocks.{i}."
        parts = [names.take(f"{old}self_attn.{part}_proj.weight") for part in "qkv"]
        result[f"{new}mixer.query_key_value.weight"] = torch.cat(parts)
        result[f"{new}mixer.output.weight"] = names.take(f"{old}self_attn.o_proj.weight")
        result[f"{new}mixer_norm.weight"] = names.take(f"{old}input_layernorm.weight")
        result[f"{new}feed_forward_norm.weight"] = names.take(f"{old}post_attention_layernorm.weight")
        parts = [names.take(f"{old}mlp.{part}_proj.weight") for part in ("gate", "up")]
        result[f"{new}feed_forward.gate_up.weight"] = torch.cat(parts)
        result[f"{new}feed_forward.down.weight"] = names.take(f"{old}mlp.down_proj.weight")
    names.check_all_taken()
    return result


def from_mamba2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `LanguageModel` with `mixers=("mamba2",)` and `feed_forward=False` from that of a `Mamba2ForCausalLM`.

    Raises:
        ValueError: a weight is missing, or has no counterpart in our model, such as the bias of a projection.
    """
    names = _Names(weights)
    result = names.ends("backbone.embeddings.weight", "backbone.norm_f.weight")
    for i in names.layers("backbone.layers."):
        old, new = f"backbone.layers.{i}.", f"blocks.{i}."
        result[f"{new}mixer_norm.weight"] = names.take(f"{old}norm.weight")
        result[f"{new}mixer.convolution.weight"] = names.take(f"{old}mixer.conv1d.weight")[:, 0].T
        for ours, theirs in _MAMBA2:
            result[f"{new}mixer.{ours}"] = names.take(f"{old}mixer.{theirs}")
    names.check_all_taken()
    return result


_MAMBA2 = (
    ("input.weight", "in_proj.weight"),
    ("convolution.bias", "conv1d.bias"),
    ("log_decay_rate", "A_log"),
    ("step_size_bias", "dt_bias"),
    ("skip", "D"),
    ("norm_weight", "norm.weight"),
    ("output.weight", "out_proj.weight"),
)
"""Weights of a Mamba-2 layer that differ only in name."""


class _Names:
    """Weights that are taken one by one, so that leftovers are detected."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.left = dict(weights)

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise ValueError(f"weights: {name} is missing; use the complete state dict of such a model")
        return self.left.pop(name)

    def ends(self, embedding: str, norm: str) -> dict[str, Tensor]:
        """The weights outside the blocks. Without a head, it is tied to the embedding."""
        table = self.take(embedding)
        head = self.left.pop("lm_head.weight", table)
        return {"embedding.weight": table, "head.weight": head, "final_norm.weight": self.take(norm)}

    def layers(self, prefix: str) -> Iterable[int]:
        """The indices of the layers."""
        return sorted({int(name.removeprefix(prefix).split(".")[0]) for name in self.left if name.startswith(prefix)})

    def check_all_taken(self) -> None:
        if self.left:
            raise ValueError(f"weights: no place for {', '.join(sorted(self.left))} in our model; remove them")
