"""The models as `transformers` has them.

Shapes: B sequences, T tokens, S tokens that a mask speaks of, d hidden size, V vocabulary size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from factorization_memory.layers.norm import RMSNorm
from factorization_memory.models.finite import not_finite
from factorization_memory.models.huggingface.cache import CACHE_NAME, CacheLayer, FactorizationMemoryCache
from factorization_memory.models.huggingface.configuration import FactorizationMemoryConfig
from factorization_memory.models.language_model import Block, LanguageModel
from factorization_memory.models.pretrained.format import INDEX_NAME, indexed_files
from factorization_memory.models.pretrained.shim import save_shim


class CheckpointingBlock(GradientCheckpointingLayer, Block):
    """A block that `transformers` makes checkpoint its activations: its forward, so that hooks run once."""


class FactorizationMemoryPreTrainedModel(PreTrainedModel):
    """What the classes below share."""

    config_class = FactorizationMemoryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block", "CheckpointingBlock")
    _skip_keys_device_placement = ("past_key_values", "cache")
    # Assisted and prompt-lookup decoding, which would crop the cache, are refused with a clear error.
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **kwargs: Any) -> Any:
        """As in `transformers`, but of safetensors alone (other files of weights can hold programs), and finite.

        Raises ValueError for weights that are NaN or infinite, and for another format.
        """
        if kwargs.get("use_safetensors") not in (None, True):
            raise ValueError(f"use_safetensors={kwargs['use_safetensors']!r}: only safetensors is read; leave it out")
        kwargs["use_safetensors"] = True
        if os.path.isfile(os.path.join(str(pretrained_model_name_or_path), INDEX_NAME)):
            indexed_files(Path(pretrained_model_name_or_path))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *arguments, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        wrong = not_finite(dict(model.named_parameters()))
        if wrong is not None:
            raise ValueError(f"{pretrained_model_name_or_path}: weight {wrong!r} is NaN or infinite; use an earlier checkpoint")
        return loaded

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing, where `transformers` would copy this file beside each model it saves: the shim there imports it."""

    def save_pretrained(self, save_directory: Any, *arguments: Any, **kwargs: Any) -> None:
        """As in `transformers`, and the file through which `trust_remote_code=True` finds these classes."""
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub=True: call the model's push_to_hub() instead, which uploads all files")
        given = kwargs.get("state_dict")
        wrong = not_finite(dict(self.named_parameters()) if given is None else given)
        if wrong is not None:
            raise ValueError(f"{save_directory}: not written, since weight {wrong!r} is NaN or infinite; save an earlier state")
        super().save_pretrained(save_directory, *arguments, **kwargs)
        if kwargs.get("is_main_process", True):
            save_shim(save_directory)

    def _initialize_weights(self, module: nn.Module, *_: Any, **__: Any) -> None:
        # Without what is meant for custom code, which leaves out modules such as blocks that have no weights of their own.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial weights, as a `LanguageModel` has them; those that were loaded stay."""
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            # Linear layers within a block are set again, with it: see FactorizationMemoryModel.
            init.normal_(module.weight, std=0.02)


