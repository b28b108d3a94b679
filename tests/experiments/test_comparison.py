from __future__ import annotations

import pytest

from factorization_memory.config import ConfigError
from factorization_memory.experiments.comparison import threads, visible_gpus


def test_threads_are_shared() -> None:
    assert [threads(16, parallel) for parallel in (1, 6, 32)] == [16, 2, 1]


def test_which_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(1) == []
    assert visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a")
    assert visible_gpus(2) == ["4", "GPU-a"]
    with pytest.raises(ConfigError, match="gpus=3: only 2 visible"):
        visible_gpus(3)
