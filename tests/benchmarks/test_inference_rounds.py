"""Rounds of steps of the inference benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from factorization_memory.benchmarks.device_memory import DeviceMemory
from factorization_memory.benchmarks.inference_contender import Step
from factorization_memory.benchmarks.inference_rounds import Writing, most_steps
from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.config import ModelConfig


class Counting:
    """A contender that counts the steps since its state was restored."""

    def __init__(self) -> None:
        self.steps = self.most = 0

    def keep(self) -> Callable[[], None]:
        return lambda: setattr(self, "steps", 0)

    def modes(self) -> dict[str, Step]:
        return {"eager": self.step, "graph": self.step}

    def step(self, tokens: Tensor) -> Tensor:
        self.steps += 1
        self.most = max(self.most, self.steps)
        return torch.zeros(len(tokens), 5)


@pytest.mark.parametrize(("decode_tokens", "repeats"), [(1, 1), (9, 1), (9, 4), (9, 20)])
def test_no_more_steps_follow_a_text_than_there_is_room_for(decode_tokens: int, repeats: int) -> None:
    model = ModelConfig(vocab_size=5, hidden_size=32)
    benchmark = InferenceBenchmark(model, decode_tokens=decode_tokens, repeats=repeats, decode_seconds=100)
    contender = Counting()
    writing = Writing(cast(Any, contender), benchmark, 2, DeviceMemory(torch.device("cpu")))
    for _ in range(repeats):
        writing.round()
    assert contender.most == most_steps(benchmark)