class FactorizationMemoryModel(FactorizationMemoryPreTrainedModel):
    """Embedding, blocks and last norm of a `LanguageModel`."""

    def __init__(self, config: FactorizationMemoryConfig) -> None:
        super().__init__(config)
        model_config = config.model_config()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(CheckpointingBlock(model_config, mixer) for mixer in model_config.layer_mixers)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

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
            # A block is initialised as a whole: another one is, and what is missing is taken from it.
            model_config = self.config.model_config()
            mixer = next(m for b, m in zip(self.blocks, model_config.layer_mixers, strict=True) if b is module)
            with parameters[missing[0]].device:
                other = Block(model_config, mixer)
                other.reset_parameters()
            for name in missing:
                parameter, value = cast(Any, parameters[name]), other.get_parameter(name).to(parameters[name].dtype)
                if hasattr(parameter, "device_mesh"):
                    from torch.distributed.tensor import distribute_tensor

                    # The values of the first process for all.
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Take another embedding."""
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
        """What the blocks make of the tokens.

        Args:
            input_ids: int64 `[B, T]`; or else
            inputs_embeds: `[B, T, d]`, as `get_input_embeddings()` gives them, before `embedding_multiplier`.
            attention_mask: `[B, S]`, 0 for padding, which may be anywhere and then is as if it were not there; S is T, or with
                a cache the tokens read before and T.
            past_key_values: what was read before. It is changed. Also as `cache`, its name from transformers 5.24 on.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1), which do not see each other; also as
                `cu_seq_lens_q`. Collators that pack sequences may tell them by `position_ids` `[B, T]` alone, which begin anew,
                or by `seq_idx` `[B, T]`, the number of each token's sequence.
        """
        cache = _the_one(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: got both or none, takes exactly one of them")
        x = cast(Tensor, self.embedding(input_ids)) if inputs_embeds is None else inputs_embeds
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        tokens = x.shape[1]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        blocks, checkpointed = cast(list[Block], self.blocks), self.gradient_checkpointing and self.training
        cu_seqlens = kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
        if cu_seqlens is None and kwargs.get("seq_idx") is not None:
            cu_seqlens = _borders_of_numbers(kwargs["seq_idx"], x)
        layers = self._cache_layers(cache, x.shape[0])
        mask = _padding_mask(attention_mask, x, layers[0].seen if layers else 0)
        borders, position_ids, rows = cu_seqlens, kwargs.get("position_ids"), _Rows(x)
        if borders is not None and cache is not None:
            raise ValueError(f"cu_seqlens: not together with {CACHE_NAME}; packed sequences each begin anew")
        if borders is None and position_ids is not None and cache is None:
            borders, rows.real = _borders(position_ids, x, mask)
            mask = mask if borders is None else None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache and borders is None and not checkpointed:
            cache = FactorizationMemoryCache(len(blocks))
            layers = cache.own_layers()
        # Reading a token in place is what a step is made for; what needs a gradient or a mask goes the long way.
        step = tokens == 1 and mask is None and borders is None and not torch.is_grad_enabled()
        keep = cache is not None
        if cache is not None:
            cache.note(input_ids, mask)
        hidden = [x] if output_hidden_states else []
        if borders is not None:
            x = rows.joined(x)
        for i, block in enumerate(blocks):
            layer = layers[i] if layers else None
            state = None if layer is None else layer.state
            if step and state is not None:
                x = block.step(x[:, 0], state)[:, None]
            elif checkpointed and not isinstance(block, CheckpointingBlock):  # shared with a LanguageModel
                checkpoint = cast(Any, self._gradient_checkpointing_func)
                x, state = checkpoint(block.__call__, x, state, borders, mask, keep)
            else:
                x, state = block(x, state, borders, mask, keep)
            if layer is not None:
                layer.state, layer.is_initialized = state, True
                layer.seen += tokens
            if output_hidden_states and borders is None:
                hidden.append(x)
            elif output_hidden_states:
                # What is returned is what goes on, so that it gets gradients.
                hidden.append(rows.apart(x))
                x = rows.joined(hidden[-1])
        x = self.final_norm(x)
        if borders is not None:
            x = rows.apart(x)
        if output_hidden_states:
            hidden[-1] = x
        result = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            **{CACHE_NAME: cache},
        )
        return result.to_tuple() if _as_tuple(self.config, return_dict) else result

    def _cache_layers(self, cache: Cache | None, batch_size: int) -> list[CacheLayer]:
        if cache is None:
            return []
        if not isinstance(cache, FactorizationMemoryCache):
            raise ValueError(
                f"{CACHE_NAME}: got {type(cache).__name__}, takes FactorizationMemoryCache, such as an earlier call returned"
            )
        kinds = [block.mixer.state_type for block in cast(list[Block], self.blocks)]
        layers = cache.own_layers()
        states = [layer.state for layer in layers]
        if len(states) != len(kinds) or not all(s is None or isinstance(s, k) for s, k in zip(states, kinds, strict=True)):
            raise ValueError(f"{CACHE_NAME}: it is of another model; take one that an earlier call of this model returned")
        if states[0] is not None and states[0].batch_size != batch_size:
            raise ValueError(
                f"{CACHE_NAME}: it is of {states[0].batch_size} sequences, the input has {batch_size}; "
                "use batch_repeat_interleave or batch_select_indices first"
            )
        return layers


def _the_one(
    past_key_values: FactorizationMemoryCache | None, cache: FactorizationMemoryCache | None
) -> FactorizationMemoryCache | None:
    """The cache, by whichever of its two names it was given."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values, cache: these are two names of one argument and got two caches; leave one out")
    return past_key_values if cache is None else cache


