"""Generation as tasks of lm-evaluation-harness ask for it: settings from the options of a request, and the choice of tokens.

Shapes: N sequences, V vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Decoding:
    """Generation settings of a task, from the options of its requests.

    `until` (stop strings), `max_gen_toks` (or one of its other names), `do_sample`, `temperature`, `top_k`, `top_p`. Greedy
    unless `do_sample` is set, or only a temperature. Samples with PyTorch's global generator, which the harness seeds.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(self, options: dict[str, Any], max_tokens: int) -> None:
        options = dict(options)
        until = options.pop("until", None) or []
        self.until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        for name in ("max_completion_tokens", "max_tokens", "max_new_tokens", "max_gen_toks"):  # the last one wins
            given = options.pop(name, None)
            max_tokens = max_tokens if given is None else given
        self.max_tokens = int(max_tokens)
        self.temperature = float(options.pop("temperature", None) or 0.0)
        sampled = options.pop("do_sample", None)
        self.top_k = int(options.pop("top_k", None) or 0)
        self.top_p = float(options.pop("top_p", None) or 1.0)
        if options.pop("num_beams", 1) != 1:
            raise ValueError("num_beams: a task asks for beam search, which is not supported here; leave the task out")
        if options:
            raise ValueError(f"{', '.join(sorted(options))}: task options that are not supported here; leave the task out")
        if self.max_tokens < 0 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_gen_toks={self.max_tokens}, temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}: "
                "use 0 or more for the first three, and above 0 and up to 1 for top_p"
            )
        if sampled and not self.temperature:
            self.temperature = 1.0
        elif sampled is False:
            self.temperature = 0.0

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row of `logits` `[N, V]`, int64 `[N]`."""
        if not self.temperature:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        probabilities, tokens = logits.softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        drawn = torch.multinomial(probabilities.masked_fill(before >= self.top_p, 0.0), 1)
        return tokens.gather(-1, drawn)[:, 0]
