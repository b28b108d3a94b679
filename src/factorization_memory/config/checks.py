"""Validation of configurations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


class ConfigError(ValueError):
    """An invalid configuration; the message names the field, its value and the remedy."""


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises `ConfigError` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name}={value!r}: {remedy}")


LARGEST = 1 << 27
"""Largest size of one dimension: more than fits any machine, yet small enough that no weight's or state's bytes overflow 64
bits."""
LARGEST_WIDTH = 1 << 30
"""Largest product of two sizes that is the width of a weight."""
MOST_LAYERS = 1_000_000
MOST_TOKENS = (1 << 31) - 1
"""Most tokens of one sequence, or of the sequences of one forward pass, whose borders are 32-bit integers; and of a
vocabulary."""


def require_at_most(config: Any, section: str, largest: int, *names: str) -> None:
    """Raises `ConfigError` for the first of the fields `names` that exceeds `largest`."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value <= largest, f"{section}.{name}", value, f"use {largest:,} or fewer")


def require_finite(config: Any, section: str) -> None:
    """Raises `ConfigError` for infinite and NaN fields, which pass one-sided comparisons."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
        require(finite, f"{section}.{f.name}", value, "use a finite number")


def require_width(field: str, value: object, width: float) -> None:
    """Raises ConfigError if `value` of `field` makes a weight of `width` that is too wide."""
    require(width <= LARGEST_WIDTH, field, value, f"gives a weight of width {width:,.0f}; the limit is {LARGEST_WIDTH:,}")
