"""What a configuration says when it cannot be."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the field, its value and the remedy."""


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise `ConfigError` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name}={value!r}: {remedy}")


LARGEST = 1 << 27
"""Of one size of a model: beyond what any machine holds, and small enough for the bytes of no weight or state to overflow 64
bits."""
LARGEST_WIDTH = 1 << 30
"""Of the products of two sizes that are the width of a weight."""
MOST_LAYERS = 1_000_000
MOST_TOKENS = (1 << 31) - 1
"""Of one sequence, or of the sequences of one forward pass: their borders are 32-bit integers. And of a vocabulary."""


def require_at_most(config: Any, section: str, largest: int, *names: str) -> None:
    """Raise `ConfigError` for the first of the fields `names` that is larger than anything can hold."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value <= largest, f"{section}.{name}", value, f"use {largest:,} or fewer")


def require_finite(config: Any, section: str) -> None:
    """Infinities pass the comparisons that bound a field on one side, and NaN those that are written the other way."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
        require(finite, f"{section}.{f.name}", value, "use a finite number")


def require_width(field: str, value: object, width: float) -> None:
    """Raise ConfigError unless a weight may be as wide as `value` of `field` makes it."""
    require(width <= LARGEST_WIDTH, field, value, f"makes a weight of width {width:,.0f}; use one of {LARGEST_WIDTH:,} or less")
