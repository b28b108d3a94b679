"""Text from a prompt: the prompt read in chunks, then one step of the recurrence per token, at memory that does not grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from factorization_memory.generation.graph import Steps, steps_for
from factorization_memory.generation.prefill import prefill_batch
from factorization_memory.generation.sampling import SamplingConfig, Uniforms, sample, sample_generators
from factorization_memory.generation.text import StopReason, TextStream, barred_tokens
from factorization_memory.layers.calling import device_of
from factorization_memory.models.capacity import require_room

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel

SMALL_BATCH = 8
"""A CUDA graph of up to this many sequences is kept as they end: it takes about as long as one of fewer."""


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt."""

    text: str
    """The continuation, without the prompt, the stop string that ended it, and a last character that is incomplete."""
    tokens: list[int]
    """Every token generated, also those of a stop string or the end of the document."""
    stop_reason: StopReason
    """What ended it: `max_tokens`, the model's end of document, or a stop string."""
    prompt_tokens: int
    prefill_seconds: float
    """Time to read the prompts, shared by all samples of all prompts."""
    seconds: float
    """From the end of the prefill to this sample's last token, without `capture_seconds`."""
    capture_seconds: float = 0.0
    """On a GPU, time that captures of the step as a CUDA graph took until then."""

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

    The prompt is read once, in chunks of `prefill_chunk` tokens (None takes `default_chunk`); the samples then go on from
    copies of its state, all in one batch, and a finished one leaves the batch (on a GPU, where another size is another CUDA
    graph, once half of them have finished). A sample ends after `max_tokens` tokens, at the end-of-document token, or before
    the first of the `stop` strings. Only tokens that stand for text, and the end of the document, can be drawn.

    `on_text(sample, piece)` receives the text as it is made, in whole characters (one that is incomplete at the end is
    dropped); a piece that may be the beginning of a stop string is held back until that is settled, so the pieces of a sample
    join to exactly its text.

    Raises ValueError for an empty prompt or an argument out of range.
    """
    if not prompt:
        raise ValueError(f"prompt={prompt!r}: it holds no token to start from; give at least one character")
    return generate_batch(
        model, tokenizer, [prompt], max_tokens=max_tokens, sampling=sampling, num_samples=num_samples, stop=stop,
        prefill_chunk=prefill_chunk, on_text=on_text,
    )  # fmt: skip


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
    """Continue each of `prompts`, of any lengths, `num_samples` times, all at once. `generate` of each alone draws the same
    random numbers.

    The prompts are read packed one behind the other, without padding. Returns the samples of the first prompt, then those of
    the second, and so on; `on_text(i, piece)` counts them in this order. All else is as in `generate`.

    Raises ValueError for no prompts, an empty one, an argument out of range, or more samples than the machine can hold.
    """
    sampling = sampling or SamplingConfig()
    limits = {"max_tokens": max_tokens, "num_samples": num_samples}
    for name, value in (limits if prefill_chunk is None else limits | {"prefill_chunk": prefill_chunk}).items():
        if value < 1:
            raise ValueError(f"{name}={value}: use 1 or more")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop={stop!r}: give a list of strings of at least one character")
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts={prompts!r}: give a list of one string or more")
    prompt_ids = tokenizer.encode_batch(prompts)
    for number, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(
                f"prompts[{number}]={prompts[number]!r}: it holds no token to start from; give a character or more"
            )

    rows = num_samples * len(prompts)
    # Of each row its state, and as logits, scores and history a number for every id.
    needed = rows * (model.initial_state(1).num_bytes + 8 * model.config.vocab_size)
    require_room(
        f"num_samples={num_samples}: {rows:,} continuations at once", needed, "ask for fewer", next(model.parameters()).device
    )

    was_training = model.training
    model.eval()
    try:
        # Not inference mode: what the model caches here must stay usable by a training that goes on.
        with torch.no_grad():
            samples = [
                TextStream(tokenizer, stop, on_text, index, len(prompt_ids[index // num_samples]))
                for index in range(num_samples * len(prompts))
            ]
            return _decode(model, tokenizer, prompt_ids, samples, max_tokens, sampling, prefill_chunk)
    finally:
        model.train(was_training)


def _decode(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt_ids: list[list[int]],
    samples: list[TextStream],
    max_tokens: int,
    sampling: SamplingConfig,
    prefill_chunk: int | None,
) -> list[Generation]:
    device = device_of(model)
    begin = time.perf_counter()
    logits, state = prefill_batch(model, [torch.tensor(ids, device=device) for ids in prompt_ids], prefill_chunk)
    _wait_for(device)
    prefill_seconds = time.perf_counter() - begin

    begin = time.perf_counter()
    num_samples = len(samples) // len(prompt_ids)
    prompt_of = [index // num_samples for index in range(len(samples))]
    uniforms = Uniforms([one for _ in prompt_ids for one in sample_generators(sampling.seed, num_samples)], device)
    barred = barred_tokens(tokenizer, logits.shape[-1]).to(device)
    history = None
    if sampling.repetition_penalty != 1:
        history = torch.zeros(logits.shape, dtype=torch.bool, device=device)
        for row, ids in enumerate(prompt_ids):
            history[row, torch.tensor(ids, device=device)] = True
        history = history[prompt_of]
    if num_samples > 1:
        logits, state = logits[prompt_of], state.select(prompt_of)

    steps: Steps | None = None
    capture_seconds = 0.0
    live = list(range(len(samples)))  # the samples that go on
    chosen: Tensor | slice = slice(None)  # the same, to index with
    rows = list(range(len(samples)))  # where in the batch of `steps` they stand
    finished: dict[int, Generation] = {}
    while True:
        allowed = logits.masked_fill(barred, -torch.inf)
        drawn = sample(allowed, sampling, uniforms.take()[chosen], history)
        # NaN goes through the maximum. Read together: each reading waits for the device.
        tokens, finite = torch.stack([drawn, allowed.amax(dim=-1).isfinite().to(drawn.dtype)]).tolist()
        if not all(finite):
            one = samples[live[finite.index(0)]]
            raise ValueError(
                f"model: its logits are NaN or infinite after {one.prompt_tokens + len(one.tokens)} tokens; its weights are "
                f"damaged, or too large for {next(model.parameters()).dtype}: use float32, or an earlier checkpoint"
            )
        if history is not None:
            history.scatter_(1, drawn[:, None], True)
        going = []
        for position, (index, token) in enumerate(zip(live, tokens, strict=True)):
            one = samples[index]
            reason = one.push(token, last=len(one.tokens) + 1 == max_tokens)
            if reason is None:
                going.append(position)
                continue
            seconds = time.perf_counter() - begin - capture_seconds
            finished[index] = Generation(
                one.text, one.tokens, reason, one.prompt_tokens, prefill_seconds, seconds, capture_seconds
            )
        if not going:
            return [finished[index] for index in range(len(samples))]
        if len(going) < len(live):
            live, rows = [live[position] for position in going], [rows[position] for position in going]
            drawn, history = drawn[going], None if history is None else history[going]
            chosen = torch.tensor(live, device=device)
        if steps is None or _outgrown(steps, len(live)):
            if len(rows) < state.batch_size:
                state = state.select(rows)
            start, steps = time.perf_counter(), None  # the old batch is let go before the new one is made
            steps = steps_for(model, len(live))
            steps.load(state)
            if steps.captured:
                _wait_for(device)
                capture_seconds += time.perf_counter() - start
            state, rows = steps.state, list(range(len(live)))
        if len(live) == steps.batch_size:
            logits = steps.step(drawn)
        else:
            # Those that have ended stay in the batch, fed with anything, and are not looked at.
            place = torch.tensor(rows, device=device)
            logits = steps.step(drawn.new_zeros(steps.batch_size).index_copy(0, place, drawn))[place]


def _outgrown(steps: Steps, live: int) -> bool:
    """Whether a batch for `live` sequences alone is worth making."""
    if not steps.captured:
        return live < steps.batch_size
    return steps.batch_size > SMALL_BATCH and live <= steps.batch_size // 2


def _wait_for(device: torch.device) -> None:
    """Wait for what runs on a GPU, so that the clock tells what it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
