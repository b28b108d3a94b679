"""Generates text: each prompt is read once, then the engine continues it token by token in constant memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from factorization_memory.generation.engine import Engine
from factorization_memory.generation.graph import grows
from factorization_memory.generation.pool import slot_bytes, wait_for
from factorization_memory.generation.requests import Request
from factorization_memory.generation.sampling import SamplingConfig
from factorization_memory.generation.text import StopReason, TextStream, barred_tokens
from factorization_memory.layers.calling import device_of
from factorization_memory.models.capacity import require_room

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt."""

    text: str
    """The continuation, without the prompt, the stop string that ended it, or an incomplete last character."""
    tokens: list[int]
    """All tokens generated, including those of a stop string or the end of the document."""
    stop_reason: StopReason
    """What ended it: `max_tokens`, the model's end of document, or a stop string."""
    prompt_tokens: int
    prefill_seconds: float
    """Time to read the prompts, shared by all samples of all prompts."""
    seconds: float
    """From the end of the prefill to this sample's last token, without `capture_seconds`."""
    capture_seconds: float = 0.0
    """On a GPU, time spent capturing CUDA graphs of the step until then."""

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
    prefill_chunk: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continue a prompt `num_samples` times.

    The prompt is read once, in chunks of `prefill_chunk` tokens (None means `default_chunk`); the samples then continue from
    copies of its state in one batch, which finished samples leave (on a GPU, where each batch size needs its own CUDA graph,
    only once half have finished). A sample ends after `max_tokens` tokens, at the end-of-document token, or before the first
    of the `stop` strings. Only text tokens and the end-of-document token can be drawn.

    `on_text(sample, piece)` receives the text as it is generated, in whole characters (an incomplete last one is dropped).
    Text that may begin a stop string is held back until that is known, so the pieces of a sample concatenate to its text.

    Raises ValueError for an empty prompt or an argument out of range.
    """
    if not prompt:
        raise ValueError(f"prompt={prompt!r}: no token to start from; give at least one character")
    return generate_batch(
        model,
        tokenizer,
        [prompt],
        max_tokens=max_tokens,
        sampling=sampling,
        num_samples=num_samples,
        stop=stop,
        prefill_chunk=prefill_chunk,
        on_text=on_text,
    )


def generate_batch(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int = 256,
    sampling: SamplingConfig | None = None,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    prefill_chunk: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continue each of `prompts`, of any lengths, `num_samples` times, in one batch. `generate` on each prompt alone draws the
    same random numbers.

    The prompts are packed for reading, without padding. Returns the samples of the first prompt, then those of the second, and
    so on; `on_text(i, piece)` numbers them in this order. Everything else is as in `generate`.

    Raises ValueError for no prompts, an empty one, an argument out of range, or more samples than the machine can hold.
    """
    for name, value in (("max_tokens", max_tokens), ("num_samples", num_samples), ("prefill_chunk", prefill_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: use 1 or more")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop={stop!r}: use a list of non-empty strings")
    prompt_ids = _encode(tokenizer, prompts)
    _require_room(model, prompt_ids, num_samples, max_tokens)
    streams = [
        TextStream(tokenizer, stop, None if on_text is None else partial(on_text, number))
        for number in range(num_samples * len(prompts))
    ]
    was_training = model.training
    model.eval()
    try:
        return _continue(model, tokenizer, prompt_ids, streams, max_tokens, sampling or SamplingConfig(), prefill_chunk)
    finally:
        model.train(was_training)


def _encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts={prompts!r}: use a list of one or more strings")
    prompt_ids = tokenizer.encode_batch(prompts)
    for number, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompts[{number}]={prompts[number]!r}: no token to start from; give at least one character")
    return prompt_ids


def _require_room(model: LanguageModel, prompt_ids: list[list[int]], num_samples: int, max_tokens: int) -> None:
    rows, tokens = num_samples * len(prompt_ids), max(map(len, prompt_ids)) + max_tokens
    what, remedy = f"num_samples={num_samples}: {rows:,} continuations at once", "ask for fewer"
    if grows(model):
        what, remedy = f"{what}, whose attention keeps up to {tokens:,} tokens each,", f"{remedy}, or for fewer max_tokens"
    require_room(what, rows * slot_bytes(model, tokens), remedy, device_of(model))


def _continue(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt_ids: list[list[int]],
    streams: list[TextStream],
    max_tokens: int,
    sampling: SamplingConfig,
    prefill_chunk: int | None,
) -> list[Generation]:
    """Runs the continuations to the end: each prompt has an equal share of `streams`."""
    num_samples, device = len(streams) // len(prompt_ids), device_of(model)
    engine = Engine(model, len(streams), prefill_chunk)
    begin = time.perf_counter()
    prompts = engine.prefill(prompt_ids)
    wait_for(device)
    prefill_seconds = time.perf_counter() - begin

    begin = time.perf_counter()
    barred = barred_tokens(tokenizer, model.config.vocab_size).to(device)
    engine.admit([Request(prompts[n // num_samples], sampling, n % num_samples, barred) for n in range(len(streams))])
    del prompts  # frees their state, which has been copied into the slots
    going = list(range(len(streams)))  # by slot, the continuation running there
    finished: dict[int, Generation] = {}
    while engine.running:
        for slot, token in engine.step().items():
            number, stream = going[slot], streams[going[slot]]
            reason = stream.push(token, last=len(stream.tokens) + 1 == max_tokens)
            if reason is None:
                continue
            engine.release(slot)
            captured = engine.capture_seconds
            seconds = time.perf_counter() - begin - captured
            finished[number] = Generation(
                stream.text, stream.tokens, reason, len(prompt_ids[number // num_samples]), prefill_seconds, seconds, captured
            )
        if engine.running and engine.worth_compacting():
            going = [going[slot] for slot in engine.compact()]
    return [finished[number] for number in range(len(streams))]
