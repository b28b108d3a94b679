"""AdamW with weight decay only on the weight matrices."""

from __future__ import annotations

import torch
from torch import nn

from factorization_memory.config import OptimizerConfig


def decay_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the parameters with and without weight decay, each in the model's order.

    Weights of linear maps are decayed. Embeddings (and a head tied to one), convolution taps, norm gains and biases are not:
    shrinking them changes their meaning (a word, a gain, a time scale) rather than the complexity of a map.
    """
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[str] = []
    free: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if id(parameter) in linear - embeddings else free).append(name)
    return decayed, free


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, fused if device and dtype support it (2-3 times as fast as the loop on a
    CPU). The learning rate is the peak until `set_learning_rate` sets that of a step."""
    named = dict(model.named_parameters())
    decayed, free = ([named[name] for name in group] for group in decay_groups(model))
    parameters = decayed + free
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of the next step in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
