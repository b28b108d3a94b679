"""The models for `transformers`.

Shapes: B sequences, T tokens, S tokens of a mask, d hidden size, V vocabulary size, N packed sequences.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from factorization_memory.layers import MixerState
from factorization_memory.models.backbone import Backbone
from factorization_memory.models.block import Block
from factorization_memory.models.huggingface.base import FactorizationMemoryPreTrainedModel
from factorization_memory.models.huggingface.cache import CACHE_NAME, CacheLayer, FactorizationMemoryCache
from factorization_memory.models.huggingface.configuration import FactorizationMemoryConfig
from factorization_memory.models.huggingface.generation import FactorizationMemoryGenerationMixin, silenced
from factorization_memory.models.huggingface.packing import Rows, borders_of_numbers, borders_of_positions, padding_mask
from factorization_memory.models.language_model import LanguageModel


class CheckpointingBlock(GradientCheckpointingLayer, Block):
    """A block with the activation checkpointing of `transformers`, around its forward, so that hooks run once."""


class FactorizationMemoryModel(FactorizationMemoryPreTrainedModel, Backbone):
    """The `Backbone` of a `LanguageModel` with the interface of `transformers`."""

    def __init__(self, config: FactorizationMemoryConfig) -> None:
        super().__init__(config)
        self._add_layers(config.model_config(), CheckpointingBlock)
        self.gradient_checkpointing = False
        cast(Any, self).post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, Block):
            super()._init_weights(module)
            return
        parameters = dict(module.named_parameters())
        missing = [name for name, p in parameters.items() if not getattr(p, "_is_hf_initialized", False)]
        sharded = any(hasattr(p, "device_mesh") for p in parameters.values())
        if len(missing) == len(parameters) and not sharded:
            module.reset_parameters()
        elif missing:
            # A block is initialised as a whole: initialise another one and copy the missing weights from it.
            model_config = self.config.model_config()
            mixer = next(m for b, m in zip(self.blocks, model_config.layer_mixers, strict=True) if b is module)
            with parameters[missing[0]].device:
                other = Block(model_config, mixer)
                other.reset_parameters()
            for name in missing:
                parameter, value = cast(Any, parameters[name]), other.get_parameter(name).to(parameters[name].dtype)
                if hasattr(parameter, "device_mesh"):
                    from torch.distributed.tensor import distribute_tensor

                    # All processes use the first one's values.
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the embedding."""
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FactorizationMemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cache: FactorizationMemoryCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """The hidden states of the tokens.

        Args:
            input_ids: int64 `[B, T]`; or else
            inputs_embeds: `[B, T, d]`, as returned by `get_input_embeddings()`, before `embedding_multiplier`.
            attention_mask: `[B, S]`, 0 for padding, which may be anywhere and has no effect; S is T, or with a cache the
                tokens read before plus T.
            past_key_values: cache to continue from, modified in place. Also as `cache`, its name since transformers 5.24.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1), which do not see each other; also as
                `cu_seq_lens_q`. Collators that pack sequences may instead pass `position_ids` `[B, T]`, which restart at each
                sequence, or `seq_idx` `[B, T]`, each token's sequence index.
        """
        cache = _the_one(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: got both or neither, takes exactly one")
        x = self.embed(cast(Tensor, input_ids)) if inputs_embeds is None else self.scale_embeddings(inputs_embeds)
        tokens = x.shape[1]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cu_seqlens = kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
        if cu_seqlens is None and kwargs.get("seq_idx") is not None:
            cu_seqlens = borders_of_numbers(kwargs["seq_idx"], x)
        layers = self._cache_layers(cache, x.shape[0])
        mask = padding_mask(attention_mask, x, layers[0].seen if layers else 0)
        borders, position_ids, rows = cu_seqlens, kwargs.get("position_ids"), Rows(x)
        if borders is not None and cache is not None:
            raise ValueError(f"cu_seqlens: cannot be combined with {CACHE_NAME}; packed sequences start from empty memory")
        if borders is None and position_ids is not None and cache is None:
            borders, rows.real = borders_of_positions(position_ids, x, mask)
            mask = mask if borders is None else None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache and borders is None and not self._checkpoints():
            cache = FactorizationMemoryCache(len(self.blocks))
            layers = cache.own_layers()
        if cache is not None:
            cache.note(input_ids, mask)
        states = [layer.state for layer in layers] if layers else [None] * len(self.blocks)
        # A step updates the state in place; gradients and masks need the full forward.
        step = tokens == 1 and mask is None and borders is None and not torch.is_grad_enabled()
        step = step and all(state is not None for state in states)
        hidden = [x] if output_hidden_states else []

        def keep_hidden(x: Tensor) -> Tensor:
            if borders is None:
                hidden.append(x[:, None] if step else x)
                return x
            # Continue with the returned tensor, so that it gets gradients.
            hidden.append(rows.apart(x))
            return rows.joined(hidden[-1])

        x = x[:, 0] if step else x if borders is None else rows.joined(x)
        x, states = self.run_blocks(
            x, states, borders, mask, cache is not None, step=step, after_block=keep_hidden if output_hidden_states else None
        )
        for layer, state in zip(layers, states if layers else [], strict=True):
            layer.state, layer.is_initialized = state, True
            layer.seen += tokens
        x = self.final_norm(x)
        if step:
            x = x[:, None]
        elif borders is not None:
            x = rows.apart(x)
        if output_hidden_states:
            hidden[-1] = x
        result = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            **{CACHE_NAME: cache},
        )
        return result.to_tuple() if _as_tuple(self.config, return_dict) else result

    def _checkpoints(self) -> bool:
        """Whether activations are recomputed in backward."""
        return self.gradient_checkpointing and self.training

    def _call_block(self, block: Block, *arguments: Any) -> tuple[Tensor, MixerState | None]:
        if self._checkpoints() and not isinstance(block, CheckpointingBlock):  # shared with a LanguageModel
            return cast(Any, self._gradient_checkpointing_func)(block.__call__, *arguments)
        return super()._call_block(block, *arguments)

    def _cache_layers(self, cache: Cache | None, batch_size: int) -> list[CacheLayer]:
        if cache is None:
            return []
        if not isinstance(cache, FactorizationMemoryCache):
            raise ValueError(
                f"{CACHE_NAME}: got {type(cache).__name__}, takes FactorizationMemoryCache, as returned by an earlier call"
            )
        kinds = [block.mixer.state_type for block in self.blocks]
        layers = cache.own_layers()
        states = [layer.state for layer in layers]
        if len(states) != len(kinds) or not all(s is None or isinstance(s, k) for s, k in zip(states, kinds, strict=True)):
            raise ValueError(f"{CACHE_NAME}: from another model; use one returned by an earlier call of this model")
        if states[0] is not None and states[0].batch_size != batch_size:
            raise ValueError(
                f"{CACHE_NAME}: has {states[0].batch_size} sequences, but the input {batch_size}; "
                "use batch_repeat_interleave or batch_select_indices first"
            )
        return layers


