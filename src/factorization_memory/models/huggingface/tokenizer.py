"""Our tokenizers as those of `transformers`."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast


def fast_tokenizer(path: Path | str, end: str = "</s>", padding: str = "<pad>") -> PreTrainedTokenizerFast:
    """A tokenizer.json of ours as a tokenizer of `transformers`, which pads on the left, as generation needs it.

    Special tokens that are written in a text become their characters, never control tokens.

    Args:
        path: the file.
        end: its token for the end of a document, which also stands before the first.
        padding: its token for padding.
    """
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=end,
        eos_token=end,
        pad_token=padding,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )
