"""`replica.py N train ...` is `fmem train ...` with initial weights that are off by up to 2^-9 of themselves, as if rounded to
bfloat16, at random by the number N; with 0 they are as they are."""

import sys

import torch

from factorization_memory.cli import main
from factorization_memory.config import ModelConfig
from factorization_memory.training import trainer

Model = trainer.LanguageModel
NUMBER = int(sys.argv[1])


def rounded(config: ModelConfig) -> Model:
    model = Model(config)
    random = torch.Generator().manual_seed(1000 + NUMBER)
    if NUMBER:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 2.0**-9 * (2 * torch.rand(parameter.shape, generator=random) - 1))
    return model


trainer.LanguageModel = rounded
main(sys.argv[2:])
