"""What the recurrence cannot do without, counted by hand."""

from __future__ import annotations

import pytest
import torch

from factorization_memory.benchmarks import timing
from factorization_memory.benchmarks.floor import (
    Rates,
    compulsory_bytes,
    floor,
    least_flops,
    measure_rates,
    peak_teraflops,
    training_flops,
)
from factorization_memory.benchmarks.settings import Shape
from factorization_memory.config import ModelConfig
from factorization_memory.models import LanguageModel
from factorization_memory.models.counting import count


def test_bytes() -> None:
    # bfloat16: v and y forward, v, dy and dv backward, 2 bytes each; theta and phi in float32, read twice, gradients written.
    wide = Shape(16, 2048, 1, 64, 2048)
    assert compulsory_bytes(wide, torch.bfloat16) == {
        "forward": 4 * 2048 + 2 * 64 * 4,
        "forward_backward": 10 * 2048 + 3 * 2 * 64 * 4,
    }
    heads = Shape(1, 8, 3, 64, 2048)
    assert compulsory_bytes(heads, torch.bfloat16)["forward"] == 3 * (4 * 2048 + 2 * 64 * 4)
    assert compulsory_bytes(wide, torch.float64)["forward"] == 16 * 2048 + 2 * 64 * 8
    sparse = Shape(1, 8, 1, 64, 2048, 4)
    assert compulsory_bytes(sparse, torch.bfloat16) == {
        "forward": 4 * 2048 + 4 * (2 * 4 + 8),
        "forward_backward": 10 * 2048 + 4 * (3 * 2 * 4 + 2 * 8),
    }


def test_flops() -> None:
    assert least_flops(Shape(2, 8, 3, 64, 128)) == {"forward": 4 * 64 * 128 * 3, "forward_backward": 12 * 64 * 128 * 3}
    assert least_flops(Shape(2, 8, 1, 64, 128, 4))["forward"] == 4 * 4 * 128


def test_the_larger_bound_is_the_floor() -> None:
    rates = Rates(4e12, 800e12, "")
    thin = floor(Shape(16, 2048, 1, 64, 2048), torch.bfloat16, rates)
    assert thin["forward"]["bound"] == "memory"
    assert thin["forward"]["ns_per_token"] == pytest.approx((4 * 2048 + 512) / 4e12 * 1e9)
    wide = floor(Shape(16, 2048, 1, 1024, 2048), torch.bfloat16, rates)
    assert wide["forward_backward"]["bound"] == "arithmetic"
    assert wide["forward_backward"]["ns_per_token"] == pytest.approx(12 * 1024 * 2048 / 800e12 * 1e9)


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 1e-9)
    rates = measure_rates(torch.device("cpu"), repeats=1)
    assert 1e8 < rates.copy_bytes_per_second < 1e13
    assert 1e8 < rates.matmul_flops_per_second < 1e15
    assert "float32" in rates.matmul


def test_training_flops_are_six_per_weight_and_the_recurrences() -> None:
    config = ModelConfig(vocab_size=100, hidden_size=64, num_layers=3, num_states=8)
    model = LanguageModel(config)
    linear = sum(
        m.weight.numel() for block in model.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)
    )  # fmt: skip
    expected = 6 * (linear + 64 * 100) + 3 * 3 * 4 * 8 * 128
    assert training_flops(count(config)) == expected


def test_peaks() -> None:
    assert peak_teraflops("NVIDIA H200") == peak_teraflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_teraflops("NVIDIA H100 PCIe") == 756
    assert peak_teraflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_teraflops("NVIDIA GeForce RTX 9999") is None
