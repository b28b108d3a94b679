from __future__ import annotations

import math

import pytest

from factorization_memory.experiments.record import mean_and_spread


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 4.0]) == pytest.approx({"mean": 7 / 3, "spread": math.sqrt(7 / 3)})
    assert mean_and_spread([1.0]) == {"mean": 1.0, "spread": None}
