"""Base class of the models for `transformers`: loads, saves and initialises weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from factorization_memory.layers.norm import RMSNorm
from factorization_memory.models.finite import not_finite
from factorization_memory.models.huggingface.configuration import FactorizationMemoryConfig
from factorization_memory.models.pretrained.format import INDEX_NAME, indexed_files
from factorization_memory.models.pretrained.shim import save_shim


class FactorizationMemoryPreTrainedModel(PreTrainedModel):
    """Base class of all our models for `transformers`."""

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
        """As in `transformers`, but only from safetensors (other weight formats can contain code), and only finite weights.

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
        """Does nothing; `transformers` would copy this file next to each saved model, but the shim there imports it."""

    def save_pretrained(self, save_directory: Any, *arguments: Any, **kwargs: Any) -> None:
        """As in `transformers`, plus the file through which `trust_remote_code=True` finds these classes."""
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub=True: call the model's push_to_hub() instead, which uploads all files")
        given = kwargs.get("state_dict")
        wrong = not_finite(dict(self.named_parameters()) if given is None else given)
        if wrong is not None:
            raise ValueError(f"{save_directory}: not saved, as weight {wrong!r} is NaN or infinite; save an earlier checkpoint")
        super().save_pretrained(save_directory, *arguments, **kwargs)
        if kwargs.get("is_main_process", True):
            save_shim(save_directory)

    def _initialize_weights(self, module: nn.Module, *_: Any, **__: Any) -> None:
        # Without the branch for custom code, which skips modules without weights of their own, such as blocks.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial weights, as in `LanguageModel`; loaded weights stay."""
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            # Linear layers in a block are reinitialised with it: see `FactorizationMemoryModel`.
            init.normal_(module.weight, std=0.02)
