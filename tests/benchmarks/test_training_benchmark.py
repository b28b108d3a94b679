"""The benchmark of whole training steps."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest
import torch

from factorization_memory.benchmarks import timing, training
from factorization_memory.benchmarks.floor import training_flops
from factorization_memory.config import ConfigError, ModelConfig
from factorization_memory.models.counting import count

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
    # Weights and two moments in float32, and the optimizer's counters.
    assert 12 * first["parameters"] <= first["held_bytes"] <= 12 * first["parameters"] + 10_000
    assert first["total_bytes"] == first["held_bytes"] + first["peak_bytes"]
    assert result["peak"]["source"].startswith("measured")
    flops = training_flops(count(MODEL))
    assert first["mfu"] == pytest.approx(flops * first["tokens_per_second"] / (result["peak"]["tflops"] * 1e12))


def test_a_given_peak_counts() -> None:
    benchmark = training.TrainingBenchmark(MODEL, batch=1, lengths=(8,), peers=(), repeats=1, peak_tflops=0.5)
    result = training.run(benchmark, CPU)
    assert result["peak"] == {"tflops": 0.5, "source": "given"}
    record = result["records"][0]
    assert record["mfu"] == pytest.approx(result["flops_per_token"] * record["tokens_per_second"] / 0.5e12)
    with pytest.raises(ConfigError, match=r"peak_tflops=-1"):
        training.TrainingBenchmark(peak_tflops=-1)


def test_losses_are_compiled_ours_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compiler(loss: Any, **options: Any) -> Any:
        asked.append(options)
        return loss

    monkeypatch.setattr(torch, "compile", compiler)
    benchmark = training.TrainingBenchmark(MODEL, batch=1, lengths=(8,), peers=(), repeats=1, compile=True, peak_tflops=1)
    result = training.run(benchmark, CPU)
    assert asked == [{"fullgraph": True, "dynamic": False}]
    assert result["compiled"]
    assert result["records"][0]["peak_bytes"] is None  # a compiler hides its allocations on a CPU


def test_what_backward_keeps_can_be_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch import config

    budgets: list[float] = []

    def compiler(loss: Any, **options: Any) -> Any:
        def compiled(*arguments: Any) -> Any:
            budgets.append(config.activation_memory_budget)
            return loss(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    benchmark = training.TrainingBenchmark(
        MODEL, batch=1, lengths=(8,), peers=(), repeats=1, compile=True, activation_memory_budget=0.6, peak_tflops=1
    )
    assert training.run(benchmark, CPU)["activation_memory_budget"] == 0.6
    assert set(budgets) == {0.6}
    assert config.activation_memory_budget == 1.0
    with pytest.raises(ValueError, match=r"activation_memory_budget=1\.5"):
        training.run(dataclasses.replace(benchmark, activation_memory_budget=1.5), CPU)


def test_a_failure_of_ours_ends_it_and_a_peers_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise ValueError("no")

    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(training, "_peers", lambda *arguments: {"llama": (model, broken)})
    benchmark = training.TrainingBenchmark(MODEL, batch=1, lengths=(8,), repeats=1, peak_tflops=1)
    ours, peer = training.run(benchmark, CPU)["records"]
    assert ours["error"] is None
    assert peer["error"] == "ValueError: no"
    assert peer["tokens_per_second"] is None
    monkeypatch.setattr(training, "_our_loss", broken)
    with pytest.raises(RuntimeError, match="T=8 failed: ValueError: no"):
        training.run(benchmark, CPU)


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
