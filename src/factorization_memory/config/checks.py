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


def require_finite(config: Any, section: str) -> None:
    """Infinities pass the comparisons that bound a field on one side, and NaN those that are written the other way."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
        require(finite, f"{section}.{f.name}", value, "use a finite number")
