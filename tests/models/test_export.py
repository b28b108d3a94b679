"""`torch.export` with gradients enabled, of any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factorization_memory import LanguageModel
from factorization_memory.config import GatedDeltaNetConfig, Mamba2Config, ModelConfig


class Logits(nn.Module):
    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3, "conv_size": 3, "update_lag": 1},
        {"mixers": ("memory", "attention")},
        {"mixers": ("mamba2",), "mamba2": Mamba2Config(8, 8, chunk_size=4)},
        {"mixers": ("gated_deltanet",), "gated_deltanet": GatedDeltaNetConfig(head_size=8)},
    ],
)
def test_any_length(options: dict[str, Any]) -> None:
    model = Logits(LanguageModel(ModelConfig(vocab_size=11, hidden_size=16, num_layers=2, num_states=8, **options)).double())
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(model, (torch.zeros(2, 20, dtype=torch.int64),), dynamic_shapes={"tokens": {1: length}})
    for count in (2, 9, 70, 300):
        tokens = torch.randint(0, 11, (2, count))
        found = []
        for call in (program.module(), model):
            logits = call(tokens)
            found.append([logits, *torch.autograd.grad(logits.square().sum(), list(call.parameters()))])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
