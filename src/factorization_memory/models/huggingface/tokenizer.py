"""Our tokenizers as those of `transformers`."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from factorization_memory.models.pretrained.export import TOKENIZER_FIELDS


def fast_tokenizer(path: Path | str) -> PreTrainedTokenizerFast:
    """A tokenizer.json of ours as a tokenizer of `transformers`, which pads on the left, as generation needs it.

    Special tokens that are written in a text become their characters, never control tokens.
    """
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **TOKENIZER_FIELDS)
