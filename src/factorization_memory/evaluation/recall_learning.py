"""Trains small models on associative recall from scratch: how soon do they find the value of a key?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from factorization_memory.config import ModelConfig
from factorization_memory.evaluation.loss import evaluating
from factorization_memory.evaluation.recall_tasks import IGNORED, associative_recall
from factorization_memory.models import LanguageModel

TEST_SEQUENCES = 256


@dataclass(frozen=True)
class RecallProgress:
    """Training progress of a model.

    Attributes:
        step: training steps done.
        loss: mean loss since the last report, in nats per queried value.
        accuracy: share of correct values in the test split.
        parameters: of the model.
        seconds: since the start.
        model: the model itself, which later steps keep changing.
    """

    step: int
    loss: float
    accuracy: float
    parameters: int
    seconds: float
    model: LanguageModel


def learn_recall(
    config: ModelConfig,
    pairs: int = 4,
    steps: int = 600,
    seed: int = 0,
    *,
    every: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
    warmup_steps: int = 100,
    device: torch.device | str = "cpu",
) -> Iterator[RecallProgress]:
    """Trains a model on `associative_recall`; reports every `every` steps and after the last.

    AdamW (weight decay 0.1, betas 0.9 and 0.95), gradients clipped to norm 1; the learning rate rises over `warmup_steps`,
    then falls linearly to a tenth. The test split is the same for all models and seeds; none of its sequences is trained on.

    Args:
        config: of the model; the task sets its `vocab_size`, 8 * pairs + 1.
        pairs: P of the task; sequences have 6 P tokens.
        seed: of the initial weights and of the training sequences.

    Raises ValueError for an argument out of range, when the first report is requested.
    """
    for name, value in (("steps", steps), ("every", every), ("batch_size", batch_size), ("warmup_steps", warmup_steps)):
        if value < 1:
            raise ValueError(f"{name}={value}: use 1 or more")
    started = time.monotonic()
    test, answers = (torch.from_numpy(x).to(device) for x in associative_recall(pairs, "test", 0, TEST_SEQUENCES))
    asked = answers != IGNORED
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU; keep the caller's random state
        torch.manual_seed(seed)
        model = LanguageModel(replace(config, vocab_size=8 * pairs + 1)).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    losses: list[torch.Tensor] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / warmup_steps) * (1 - 0.9 * step / steps)
        batch = associative_recall(pairs, "train", step * batch_size, batch_size, seed)
        tokens, targets = (torch.from_numpy(x).to(device) for x in batch)
        loss = functional.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            with evaluating(model):
                accuracy = (model(test)[0].argmax(-1)[asked] == answers[asked]).double().mean().item()
            mean = torch.stack(losses).mean().item()
            yield RecallProgress(step + 1, mean, accuracy, parameters, time.monotonic() - started, model)
            losses = []
