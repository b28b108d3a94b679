from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factorization_memory.config import OptimizerConfig
from factorization_memory.training.schedule import learning_rate

configs = st.builds(
    OptimizerConfig,
    learning_rate=st.floats(1e-6, 1.0),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup_steps=st.integers(0, 60),
    decay_fraction=st.floats(0.01, 1.0),
    final_ratio=st.floats(0.0, 1.0),
)


@given(configs, st.integers(1, 200))
def test_rate_rises_to_the_peak_then_never_rises_again(config: OptimizerConfig, total: int) -> None:
    rates = [learning_rate(config, step, total) for step in range(1, total + 1)]
    warm = min(config.warmup_steps, total)
    assert all(0 <= rate <= config.learning_rate * (1 + 1e-12) for rate in rates)
    assert all(a < b for a, b in pairwise(rates[:warm]))
    after = rates[warm:]
    assert all(a >= b - 1e-12 * config.learning_rate for a, b in pairwise(after))
    if 0 < config.warmup_steps <= total:
        assert rates[config.warmup_steps - 1] == config.learning_rate


@given(configs, st.integers(61, 200))
def test_last_step_has_the_final_rate(config: OptimizerConfig, total: int) -> None:
    ratio = 1.0 if config.schedule == "constant" else config.final_ratio
    assert learning_rate(config, total, total) == pytest.approx(config.learning_rate * ratio, rel=1e-9, abs=1e-18)


def test_cosine_is_halfway_down_in_the_middle() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=20, final_ratio=0.2)
    assert learning_rate(config, 70, 120) == pytest.approx(0.6)


def test_wsd_is_stable_until_its_decay_and_then_linear() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_ratio=0.0)
    rates = [learning_rate(config, step, 100) for step in range(1, 101)]
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == pytest.approx([1 - k / 20 for k in range(1, 21)])


def test_wsd_decay_gives_way_to_the_warmup() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_steps=50, decay_fraction=1.0, final_ratio=0.0)
    assert learning_rate(config, 50, 100) == 1.0
    assert learning_rate(config, 75, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("step", [0, -1, 11])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step={step}"):
        learning_rate(OptimizerConfig(), step, 10)
