from __future__ import annotations

import pytest
import torch
from torch import nn

from factorization_memory.config import ModelConfig, OptimizerConfig
from factorization_memory.models import LanguageModel
from factorization_memory.training.optimizer import decay_groups, make_optimizer, set_learning_rate


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_of_linear_maps_decay(tied: bool) -> None:
    model = LanguageModel(
        ModelConfig(vocab_size=50, hidden_size=16, num_layers=2, num_states=4, conv_size=3, tie_word_embeddings=tied)
    )
    decayed, free = decay_groups(model)
    named = dict(model.named_parameters())
    assert sorted(decayed + free) == sorted(named)
    assert all(named[name].ndim == 2 for name in decayed)
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    assert {id(named[name]) for name in decayed} == linear - embeddings
    assert len(linear & embeddings) == (1 if tied else 0)


def test_decay_moves_what_it_should_and_nothing_else() -> None:
    model = LanguageModel(ModelConfig(vocab_size=50, hidden_size=16, num_layers=1, num_states=4))
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed, _ = decay_groups(model)
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.95 if name in decayed else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


def test_one_fused_kernel_does_what_the_loop_does() -> None:
    torch.manual_seed(0)
    results = []
    start, gradient = torch.randn(8, 8), torch.randn(5, 8, 8)
    for fused in (None, False):
        linear = nn.Linear(8, 8, bias=False)
        linear.weight.data.copy_(start)
        optimizer = make_optimizer(linear, OptimizerConfig())
        if fused is False:
            optimizer = torch.optim.AdamW(linear.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=False)
        else:
            assert optimizer.defaults["fused"]
        for step in gradient:
            linear.weight.grad = step.clone()
            optimizer.step()
        results.append(linear.weight.detach())
    torch.testing.assert_close(results[0], results[1])
