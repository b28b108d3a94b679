"""Weights of well-known models under the names of ours, from state dictionaries as `transformers` writes them.

The models are the same functions: `LanguageModel(config)` with these weights gives the logits of the original; but for Llamas
whose rotary positions are scaled (`rope_scaling`, Llama 3.1 and later) or whose heads are not of width d / H, which ours lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def from_llama(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `LanguageModel` with `mixers=("attention",)` from that of a `LlamaForCausalLM`, or a `MistralForCausalLM`
    (whose window is `attention.sliding_window`).

    Raises:
        ValueError: a weight is missing, or is one that our model has no place for, such as a bias.
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
        ValueError: a weight is missing, or is one that our model has no place for, such as the bias of a projection.
    """
    names = _Names(weights)
    result = names.ends("backbone.embeddings.weight", "backbone.norm_f.weight")
    for i in names.layers("backbone.layers."):
        old, new = f"backbone.layers.{i}.", f"blocks.{i}."
        result[f"{new}mixer_norm.weight"] = names.take(f"{old}norm.weight")
        result[f"{new}mixer.convolution.weight"] = names.take(f"{old}mixer.conv1d.weight")[:, 0].T
        for ours, theirs in (
            ("input.weight", "in_proj.weight"),
            ("convolution.bias", "conv1d.bias"),
            ("log_decay_rate", "A_log"),
            ("step_size_bias", "dt_bias"),
            ("skip", "D"),
            ("norm_weight", "norm.weight"),
            ("output.weight", "out_proj.weight"),
        ):
            result[f"{new}mixer.{ours}"] = names.take(f"{old}mixer.{theirs}")
    names.check_all_taken()
    return result


class _Names:
    """Weights that are taken one by one, so that none is forgotten."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.left = dict(weights)

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise ValueError(f"weights: {name} is missing; give the whole state dictionary of such a model")
        return self.left.pop(name)

    def ends(self, embedding: str, norm: str) -> dict[str, Tensor]:
        """What stands around the blocks. A state without a head has it tied to the embedding."""
        table = self.take(embedding)
        head = self.left.pop("lm_head.weight", table)
        return {"embedding.weight": table, "head.weight": head, "final_norm.weight": self.take(norm)}

    def layers(self, prefix: str) -> Iterable[int]:
        """The numbers of the layers."""
        return sorted({int(name.removeprefix(prefix).split(".")[0]) for name in self.left if name.startswith(prefix)})

    def check_all_taken(self) -> None:
        if self.left:
            raise ValueError(f"weights: no place for {', '.join(sorted(self.left))}; our model has none of these")
