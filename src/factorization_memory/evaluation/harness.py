"""Adapter for lm-evaluation-harness: an `LM` of a `LanguageModel` and a `Tokenizer`, with the metrics of the harness's own
one.

Constant-size memory makes it cheap: each distinct context is read once and its continuations start from copies of the state; a
prefix shared by the contexts of a batch, such as few-shot examples, is read only once; texts of any length are scored exactly,
by carrying the state. Sequences are packed, without padding.

    from factorization_memory.evaluation.harness import FactorizationMemoryLM
    lm_eval.simple_evaluate(model=FactorizationMemoryLM(model, tokenizer), tasks=["hellaswag"])

Shapes: N sequences, T tokens, V vocabulary size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from factorization_memory.data.tokenizer import DOCUMENT_END
from factorization_memory.evaluation.harness_generation import Decoding
from factorization_memory.evaluation.loss import evaluating
from factorization_memory.generation import TextStream

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel, ModelState

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the harness is not installed ({error}); pip install 'factorization_memory[harness]'") from error

MAX_GENERATED_TOKENS = 256
"""Token limit of tasks that set none, as in the harness's own adapters."""
_LOGITS = 1 << 26
"""Maximum number of logits in memory at once."""
_SHARED = 16
"""Minimum length of a shared prefix that is worth a separate forward pass."""

Tokens = Sequence[int]


