"""The token mixers by name, as configurations see them: their checks, and whether their state grows with the length read.

A package may add its own with `factorization_memory.layers.register_mixer`. If it declares the module that does so as an entry
point of the group `ENTRY_POINTS`, under the mixer's name, the command line finds it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from factorization_memory.config.checks import ConfigError

ENTRY_POINTS = "factorization_memory.mixers"


def _nothing(_: Any) -> None:
    """Checks nothing."""


def _never(_: Any) -> bool:
    return False


@dataclass(frozen=True)
class MixerChoice:
    """One mixer as configurations see it."""

    check: Callable[[Any], None] = _nothing
    """Raises ConfigError if a `ModelConfig` does not suit the mixer."""
    grows: Callable[[Any], bool] = _never
    """Whether, for a `ModelConfig`, the mixer's state grows with the length read without limit."""


_CHOICES: dict[str, MixerChoice] = {}


def add_mixer_choice(name: str, choice: MixerChoice) -> None:
    """Makes `ModelConfig.mixers` accept a mixer's name.

    Raises:
        ValueError: the name is taken.
    """
    if name in _CHOICES:
        raise ValueError(f"mixer {name!r}: this name is already taken; choose another")
    _CHOICES[name] = choice


def mixer_names() -> tuple[str, ...]:
    """All names, in order of registration."""
    return tuple(_CHOICES)


def mixer_choice(name: str) -> MixerChoice | None:
    """The `MixerChoice` of a mixer, loading the installed package that provides it if necessary; None for an unknown name."""
    if name not in _CHOICES:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            try:
                entry.load()
            except Exception as error:  # another package's code may raise anything
                reason = f"{type(error).__name__}: {error}"
                raise ConfigError(f"model.mixers: {name!r} of {entry.value} could not be loaded ({reason})") from error
    return _CHOICES.get(name)
