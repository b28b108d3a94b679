"""Text from a prompt: the prompt read in chunks, then one step of the recurrence per token, at memory that does not grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from factorization_memory.generation.sampling import SamplingConfig, sample, sample_generators

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel, ModelState

StopReason = Literal["length", "document_end", "stop_string"]


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt."""

    text: str
    """The continuation, without the prompt and without the stop string that ended it."""
    tokens: list[int]
    """Every token generated, also those of a stop string or the end of the document."""
    stop_reason: StopReason
    """What ended it: `max_tokens`, the model's end of document, or a stop string."""
    prompt_tokens: int
    prefill_seconds: float
    """Time to read the prompt, shared by all samples."""
    seconds: float
    """From the end of the prefill to this sample's last token."""

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of this sample per second of decoding."""
        return len(self.tokens) / self.seconds if self.seconds > 0 else 0.0


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 256,
    sampling: SamplingConfig | None = None,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    prefill_chunk: int = 1024,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continue a prompt `num_samples` times.

    The prompt is read once, in chunks of `prefill_chunk` tokens; the samples then go on from copies of its state, all in one
    batch, and a finished one leaves the batch. A sample ends after `max_tokens` tokens, at the end-of-document token, or before
    the first of the `stop` strings. Only tokens that stand for text, and the end of the document, can be drawn.

    `on_text(sample, piece)` receives the text as it is made, in whole characters; a piece that may be the beginning of a stop
    string is held back until that is settled, so the pieces of a sample join to exactly its text.

    Raises ValueError for an empty prompt or an argument out of range.
    """
    sampling = sampling or SamplingConfig()
    for name, value in (("max_tokens", max_tokens), ("num_samples", num_samples), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"{name}={value}: use 1 or more")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop={stop!r}: give a list of strings of at least one character")
    prompt_ids = tokenizer.encode(prompt)
    if not prompt_ids:
        raise ValueError(f"prompt={prompt!r}: it holds no token to start from; give at least one character")

    was_training = model.training
    model.eval()
    try:
        # Not inference mode: what the model caches here must stay usable by a training that goes on.
        with torch.no_grad():
            return _decode(model, tokenizer, prompt_ids, max_tokens, sampling, num_samples, stop, prefill_chunk, on_text)
    finally:
        model.train(was_training)


def _decode(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    max_tokens: int,
    sampling: SamplingConfig,
    num_samples: int,
    stop: Sequence[str],
    prefill_chunk: int,
    on_text: Callable[[int, str], None] | None,
) -> list[Generation]:
    device = next(model.parameters()).device
    begin = time.perf_counter()
    logits, state = prefill(model, torch.tensor(prompt_ids, device=device), prefill_chunk)
    prefill_seconds = time.perf_counter() - begin

    samples = [_Sample(tokenizer, stop, on_text, index) for index in range(num_samples)]
    generators = sample_generators(sampling.seed, num_samples)
    barred = _barred(tokenizer, logits.shape[-1]).to(device)
    logits, state = logits.expand(num_samples, -1), state.select([0] * num_samples)
    history = torch.zeros(num_samples, logits.shape[-1], dtype=torch.bool, device=device)
    history[:, torch.tensor(prompt_ids, device=device)] = True

    live = list(range(num_samples))
    begin = time.perf_counter()
    finished: dict[int, Generation] = {}
    while True:
        drawn = sample(logits.masked_fill(barred, -torch.inf), sampling, [generators[i] for i in live], history)
        rows = []
        for row, (index, token) in enumerate(zip(live, drawn.tolist(), strict=True)):
            reason = samples[index].push(token, last=len(samples[index].tokens) + 1 == max_tokens)
            if reason is None:
                rows.append(row)
                continue
            seconds = time.perf_counter() - begin
            one = samples[index]
            finished[index] = Generation(one.text, one.tokens, reason, len(prompt_ids), prefill_seconds, seconds)
        if not rows:
            return [finished[index] for index in range(num_samples)]
        history.scatter_(1, drawn[:, None], True)
        if len(rows) < len(live):
            state, drawn, history = state.select(rows), drawn[rows], history[rows]
            live = [live[row] for row in rows]
        logits, state = model.step(drawn, state)


def prefill(model: LanguageModel, tokens: Tensor, chunk: int = 1024) -> tuple[Tensor, ModelState]:
    """Logits [1, V] after the last of `tokens` (int64 [T], T >= 1) and the state of one row; `chunk` tokens in one forward."""
    first, *rest = tokens.split(chunk)
    logits, state = model(first[None], last_only=True)
    for piece in rest:
        logits, state = model(piece[None], state=state, last_only=True)
    return logits[:, -1], state


def _barred(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Tokens never drawn, bool [V]: special ones but the end of the document, and ids that no token has."""
    barred = torch.ones(vocab_size, dtype=torch.bool)
    barred[: len(tokenizer.token_bytes)] = torch.tensor([not piece for piece in tokenizer.token_bytes])
    barred[tokenizer.document_end] = False
    return barred


class _Sample:
    """Text of one continuation, let out piece by piece, never a part of a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], on_text: Callable[[int, str], None] | None, index: int
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self._held = ""
        self._document_end = tokenizer.document_end
        self._stream = tokenizer.stream()
        self._stop = stop
        self._on_text = on_text
        self._index = index

    def push(self, token: int, last: bool) -> StopReason | None:
        """Take the next token; the reason to end here, if there is one."""
        self.tokens.append(token)
        if token == self._document_end:
            stopped = self._take(self._stream.flush())
            return self._end("stop_string" if stopped else "document_end")
        stopped = self._take(self._stream.push(token))
        if last and not stopped:
            stopped = self._take(self._stream.flush())
        if stopped:
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
        if piece and self._on_text is not None:
            self._on_text(self._index, piece)

    def _end(self, reason: StopReason) -> StopReason:
        self._release(len(self._held))
        return reason


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of the whole."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
