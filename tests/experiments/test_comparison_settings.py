"""What a comparison can be made of, and the plan that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from factorization_memory.config import ConfigError
from factorization_memory.experiments.comparison_settings import (
    ComparisonSettings,
    check,
    learning_rates,
    training_seeds,
)
from factorization_memory.experiments.contenders import read_contender
from factorization_memory.experiments.planning import make_plan


def settings(**changes: Any) -> ComparisonSettings:
    return ComparisonSettings(**{"contenders": ("demo", "b=tiny"), "corpus": Path("none"), "out": Path("out"), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contenders": ("demo",)}, "contenders='demo': name two or more"),
        ({"parallel": 0}, "parallel=0: use 1 or more"),
        ({"alone_steps": -1}, "alone_steps=-1: use 0 or more"),
        ({"max_tokens": 0}, "max_tokens=0: use 1 or more"),
        ({"search_fraction": 0.0}, "search_fraction=0.0: use 0 < fraction <= 1"),
        ({"positions": (4, 6)}, "positions=6: use powers of two"),
        ({"match_to": "demo", "parameters": 1000}, "parameters=1000: cannot be combined"),
    ],
)
def test_settings_that_no_comparison_has(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(settings(**changes), {})


def test_what_has_a_setting_is_not_overridden() -> None:
    with pytest.raises(ConfigError, match=r"--training\.seed=3: give the seeds"):
        make_plan(settings(), {"training.seed": "3"})


def test_contenders_are_told_apart_and_known() -> None:
    with pytest.raises(ConfigError, match="'demo': this name is used twice"):
        make_plan(settings(contenders=("demo", "demo")))
    with pytest.raises(ConfigError, match="unknown contender 'dmo'; did you mean 'demo'"):
        make_plan(settings(match_to="dmo"))


def test_rates_and_seeds_of_each_contender() -> None:
    contenders = [read_contender(text, {}) for text in ("demo", "b=tiny")]
    own = contenders[1].config.optimizer.learning_rate
    assert learning_rates(("demo=2e-3,1e-3",), contenders) == {"demo": (1e-3, 2e-3), "b": (own / 2, own, own * 2)}
    assert training_seeds(("1,0", "b=7"), contenders) == {"demo": (0, 1), "b": (7,)}
    for texts, message in (
        (("x",), "seeds=x: use whole"),
        (("b=1,1",), "seeds=b=1,1: has duplicates; give each once"),
        (("b=1",), "for 'demo'"),
    ):
        with pytest.raises(ConfigError, match=message):
            training_seeds(texts, contenders)
    for texts, message in ((("0",), "learning_rates='0'"), (("c=1",), "--learning-rates: unknown contender 'c'")):
        with pytest.raises(ConfigError, match=message):
            learning_rates(texts, contenders)
