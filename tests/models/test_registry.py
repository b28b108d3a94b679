"""CONTRIBUTING's recipe for a mixer, carried out from outside the package: one module, one entry, and everything goes by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from factorization_memory.config import ConfigError, ModelConfig
from factorization_memory.config.mixers import MixerChoice
from factorization_memory.layers import MIXERS, MixerKind, register_mixer

MODULE = '''
"""An exponential moving average of each channel: y_t = s_t, s_t = s_{t-1} / 2 + x_t / 2."""
from dataclasses import dataclass

import torch
from torch import nn

from factorization_memory.layers import LayerStateBase, MixerKind, register_mixer


@dataclass
class AverageState(LayerStateBase):
    average: torch.Tensor  # [B, d]


class Average(nn.Module):
    state_type = AverageState

    def __init__(self, size):
        super().__init__()
        self.output = nn.Linear(size, size, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.output.weight, std=self.output.in_features**-0.5)

    def initial_state(self, batch_size, capacity=0):
        return AverageState(self.output.weight.new_zeros(batch_size, self.output.in_features))

    def check_state(self, state, sequences):
        if state.average.shape != (sequences, self.output.in_features):
            raise ValueError(f"state: got {tuple(state.average.shape)}")

    def forward(self, x, state=None, cu_seqlens=None, padding_mask=None, keep_state=True):
        average = self.initial_state(len(x)).average if state is None else state.average
        outputs = []
        for token in x.unbind(1):
            average = (average + token) / 2
            outputs.append(average)
        return self.output(torch.stack(outputs, dim=1)), AverageState(average) if keep_state else None

    def step(self, x, state):
        state.average.add_(x).div_(2)
        return self.output(state.average)


register_mixer("average", MixerKind(lambda config: Average(config.hidden_size), recurrence_flops=lambda c: 2 * c.hidden_size))
'''


def test_a_mixer_from_outside_goes_everywhere(tmp_path: Path) -> None:
    """As an installed package would bring it: the command line finds it by its entry point."""
    (tmp_path / "averages.py").write_text(MODULE, encoding="utf-8")
    information = tmp_path / "averages-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: averages\nVersion: 1.0\n", encoding="utf-8")
    (information / "entry_points.txt").write_text("[factorization_memory.mixers]\naverage = averages\n", encoding="utf-8")
    (tmp_path / "books").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "books" / f"{name}.txt").write_text(f"It was a dark and stormy night in {name}.\n" * 60, encoding="utf-8")

    def fmem(*words: str) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join(path for path in (str(tmp_path), os.environ.get("PYTHONPATH", "")) if path)
        command = [sys.executable, "-m", "factorization_memory.cli", *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}
        )

    small = [
        "--model.mixers", "average", "memory", "--model.hidden-size", "16", "--model.num-layers", "2",
        "--model.num-states", "4",
    ]  # fmt: skip
    fmem("data", "tokenizer", "books", "--vocab-size", "300", "--output", "tok.json")
    fmem("data", "pack", "en=books", "--tokenizer", "tok.json", "--output", "packed")
    plan = json.loads(fmem("plan", "paper", *small, "--model.vocab-size", "300", "--json").stdout)
    assert plan
    fmem(
        "train", "paper", *small, "--data.corpus", "packed", "--run-dir", "run", "--data.context-length", "16",
        "--training.tokens-per-step", "32", "--training.steps", "2", "--training.sample-every", "0",
    )  # fmt: skip
    assert "average" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["mixers"] == ["average", "memory"]
    written = json.loads(fmem("generate", "run", "--prompt", "It was", "--max-tokens", "4", "--json").stdout.splitlines()[0])
    assert written


def test_names_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"model\.mixers\[1\]='mamba': use one of 'memory', 'attention', 'mamba2'"):
        ModelConfig(mixers=("memory", "mamba"))
    with pytest.raises(ConfigError, match=r"model\.mixers"):
        ModelConfig(mixers=())
    with pytest.raises(ValueError, match="mixer 'mamba2': this name is already taken"):
        register_mixer("mamba2", MIXERS["mamba2"])
    with pytest.raises(ValueError, match="mixer 'memory': this name is already taken"):
        register_mixer("memory", MixerKind(lambda config: None), MixerChoice())
