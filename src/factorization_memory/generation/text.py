"""Text out of tokens: streamed in whole characters, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer

StopReason = Literal["length", "document_end", "stop_string"]
"""What ends a continuation: its greatest number of tokens, the model's end of document, or a stop string."""


def note_on_prompt(tokenizer: Tokenizer, prompt: str) -> str | None:
    """What to say of a prompt that ends in a space, where the tokenizer has the space before a word in the word's token; None
    for other prompts. In texts so encoded hardly any word stands behind a space that is a token of its own."""
    if not prompt.endswith(" ") or not any(piece.startswith(b" ") and len(piece) > 1 for piece in tokenizer.token_bytes):
        return None
    return (
        f"prompt {prompt[-20:]!r} ends in a space, which this model's tokenizer has in the token of the next word; the text "
        "goes on better without it"
    )


def barred_tokens(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Tokens never drawn, bool [V]: special ones but the end of the document, and ids that no token has."""
    barred = torch.ones(vocab_size, dtype=torch.bool)
    barred[: len(tokenizer.token_bytes)] = torch.tensor([not piece for piece in tokenizer.token_bytes])
    barred[tokenizer.document_end] = False
    return barred


class TextStream:
    """Text of one continuation, let out piece by piece, never a part of a stop string.

    Args:
        tokenizer: of the tokens.
        stop: strings that end it and are cut off.
        on_piece: is called with each piece as it is let out.

    Attributes:
        tokens: all that were pushed.
        text: all that was let out.
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
        """Take the next token; the reason to end here, if there is one."""
        self.tokens.append(token)
        if token == self._document_end:
            return self._end("document_end")
        if self._take(self._stream.push(token)):
            return self._end("stop_string")
        return self._end("length") if last else None

    def _take(self, piece: str) -> bool:
        """Add whole characters; True when they complete a stop string, which is cut off."""
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
    """Length of the longest end of `text` that is a beginning of `stop`, short of the whole."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
