"""What `generate` of `transformers` needs of a model whose cache is a memory of constant size."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from factorization_memory.models.huggingface.cache import CACHE_NAME, FactorizationMemoryCache


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Silences a logger."""
    logger = logging.getLogger(name)
    logger.addFilter(refuse := lambda _: False)
    try:
        yield
    finally:
        logger.removeFilter(refuse)


class FactorizationMemoryGenerationMixin(GenerationMixin):
    """`GenerationMixin` with our cache, continued only by a prompt that begins with the tokens it has read."""

    def adjust_generation_fn(self, *arguments: Any, **kwargs: Any) -> None:
        """Called by `from_pretrained` to find the generation config, which without a file is derived from the model's."""
        with silenced("transformers.generation.configuration_utils"):
            super().adjust_generation_fn(*arguments, **kwargs)
        self._correct_generation_config()

    def _correct_generation_config(self) -> None:
        """`transformers` takes the model's `top_k` states for the sampling parameter; undo that."""
        made = self.generation_config
        if made is not None and getattr(made, "_from_model_config", False):
            made.top_k, made._from_model_config = None, False

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **kwargs: Any
    ) -> Any:
        # `transformers` cuts the tokens that the cache has read off the prompt here, unless an attention mask longer than the
        # prompt indicates that it holds only new tokens. Without this check a different text could be continued.
        cache, embeds = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
        if isinstance(cache, FactorizationMemoryCache) and cache.get_seq_length() > 0:
            length, mask = (input_ids if embeds is None else embeds).shape[1], model_kwargs.get("attention_mask")
            covered = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
            if embeds is not None or covered == length:
                cache.check_prompt(length, input_ids if embeds is None else None, mask)
            if CACHE_NAME == "past_key_values":
                # Some versions before 5.24 would reread the whole prompt here, in chunks.
                generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *arguments, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a memory has only one kind; leave it out"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = FactorizationMemoryCache(len(self.model.blocks))
