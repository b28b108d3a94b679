"""Forward passes of the recall suite: batches in pieces of bounded size, and a copy of the state for each question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from factorization_memory.evaluation.recall_needles import NUM_CANDIDATES, Haystack, Needle
from factorization_memory.evaluation.recall_tasks import Associations

if TYPE_CHECKING:
    from factorization_memory.layers import ModelState
    from factorization_memory.models import LanguageModel

MAX_LOGITS = 1 << 26
"""Maximum number of logits in memory at once; longer pieces are cut."""
MAX_COPIED_BYTES = 1 << 28
"""Maximum bytes of state copied at once to score the candidate answers."""


class Reader:
    """Reads sequences with a model and asks it questions.

    Args:
        model: in evaluation mode, gradients off (see `loss.evaluating`).
        segment: maximum tokens per forward pass.
        batch_size: sequences per forward pass.
    """

    def __init__(self, model: LanguageModel, segment: int, batch_size: int) -> None:
        self.model, self.segment, self.batch_size = model, segment, batch_size
        self.device = next(model.parameters()).device

    def associate(self, batch: Sequence[Associations]) -> tuple[np.ndarray, np.ndarray]:
        """For each query of items with the same number of pairs, the likeliest of the item's values and the likeliest of the
        whole vocabulary: token ids, [B, P] each."""
        tokens, values = self._tensor([each.tokens for each in batch]), self._tensor([each.values for each in batch])
        asked = batch[0].asked  # the same for all
        chosen, likeliest = (np.zeros((len(batch), len(asked)), dtype=np.int64) for _ in range(2))
        for start, logits in self._logits(tokens[:, :-1]):
            here = (asked >= start) & (asked < start + logits.shape[1])
            at = logits[:, asked[here] - start]
            best = at.gather(-1, values[:, None].expand(-1, at.shape[1], -1)).argmax(-1)
            chosen[:, here] = values.gather(1, best).cpu().numpy()
            likeliest[:, here] = at.argmax(-1).cpu().numpy()
        return chosen, likeliest

    def score(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss in nats of each token of `tokens` [B, T] except the first, and whether it was the likeliest: [B, T - 1]
        each."""
        rows, nats, hits = self._tensor(tokens), [], []
        for start, logits in self._logits(rows[:, :-1]):
            targets = rows[:, start + 1 : start + 1 + logits.shape[1]]
            nats.append(-logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].double().cpu().numpy())
            hits.append((logits.argmax(-1) == targets).cpu().numpy())
        return np.concatenate(nats, 1), np.concatenate(hits, 1)

    def ask(self, group: Sequence[Haystack]) -> Iterator[tuple[int, Needle, bool, bool]]:
        """Ask for every needle of haystacks of one length, each with its own copy of the state after the haystack.

        Yields the haystack's index, the needle, whether its answer is the likeliest candidate, and whether greedy decoding
        would give it.
        """
        state = self._state(self._tensor([each.tokens for each in group]))
        # Prompts of one length share a batch.
        questions = sorted(
            ((row, needle) for row, each in enumerate(group) for needle in each.needles), key=lambda one: len(one[1].prompt)
        )
        copies = max(self.batch_size, MAX_COPIED_BYTES * state.batch_size // max(1, state.num_bytes))
        first = 0
        while first < len(questions):
            length = len(questions[first][1].prompt)
            last = first + max(1, copies // NUM_CANDIDATES)
            some = [each for each in questions[first:last] if len(each[1].prompt) == length]
            first += len(some)
            # The prompt's last token is read with the candidates, so that their input is never empty.
            prompts = self._tensor([needle.prompt[:-1] for _, needle in some])
            rows = self._state(prompts, state.select([row for row, _ in some]))
            likelihood, greedy = self._try([needle for _, needle in some], rows)
            for (row, needle), scores, written in zip(some, likelihood, greedy, strict=True):
                yield row, needle, int(scores.argmax()) == needle.right, bool(written[needle.right])

    def _try(self, needles: Sequence[Needle], state: ModelState) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihood of each candidate after its needle's prompt, and whether greedy decoding gives it: [B,
        candidates]."""
        rows = [(needle.prompt[-1], *candidate) for needle in needles for candidate in needle.candidates]
        longest = max(map(len, rows))
        # Right padding needs no mask: later tokens do not affect earlier logits, and the state is discarded.
        tokens = self._tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        real = self._tensor([[1] * (len(row) - 1) + [0] * (longest - len(row)) for row in rows]).bool()
        likelihood, greedy = torch.zeros(len(rows), device=self.device), torch.ones_like(real[:, 0])
        copies = state.select([row for row in range(len(needles)) for _ in range(NUM_CANDIDATES)])
        for start, logits in self._logits(tokens[:, :-1], copies):
            here = slice(start, start + logits.shape[1])
            targets, counted = tokens[:, 1:][:, here], real[:, here]
            nats = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            likelihood += (nats * counted).sum(1)
            greedy &= ((logits.argmax(-1) == targets) | ~counted).all(1)
        shape = (len(needles), NUM_CANDIDATES)
        return likelihood.view(shape).cpu().numpy(), greedy.view(shape).cpu().numpy()

    def _tensor(self, rows: Sequence[Sequence[int]] | Sequence[np.ndarray] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(rows, dtype=np.int64), device=self.device)

    def _state(self, tokens: Tensor, state: ModelState | None = None) -> ModelState:
        """The state after tokens [B, T]."""
        for piece in tokens.split(self.segment, 1) if tokens.shape[1] else ():
            _, state = self.model(piece, state=state, last_only=True)
        assert state is not None
        return state

    def _logits(self, tokens: Tensor, state: ModelState | None = None) -> Iterator[tuple[int, Tensor]]:
        """The start of each piece of tokens [B, T], and its logits, float32 [B, piece, V]."""
        most = MAX_LOGITS // (len(tokens) * self.model.config.vocab_size)
        start = 0
        for piece in tokens.split(max(1, min(self.segment, most)), 1):
            logits, state = self.model(piece, state=state)
            yield start, logits.float()
            start += piece.shape[1]
