"""Trains two small models on recall that differ only in `update_lag`: what writing one token later is worth.

The record, ready for JSON:

    pairs       P; a sequence is P keys with their values, then positions where the keys are repeated, see recall_tasks.py
    seconds     of both models together
    tokens      a sequence of the test split in letters: keys "A", "B", ..., their values "a", "b", ..., fillers "·"
    asked       positions of the repeated keys in it, that of A first
    models      for the associative form and the paper's form: {name, update_lag, config, parameters, step, accuracy, answers,
                layer, reads}
      step        list of steps; `accuracy` is the share of correct values in the test split after each
      answers     the trained model's answer at each position of `asked`: a letter, or "?" for a value not in the sequence
      layer       the memory layer shown: the one whose questions read most from where their values were written
      reads       [P][T]: the share of each token's write in what each position of `asked` reads in it; see reading.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from factorization_memory.config import ModelConfig, to_dict
from factorization_memory.evaluation.loss import evaluating
from factorization_memory.evaluation.reading import writes_read
from factorization_memory.evaluation.recall_learning import TEST_SEQUENCES, RecallProgress, learn_recall
from factorization_memory.evaluation.recall_tasks import associative_recall
from factorization_memory.models import LanguageModel
from factorization_memory.models.routing import memory_layers, observe_routing

if TYPE_CHECKING:
    from factorization_memory.runs.recall_record import RecallDemoAnswers, RecallDemoModel, RecallDemoRecord

FORMS = {"associative form": 1, "paper's form": 0}
"""The update lag of each."""


def recall_demo(
    steps: int = 100,
    seed: int = 0,
    *,
    pairs: int = 4,
    every: int = 4,
    progress: Callable[[dict[str, RecallProgress]], None] | None = None,
) -> RecallDemoRecord:
    """Train both models on the CPU, in turn, a few steps each; about ten seconds.

    Args:
        progress: called every `every` steps with the progress of both, by name.

    Returns the record that the head of this file describes. Raises ValueError for arguments that `learn_recall` refuses.
    """
    started = time.monotonic()
    configs = {
        name: ModelConfig(hidden_size=32, num_layers=2, num_states=32, top_k=4, rates="head", update_lag=lag)
        for name, lag in FORMS.items()
    }
    learning = [
        learn_recall(config, pairs, steps, seed, every=every, batch_size=32, learning_rate=5e-3, warmup_steps=20)
        for config in configs.values()
    ]
    reports: list[dict[str, RecallProgress]] = []
    with _one_thread():
        for both in zip(*learning, strict=True):
            reports.append(dict(zip(FORMS, both, strict=True)))
            if progress is not None:
                progress(reports[-1])
        tokens, asked, letters = _example(pairs)
        models: list[RecallDemoModel] = []
        for name, config in configs.items():
            last = reports[-1][name]
            models.append(
                {
                    "name": name,
                    "update_lag": config.update_lag,
                    "config": to_dict(config),
                    "parameters": last.parameters,
                    "step": [each[name].step for each in reports],
                    "accuracy": [each[name].accuracy for each in reports],
                    **_looked_into(last.model, tokens, asked, letters),
                }
            )
    return {
        "pairs": pairs,
        "seconds": time.monotonic() - started,
        "tokens": [letters.get(token, "·") for token in tokens.tolist()],
        "asked": asked,
        "models": models,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Uses one thread: tensors this small gain nothing from more, which on a busy machine wait for each other at every op."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _example(pairs: int) -> tuple[torch.Tensor, list[int], dict[int, str]]:
    """The first test sequence whose values all differ: tokens [T], positions of the repeated keys, and letters of both."""
    for row in associative_recall(pairs, "test", 0, TEST_SEQUENCES)[0]:
        keys, values = row[: 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist()
        if len(set(values)) == pairs:
            break
    letters = {key: chr(ord("A") + i) for i, key in enumerate(keys)} | {
        value: chr(ord("a") + i) for i, value in enumerate(values)
    }
    rest = row[2 * pairs :].tolist()
    return torch.from_numpy(row), [2 * pairs + rest.index(key) for key in keys], letters


def _looked_into(model: LanguageModel, tokens: torch.Tensor, asked: list[int], letters: dict[int, str]) -> RecallDemoAnswers:
    """`answers`, `layer` and `reads` of one model."""
    with evaluating(model), observe_routing(model) as observed:
        named = model(tokens[None])[0][0, asked].argmax(-1).tolist()
    layers = {}
    for layer, (routing,) in zip(memory_layers(model), observed, strict=True):
        reads = writes_read(routing)[0].sum(0)[asked]
        layers[layer] = reads / reads.sum(-1, keepdim=True).clamp(min=1e-30)
    values = torch.arange(1, 2 * len(asked), 2)
    best = max(layers, key=lambda layer: float(layers[layer][torch.arange(len(asked)), values].sum()))
    return {
        "answers": [letters.get(token, "?") for token in named],
        "layer": best,
        "reads": [[round(float(part), 4) for part in row] for row in layers[best]],
    }