def _padding_mask(mask: Tensor | None, x: Tensor, seen: int) -> Tensor | None:
    """The part of an attention mask that speaks of these tokens, bool `[B, T]`; None if they are all real."""
    if mask is None:
        return None
    batch, tokens = x.shape[:2]
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (tokens, seen + tokens):
        sizes = f"[{batch}, {tokens}]" + (f" or [{batch}, {seen + tokens}]" if seen else "")
        raise ValueError(f"attention_mask: got shape {tuple(mask.shape)}, takes {sizes}, 0 for padding")
    mask = mask[:, -tokens:] != 0
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


@dataclass
class _Rows:
    """Rows of a batch that are read as one.

    Attributes:
        like: a tensor `[B, T, ...]`.
        real: which of the B T tokens are read, int64; None for all.
    """

    like: Tensor
    real: Tensor | None = None

    def joined(self, x: Tensor) -> Tensor:
        """x `[B, T, d]`, one row behind the other, `[1, B T, d]` or fewer."""
        flat = x.flatten(0, 1)
        return (flat if self.real is None else flat[self.real.to(x.device)])[None]

    def apart(self, x: Tensor) -> Tensor:
        """The rows `[B, T, d]` of what is joined; zeros for tokens that were not read."""
        shape = (*self.like.shape[:2], x.shape[-1])
        if self.real is None:
            return x.view(shape)
        return x.new_zeros(shape).flatten(0, 1).index_copy(0, self.real.to(x.device), x[0]).view(shape)


