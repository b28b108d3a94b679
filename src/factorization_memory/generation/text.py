"""Turns tokens into streamed text: whole characters only, never part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer

StopReason = Literal["length", "document_end", "stop_string"]
"""Why a continuation ended: the token limit, the model's end-of-document token, or a stop string."""


def note_on_prompt(tokenizer: Tokenizer, prompt: str) -> str | None:
    """A warning for a prompt that ends in a space, if the tokenizer merges the space before a word into the word's token; None
    otherwise. With such a tokenizer, words almost never follow a separate space token."""
    if not prompt.endswith(" ") or not any(piece.startswith(b" ") and len(piece) > 1 for piece in tokenizer.token_bytes):
        return None
    return (
        f"prompt {prompt[-20:]!r} ends with a space, which this model's tokenizer puts into the next word's token; the text "
        "continues better without it"
    )


def barred_tokens(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Tokens never drawn, bool [V]: special tokens except the end of the document, and unused ids."""
    barred = torch.ones(vocab_size, dtype=torch.bool)
    barred[: len(tokenizer.token_bytes)] = torch.tensor([not piece for piece in tokenizer.token_bytes])
    barred[tokenizer.document_end] = False
    return barred


class TextStream:
    """Text of one continuation, emitted piece by piece, never part of a stop string.

    Args:
        tokenizer: of the tokens.
        stop: strings that end it and are cut off.
        on_piece: called with each piece as it is emitted.

    Attributes:
        tokens: all tokens pushed.
        text: all text emitted.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], on_piece: Callable[[str], None] | None = None) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self._held = ""
        self._document_end = tokenizer.document_end
        self._stream = tokenizer.stream()
        self._stop = stop
        self._on_piece = on_piece

    def push(self, token: int, last: bool) -> StopReason | None:
        """Adds the next token; returns the reason to stop here, or None."""
        self.tokens.append(token)
        if token == self._document_end:
            return self._end("document_end")
        if self._take(self._stream.push(token)):
            return self._end("stop_string")
        return self._end("length") if last else None

    def _take(self, piece: str) -> bool:
        """Adds whole characters; returns True if they complete a stop string, which is cut off."""
        self._held += piece
        found = [index for index in map(self._held.find, self._stop) if index >= 0]
        if found:
            self._held = self._held[: min(found)]
            return True
        keep = max((_overlap(self._held, one) for one in self._stop), default=0)
        self._release(len(self._held) - keep)
        return False

    def _release(self, length: int) -> None:
        piece, self._held = self._held[:length], self._held[length:]
        self.text += piece
        if piece and self._on_piece is not None:
            self._on_piece(piece)

    def _end(self, reason: StopReason) -> StopReason:
        self._release(len(self._held))
        return reason


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