def _the_one(
    past_key_values: FactorizationMemoryCache | None, cache: FactorizationMemoryCache | None
) -> FactorizationMemoryCache | None:
    """The cache, under whichever of its two names it was passed."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values, cache: two names of one argument, but got two caches; drop one")
    return past_key_values if cache is None else cache


def _as_tuple(config: PreTrainedConfig, return_dict: bool | None) -> bool:
    return not (config.return_dict if return_dict is None else return_dict)


class FactorizationMemoryForCausalLM(FactorizationMemoryPreTrainedModel, FactorizationMemoryGenerationMixin):
    """A `LanguageModel` for `AutoModelForCausalLM`."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: FactorizationMemoryConfig) -> None:
        with silenced("transformers.generation.configuration_utils"):
            super().__init__(config)
        self._correct_generation_config()
        self.model = FactorizationMemoryModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_language_model(cls, model: LanguageModel, **kwargs: Any) -> FactorizationMemoryForCausalLM:
        """The same model, sharing its weights; `kwargs` are further fields of the configuration, such as `eos_token_id`."""
        with torch.device("meta"):
            result = cls(FactorizationMemoryConfig.from_model_config(model.config, **kwargs))
        result.model.embedding, result.model.blocks = model.embedding, model.blocks
        result.model.final_norm, result.lm_head = model.final_norm, model.head
        return result.train(model.training)

    def language_model(self) -> LanguageModel:
        """The same model as a `LanguageModel`, sharing its weights, for use without `transformers`, such as steps in a CUDA
        graph."""
        config = FactorizationMemoryConfig.from_dict(self.config.to_dict() | {"vocab_size": self.lm_head.out_features})
        with torch.device("meta"):
            result = LanguageModel(config.model_config())
        result.embedding, result.blocks = self.model.embedding, self.model.blocks
        result.final_norm, result.head = self.model.final_norm, self.lm_head
        return result.train(self.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FactorizationMemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: FactorizationMemoryCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token `[B, T, V]`, and with `labels` (int64 `[B, T]`, -100 for none; shifted here) the mean loss
        in nats per token. All else is as in `FactorizationMemoryModel`.

        Args:
            logits_to_keep: number of last tokens to return logits for, or their indices; 0 means all.
        """
        cache = _the_one(past_key_values, cache)
        outputs = self.model(input_ids, attention_mask, cache, inputs_embeds, use_cache, output_hidden_states, True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if labels.shape != outputs.last_hidden_state.shape[:2]:
                takes = list(outputs.last_hidden_state.shape[:2])
                raise ValueError(f"labels: got shape {tuple(labels.shape)}, takes the shape of the tokens, {takes}")
            if logits.shape[:2] != labels.shape:
                raise ValueError(f"logits_to_keep={logits_to_keep!r}: cannot be combined with labels; a loss needs all logits")
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.lm_head.out_features, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: getattr(outputs, CACHE_NAME)}
        )
        return result.to_tuple() if _as_tuple(self.config, return_dict) else result


class FactorizationMemoryForSequenceClassification(GenericForSequenceClassification, FactorizationMemoryPreTrainedModel):
    """A model that scores the last token of each sequence for `num_labels` classes."""

    def __init__(self, config: FactorizationMemoryConfig) -> None:
        super().__init__(config)