def _borders(position_ids: Tensor, x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The borders of the sequences in all rows, one row behind the other, from positions that do not go on, whatever padding
    stands between; None if each row is one sequence. And the places of the tokens that are no padding, None for all."""
    if position_ids.dim() != 2 or position_ids.shape[1] != x.shape[1] or position_ids.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"position_ids: got shape {tuple(position_ids.shape)}, takes {list(x.shape[:2])}")
    position = position_ids.expand(x.shape[0], -1).flatten()
    row = torch.arange(position.numel(), device=position.device) // x.shape[1]
    real = None if mask is None else mask.flatten().nonzero()[:, 0]
    if real is not None:
        position, row = position[real], row[real]
    anew, other = position.diff() <= 0, row.diff() > 0
    if not bool((anew & ~other).any()):
        return None, None
    starts = torch.cat((anew.new_ones(1), anew | other))
    return torch.cat((starts.nonzero()[:, 0], row.new_tensor([len(starts)]))).to(torch.int32), real


def _borders_of_numbers(seq_idx: Tensor, x: Tensor) -> Tensor | None:
    """The same from the number of each token's sequence."""
    if seq_idx.shape != x.shape[:2]:
        raise ValueError(f"seq_idx: got shape {tuple(seq_idx.shape)}, takes {list(x.shape[:2])}")
    starts = seq_idx.diff(dim=1) != 0
    if not bool(starts.any()):
        return None
    starts = torch.cat((torch.ones_like(starts[:, :1]), starts), dim=1).flatten()
    return torch.cat((starts.nonzero()[:, 0], starts.new_tensor([starts.numel()], dtype=torch.int64))).to(torch.int32)


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Without the messages of a logger."""
    logger = logging.getLogger(name)
    logger.addFilter(refuse := lambda _: False)
    try:
        yield
    finally:
        logger.removeFilter(refuse)


def _as_tuple(config: PreTrainedConfig, return_dict: bool | None) -> bool:
    return not (config.return_dict if return_dict is None else return_dict)


class FactorizationMemoryForCausalLM(FactorizationMemoryPreTrainedModel, GenerationMixin):
    """A `LanguageModel` as `AutoModelForCausalLM` gives it."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: FactorizationMemoryConfig) -> None:
        with _silenced("transformers.generation.configuration_utils"):
            super().__init__(config)
        self._correct_generation_config()
        self.model = FactorizationMemoryModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_language_model(cls, model: LanguageModel, **kwargs: Any) -> FactorizationMemoryForCausalLM:
        """The same model, its weights shared; `kwargs` are other fields of the configuration, such as `eos_token_id`."""
        with torch.device("meta"):
            result = cls(FactorizationMemoryConfig.from_model_config(model.config, **kwargs))
        result.model.embedding, result.model.blocks = model.embedding, cast(nn.ModuleList, model.blocks)
        result.model.final_norm, result.lm_head = model.final_norm, model.head
        return result.train(model.training)

    def language_model(self) -> LanguageModel:
        """The same model as ours, its weights shared: for what needs no `transformers`, such as steps in a CUDA graph."""
        config = FactorizationMemoryConfig.from_dict(self.config.to_dict() | {"vocab_size": self.lm_head.out_features})
        with torch.device("meta"):
            result = LanguageModel(config.model_config())
        result.embedding, result.blocks = self.model.embedding, cast(Any, self.model.blocks)
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
        """Logits of the next token `[B, T, V]`, and with `labels` (int64 `[B, T]`, -100 where there is none; shifted here) the
        mean loss in nats per token. All else is as in `FactorizationMemoryModel`.

        Args:
            logits_to_keep: how many of the last tokens to give logits of, or which, 0 for all.
        """
        cache = _the_one(past_key_values, cache)
        outputs = self.model(input_ids, attention_mask, cache, inputs_embeds, use_cache, output_hidden_states, True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if labels.shape != outputs.last_hidden_state.shape[:2]:
                takes = list(outputs.last_hidden_state.shape[:2])
                raise ValueError(f"labels: got shape {tuple(labels.shape)}, takes that of the tokens, {takes}")
            if logits.shape[:2] != labels.shape:
                raise ValueError(f"logits_to_keep={logits_to_keep!r}: not together with labels; a loss takes all logits")
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.lm_head.out_features, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: getattr(outputs, CACHE_NAME)}
        )
        return result.to_tuple() if _as_tuple(self.config, return_dict) else result

    def adjust_generation_fn(self, *arguments: Any, **kwargs: Any) -> None:
        """Called by `from_pretrained` to find the generation config, which without a file is made of the model's."""
        with _silenced("transformers.generation.configuration_utils"):
            super().adjust_generation_fn(*arguments, **kwargs)
        self._correct_generation_config()

    def _correct_generation_config(self) -> None:
        """Undo that `transformers` takes the model's `top_k` states for a number of tokens to sample from."""
        made = self.generation_config
        if made is not None and getattr(made, "_from_model_config", False):
            made.top_k, made._from_model_config = None, False

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **kwargs: Any
    ) -> Any:
        # What a cache has read already is cut off the prompt here, unless an attention mask that is longer than the prompt says
        # that the prompt holds new tokens alone. Without this check another text than the prompt would be continued.
        cache, embeds = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
        if isinstance(cache, FactorizationMemoryCache) and cache.get_seq_length() > 0:
            length, mask = (input_ids if embeds is None else embeds).shape[1], model_kwargs.get("attention_mask")
            covered = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
            if embeds is not None or covered == length:
                cache.check_prompt(length, input_ids if embeds is None else None, mask)
            if CACHE_NAME == "past_key_values":
                # Before 5.24 some versions read the whole prompt again here, piece by piece.
                generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *arguments, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a memory is of one kind; leave it out"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = FactorizationMemoryCache(len(self.model.blocks))


class FactorizationMemoryForSequenceClassification(GenericForSequenceClassification, FactorizationMemoryPreTrainedModel):
    """A model whose last token of each sequence is scored for `num_labels` classes."""

    def __init__(self, config: FactorizationMemoryConfig) -> None:
        super().__init__(config)