@register_model("factorization_memory")
class FactorizationMemoryLM(TemplateLM):
    """A model and its tokenizer as an `LM` of lm-evaluation-harness. Runs on the model's device, under the caller's autocast.

    By name, `simple_evaluate(model="factorization_memory", model_args={"model": model, "tokenizer": tokenizer})`, once this
    module is imported.

    Args:
        batch_size: number of contexts read, continuations scored or texts generated at a time.
        device: where to move the model; None leaves it where it is.

    Raises:
        ValueError: `batch_size` is no positive number, or the tokenizer has more ids than the model.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, batch_size: int | str = 64, device: str | None = None
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}: use 1 or more")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"tokenizer: has {tokenizer.vocab_size} ids, but the model {model.config.vocab_size}; use the model's own"
            )
        self.model = model if device is None else model.to(device)
        self.batch_size = int(batch_size)
        self._text = tokenizer  # not `tokenizer`: the harness expects that to be a transformers one
        self._device = next(model.parameters()).device
        self._chunk = 16384 if self._device.type == "cuda" else 1024
        self._encode_head = lru_cache(maxsize=256)(tokenizer.encode)

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token, which also precedes the first token of a document."""
        return self._text.document_end

    @property
    def max_gen_toks(self) -> int:
        """Token limit of generation for tasks that set none."""
        return MAX_GENERATED_TOKENS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; special tokens are never added."""
        # A context is the same for all its continuations up to its last line, and no token crosses the end of a line.
        cut = string.rfind("\n")
        while cut > 0 and string[cut - 1] == "\n":
            cut -= 1
        return self._text.encode(string) if cut <= 0 else self._encode_head(string[:cut]) + self._text.encode(string[cut:])

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation given its context, and whether greedy decoding would produce it.

        Raises:
            ValueError: a continuation has no tokens.
        """
        contexts: dict[tuple[int, ...], list[int]] = {}
        for index, (strings, context, continuation) in enumerate(requests):
            if not continuation:
                end, more = (strings[0][-40:], strings[1][:80]) if strings else ("", "")
                raise ValueError(
                    f"continuation {more!r} adds no token to its context, which ends with {end!r}; fix the task's data"
                )
            contexts.setdefault(tuple(context) or (self.prefix_token_id,), []).append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        with evaluating(self.model), progress:
            # Sorting puts contexts with a common prefix next to each other.
            for some in _batches(sorted(contexts), self.batch_size):
                logits, state = self._read(some)
                forks = [(row, index) for row, context in enumerate(some) for index in contexts[context]]
                for part in _batches(forks, self.batch_size):
                    scores = self._score(logits, state, [(row, requests[index][2]) for row, index in part])
                    for (_row, index), answer in zip(part, scores, strict=True):
                        answers[index] = answer
                        if requests[index][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                    progress.update(len(part))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each text of any length: every token given all previous ones, the first given `</s>`."""
        texts = [request.args[0] for request in requests]
        encoded = [self._text.encode(text) for text in texts]
        whole = [(None, [self.prefix_token_id], tokens) for tokens in encoded if tokens]
        scores = iter(self._loglikelihood_tokens(whole, disable_tqdm=disable_tqdm))
        answers = [next(scores)[0] if tokens else 0.0 for tokens in encoded]
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The model's continuation of each context, up to the first of its `until` strings or the end of the document, in
        whole characters, as `generation` has it.

        Prompts of any lengths are continued in parallel. The options of a request are those of `Decoding`.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        settings = [Decoding(requests[indices[0]].args[1], self.max_gen_toks) for indices in groups.values()]
        answers = [""] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        with evaluating(self.model), progress:
            for decoding, indices in zip(settings, groups.values(), strict=True):
                prompts = sorted((tuple(self.tok_encode(requests[i].args[0])) or (self.prefix_token_id,), i) for i in indices)
                for batch in _batches(prompts, self.batch_size):
                    texts = self._generate([prompt for prompt, _ in batch], decoding)
                    for (_, index), text in zip(batch, texts, strict=True):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    progress.update(len(batch))
        return answers

    def _generate(self, prompts: Sequence[Tokens], decoding: Decoding) -> list[str]:
        # The literal characters "</s>" also end a text, as in the harness's own adapter.
        rows = [TextStream(self._text, [*decoding.until, DOCUMENT_END]) for _ in prompts]
        live = list(range(len(rows)))
        logits, state = self._read(prompts)
        tokens = logits.new_zeros(0)
        for count in range(decoding.max_tokens):
            if count:
                logits, state = self.model.step(tokens, state)
            tokens = decoding.choose(logits[:, : self._text.vocab_size])
            last = count == decoding.max_tokens - 1
            going = [place for place, token in enumerate(tokens.tolist()) if rows[live[place]].push(token, last) is None]
            if not going:
                break
            if len(going) < len(live):
                live, tokens, state = [live[place] for place in going], tokens[going], state.select(going)
        return [row.text for row in rows]

    def _read(self, sequences: Sequence[Tokens]) -> tuple[Tensor, ModelState]:
        """Logits `[N, V]` after the last token of each of N non-empty sequences, and the state of N rows.

        The sequences are sorted, so the common prefix of the first and the last is common to all.
        """
        shared = 0
        if len(sequences) > 1:
            most = min(map(len, sequences)) - 1  # leaves at least one token of each
            pairs = zip(sequences[0][:most], sequences[-1][:most], strict=True)
            shared = next((place for place, (one, other) in enumerate(pairs) if one != other), most)
        begin: ModelState | None = None
        if shared >= _SHARED:
            begin = self._read([sequences[0][:shared]])[1]
            sequences = [sequence[shared:] for sequence in sequences]
        logits: list[Tensor] = []
        final: ModelState | None = None
        for piece, last, state in self._forward(
            sequences, lambda rows: None if begin is None else begin.select([0] * len(rows)), self._chunk, last_only=True
        ):
            ended = [place for place, (row, _, stop) in enumerate(piece) if stop == len(sequences[row])]
            logits.append(last[ended])
            if len(ended) == len(piece) == len(sequences):
                final = state
            elif ended:
                final = self.model.initial_state(len(sequences)) if final is None else final
                final.load(state.select(ended), [piece[place][0] for place in ended])
        assert final is not None, "there is no sequence without tokens"
        return torch.cat(logits), final

    def _score(self, logits: Tensor, state: ModelState, forks: Sequence[tuple[int, list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation and whether it is greedy, after its row of `logits` and `state`."""
        scores = torch.zeros(len(forks), dtype=torch.float64)
        wrong = torch.zeros(len(forks), dtype=torch.int64)

        def add(found: Tensor, targets: list[int], owners: list[int]) -> None:
            target, owner = torch.tensor(targets, device=found.device), torch.tensor(owners)
            nats = torch.nn.functional.cross_entropy(found.float(), target, reduction="none")
            scores.index_add_(0, owner, -nats.cpu().double())
            wrong.index_add_(0, owner, (found.argmax(-1) != target).cpu().long())

        size = max(64, min(self._chunk, _LOGITS // logits.shape[-1]))
        add(logits[[row for row, _ in forks]], [continuation[0] for _, continuation in forks], list(range(len(forks))))
        for piece, found, _ in self._forward(
            [continuation[:-1] for _, continuation in forks],
            lambda rows: state.select([forks[row][0] for row in rows]),
            size,
            last_only=False,
        ):
            targets = [token for row, start, stop in piece for token in forks[row][1][start + 1 : stop + 1]]
            add(found, targets, [row for row, start, stop in piece for _ in range(start, stop)])
        return list(zip(scores.tolist(), (wrong == 0).tolist(), strict=True))

    def _forward(
        self,
        sequences: Sequence[Tokens],
        begin: Callable[[list[int]], ModelState | None],
        size: int,
        last_only: bool,
    ) -> Iterator[tuple[list[tuple[int, int, int]], Tensor, ModelState]]:
        """Read packed sequences, at most `size` tokens and `batch_size` sequences per forward pass.

        Args:
            begin: returns a new initial state for the sequences with these indices; None starts from empty memory.
            last_only: yield only the logits of the last token of each piece.

        Yields:
            For each forward pass: the pieces (sequence, start, stop) read, logits `[T, V]` or one row per piece, and the state
            after each piece. A sequence that is cut continues as the first piece of the next forward pass.
        """
        carried: ModelState | None = None
        for piece in _pieces([len(sequence) for sequence in sequences], size, self.batch_size):
            rows = [row for row, _, _ in piece]
            state = carried if carried is not None and len(piece) == 1 else begin(rows)
            if carried is not None and len(piece) > 1:
                if state is None:
                    state = carried.place([0], len(piece))
                else:
                    state.load(carried, [0])
            tokens = torch.tensor([token for row, start, stop in piece for token in sequences[row][start:stop]])
            borders = None
            if len(piece) > 1:  # a single sequence needs no boundaries, and is cheaper without
                borders = torch.tensor([0, *accumulate(stop - start for _, start, stop in piece)], dtype=torch.int32)
                borders = borders.to(self._device)
            logits, after = self.model(tokens.to(self._device)[None], state=state, cu_seqlens=borders, last_only=last_only)
            yield piece, logits[0], after
            last, _, stop = piece[-1]
            carried = after.select([len(piece) - 1]) if stop < len(sequences[last]) else None


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Batches of `size` items; the last may be smaller."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _pieces(lengths: Sequence[int], size: int, most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Packed sequences, cut every `size` tokens or `most` sequences, as lists of (sequence, start, stop)."""
    piece: list[tuple[int, int, int]] = []
    room = size
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            piece.append((row, start, stop))
            room -= stop - start
            start = stop
            if not room or len(piece) == most:
                yield piece
                piece, room = [], size
    if piece:
        yield piece
