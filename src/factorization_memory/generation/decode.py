"""Text from a prompt: the prompt read in chunks, then one step of the recurrence per token, at memory that does not grow."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from factorization_memory.generation.graph import Steps, steps_for
from factorization_memory.generation.sampling import SamplingConfig, Uniforms, sample, sample_generators
from factorization_memory.layers.calling import device_of
from factorization_memory.models.capacity import require_room

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel, ModelState

StopReason = Literal["length", "document_end", "stop_string"]
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
                _Sample(tokenizer, stop, on_text, index, len(prompt_ids[index // num_samples]))
                for index in range(num_samples * len(prompts))
            ]
            return _decode(model, tokenizer, prompt_ids, samples, max_tokens, sampling, prefill_chunk)
    finally:
        model.train(was_training)


def _decode(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt_ids: list[list[int]],
    samples: list[_Sample],
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
    barred = _barred(tokenizer, logits.shape[-1]).to(device)
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


def note_on_prompt(tokenizer: Tokenizer, prompt: str) -> str | None:
    """What to say of a prompt that ends in a space, where the tokenizer has the space before a word in the word's token; None
    for other prompts. In texts so encoded hardly any word stands behind a space that is a token of its own."""
    if not prompt.endswith(" ") or not any(piece.startswith(b" ") and len(piece) > 1 for piece in tokenizer.token_bytes):
        return None
    return (
        f"prompt {prompt[-20:]!r} ends in a space, which this model's tokenizer has in the token of the next word; the text "
        "goes on better without it"
    )


def _outgrown(steps: Steps, live: int) -> bool:
    """Whether a batch for `live` sequences alone is worth making."""
    if not steps.captured:
        return live < steps.batch_size
    return steps.batch_size > SMALL_BATCH and live <= steps.batch_size // 2


def default_chunk(device: torch.device) -> int:
    """Prompt tokens to read at a time: on a GPU enough to fill it, on a CPU few enough for its caches."""
    return 16384 if device.type == "cuda" else 1024


def prefill(model: LanguageModel, tokens: Tensor, chunk: int | None = None) -> tuple[Tensor, ModelState]:
    """Logits [1, V] after the last of `tokens` (int64 [T], T >= 1) and the state of one row; `chunk` tokens in one forward."""
    return prefill_batch(model, [tokens], chunk)


@torch.no_grad()
def prefill_batch(model: LanguageModel, prompts: Sequence[Tensor], chunk: int | None = None) -> tuple[Tensor, ModelState]:
    """Logits [N, V] after the last token of each of N prompts, and the state of N rows.

    The prompts are packed one behind the other and cut every `chunk` tokens (None takes `default_chunk`): each forward is full,
    and a prompt that is cut goes on from its state in the next one.

    Args:
        model: in evaluation mode.
        prompts: int64 [T] each, T >= 1.
        chunk: tokens in one forward.
    """
    device = prompts[0].device
    packed = torch.cat(list(prompts))
    borders = [0, *accumulate(len(prompt) for prompt in prompts)]
    chunk = chunk or default_chunk(device)
    last_logits: list[Tensor] = []
    final: ModelState | None = None
    carried: ModelState | None = None
    for start in range(0, borders[-1], chunk):
        stop = min(start + chunk, borders[-1])
        # Prompts with tokens in this piece: from `first` up to, not with, `end`. The last of them may be cut.
        first, end = bisect_right(borders, start) - 1, bisect_left(borders, stop)
        whole = end if borders[end] == stop else end - 1
        cu_seqlens = None
        if end - first > 1:  # one sequence needs no borders, and costs less without
            cuts = [0, *(border - start for border in borders[first + 1 : end]), stop - start]
            cu_seqlens = torch.tensor(cuts, dtype=torch.int32, device=device)
            carried = None if carried is None else carried.place([0], end - first)
        logits, state = model(packed[None, start:stop], state=carried, cu_seqlens=cu_seqlens, last_only=True)
        last_logits.append(logits[0, : whole - first])
        carried = None if whole == end else state if end - first == 1 else state.select([whole - first])
        if first == 0 and whole == len(prompts):
            final = state
        elif whole > first:
            # Into one state of all prompts, so that none is held twice.
            final = model.initial_state(len(prompts)) if final is None else final
            # Views: the last of the piece may not be at its end.
            final.load(state.apply(lambda tensor, ended=whole - first: tensor[:ended]), list(range(first, whole)))
    assert final is not None, "there is no prompt without tokens"
    return torch.cat(last_logits), final


def _wait_for(device: torch.device) -> None:
    """Wait for what runs on a GPU, so that the clock tells what it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _barred(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Tokens never drawn, bool [V]: special ones but the end of the document, and ids that no token has."""
    barred = torch.ones(vocab_size, dtype=torch.bool)
    barred[: len(tokenizer.token_bytes)] = torch.tensor([not piece for piece in tokenizer.token_bytes])
    barred[tokenizer.document_end] = False
    return barred


class _Sample:
    """Text of one continuation, let out piece by piece, never a part of a stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        on_text: Callable[[int, str], None] | None,
        index: int,
        prompt_tokens: int,
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self._held = ""
        self._document_end = tokenizer.document_end
        self._stream = tokenizer.stream()
        self._stop = stop
        self._on_text = on_text
        self._index = index
        self.prompt_tokens = prompt_tokens

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
        if piece and self._on_text is not None:
            self._on_text(self._index, piece)

    def _end(self, reason: StopReason) -> StopReason:
        self._release(len(self._held))
        return reason


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of the whole."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
