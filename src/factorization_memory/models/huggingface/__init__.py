"""Our models as `transformers` models (5.16 or newer): the same weights and layers behind its interface.

Importing this registers the model type `factorization_memory` with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
`AutoModelForSequenceClassification`. Private hooks of `transformers` are used where there is no public one:
`_supports_default_dynamic_cache` and `_prepare_cache_for_generation`, because its own caches are always empty for a model
without attention; `_prefill`, so that a cache is continued only by a prompt that begins with the tokens it has read;
`_is_stateful`, which refuses decoding with a draft model; and `_initialize_weights`, so that blocks are initialised as a
whole.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from factorization_memory.models.huggingface.cache import CACHE_NAME, FactorizationMemoryCache
from factorization_memory.models.huggingface.configuration import FactorizationMemoryConfig
from factorization_memory.models.huggingface.modeling import (
    FactorizationMemoryForCausalLM,
    FactorizationMemoryForSequenceClassification,
    FactorizationMemoryModel,
)
from factorization_memory.models.huggingface.tokenizer import fast_tokenizer
from factorization_memory.models.pretrained.format import MODEL_TYPE
from factorization_memory.models.pretrained.shim import save_shim

__all__ = [
    "CACHE_NAME",
    "FactorizationMemoryCache",
    "FactorizationMemoryConfig",
    "FactorizationMemoryForCausalLM",
    "FactorizationMemoryForSequenceClassification",
    "FactorizationMemoryModel",
    "fast_tokenizer",
    "save_shim",
]

AutoConfig.register(MODEL_TYPE, FactorizationMemoryConfig, exist_ok=True)
AutoModel.register(FactorizationMemoryConfig, FactorizationMemoryModel, exist_ok=True)
AutoModelForCausalLM.register(FactorizationMemoryConfig, FactorizationMemoryForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    FactorizationMemoryConfig, FactorizationMemoryForSequenceClassification, exist_ok=True
)
