"""Our tokenizers for `transformers`."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from factorization_memory.models.pretrained.export import TOKENIZER_FIELDS


def fast_tokenizer(path: Path | str) -> PreTrainedTokenizerFast:
    """Our tokenizer.json as a tokenizer of `transformers`, padding on the left, as generation requires.

    Special tokens spelled out in a text are encoded as plain characters, never as control tokens.
    """
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **TOKENIZER_FIELDS)
