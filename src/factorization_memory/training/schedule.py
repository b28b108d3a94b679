"""The learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math

from factorization_memory.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 1, in a run of `total_steps`.

    Rises linearly over `config.warmup_steps`, reaching the peak at their last step; then follows `config.schedule`, which ends
    at `final_ratio` times the peak at the last step ("cosine", "wsd") or stays at the peak ("constant"). A run shorter than
    its warm-up only warms up. Raises ValueError for a step outside 1 to `total_steps`.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step={step}: use 1 to total_steps={total_steps}")
    if step <= config.warmup_steps:
        return config.learning_rate * (step / config.warmup_steps)
    if config.schedule == "constant":
        return config.learning_rate
    after_warmup = total_steps - config.warmup_steps
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / after_warmup
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        decay_steps = min(max(1, round(config.decay_fraction * total_steps)), after_warmup)
        share = min(1.0, (total_steps - step) / decay_steps)
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * share)
