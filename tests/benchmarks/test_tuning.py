"""The search of tiles, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from factorization_memory.benchmarks.settings import Shape
from factorization_memory.benchmarks.tuning import tune
from factorization_memory.config import ConfigError
from factorization_memory.ops.memory.kernels import tuning
from factorization_memory.ops.memory.kernels.tuning import KERNELS, Tile, candidates, tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CHOSEN", {})


def test_few_candidates_that_fit() -> None:
    for kernel in KERNELS:
        for chunk in (16, 32, 64, 128):
            for padded in (16, 32, 64, 128, 256, 384, 1024):
                for dtype in (torch.bfloat16, torch.float32):
                    found = candidates(kernel, chunk, padded, dtype)
                    assert 1 <= len(found) <= 8
                    assert all(padded % one.states == 0 for one in found if kernel != "outputs")
    with pytest.raises(KeyError):
        candidates("other", 64, 64, torch.float32)


def test_the_right_and_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)
    wrong = Tile(16, 24, 4, 1)  # no power of two
    monkeypatch.setattr(tuning, "candidates", lambda kernel, *_: [slow, wrong, fast] if kernel == "walk" else [slow])
    [record] = tune([Shape(1, 20, 1, 4, 32)], torch.float32, DEVICE, repeats=1)
    assert record["kernel"] == "walk"
    assert record["tried"][1] is None
    best = min((seconds, i) for i, seconds in enumerate(record["tried"]) if seconds is not None)[1]
    assert tile("walk", record["chunk"], record["padded"], torch.float32) == [slow, wrong, fast][best]
    assert record["shipped"] == (best == 0)


def test_where_the_kernels_cannot_run() -> None:
    with pytest.raises(ConfigError, match=r"tune=True: value has dtype torch.float64"):
        tune([Shape()], torch.float64, DEVICE, repeats=1)
