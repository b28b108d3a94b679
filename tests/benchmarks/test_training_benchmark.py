"""The benchmark of whole training steps."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from factorization_memory.benchmarks import timing, training
from factorization_memory.config import ConfigError, ModelConfig

CPU = torch.device("cpu")
MODEL = ModelConfig(vocab_size=50, hidden_size=64, num_layers=2, num_states=8)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 1e-9)


def test_without_transformers_ours_is_measured_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = training.run(training.TrainingBenchmark(MODEL, batch=2, lengths=(16, 32), repeats=1), CPU)
    assert json.loads(json.dumps(result)) == result
    assert "pip install transformers" in result["missing"]
    assert [(record["model"], record["length"]) for record in result["records"]] == [(training.OURS, 16), (training.OURS, 32)]
    first = result["records"][0]
    assert first["tokens_per_second"] == pytest.approx(32 / first["seconds"]["median"])
    assert first["peak_bytes"] > 0


def test_a_step_trains() -> None:
    torch.manual_seed(0)
    model = training.LanguageModel(MODEL)
    step = training._Step(model, lambda tokens: training._our_loss(model, tokens), bfloat16=False)
    tokens = torch.randint(0, 50, (2, 16))
    before = training._our_loss(model, tokens).item()
    for _ in range(20):
        step(tokens)
    assert training._our_loss(model, tokens).item() < before


@pytest.mark.filterwarnings("ignore")  # those of another package's imports
def test_peers_have_as_many_parameters() -> None:
    pytest.importorskip("transformers")
    result = training.run(training.TrainingBenchmark(MODEL, batch=1, lengths=(8,), mamba2_layers=2, repeats=1), CPU)
    ours, *peers = result["records"]
    assert [peer["model"] for peer in peers] == ["llama", "mamba2"]
    for peer in peers:
        assert peer["parameters"] == pytest.approx(ours["parameters"], rel=0.01)
        assert peer["ours_over_this"] > 0


def test_unknown_peer() -> None:
    with pytest.raises(ConfigError, match="gpt"):
        training.TrainingBenchmark(peers=("gpt",))
