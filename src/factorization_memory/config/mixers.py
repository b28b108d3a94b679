"""The layers that mix tokens, by name, as far as configurations know them: what else they ask of one, and whether their state
grows with the text.

A package may add its own with `factorization_memory.layers.register_mixer`. Where it names the module that does so as an entry
point of the group `ENTRY_POINTS`, by the mixer's name, the command line finds it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from factorization_memory.config.checks import ConfigError

ENTRY_POINTS = "factorization_memory.mixers"


def _nothing(_: Any) -> None:
    """Asks nothing."""


def _never(_: Any) -> bool:
    return False


@dataclass(frozen=True)
class MixerChoice:
    """What a configuration knows of one mixer."""

    check: Callable[[Any], None] = _nothing
    """Raises ConfigError where a whole `ModelConfig` does not suit the mixer."""
    grows: Callable[[Any], bool] = _never
    """Of a `ModelConfig`: whether what the mixer keeps of a text grows with it, without end."""


_CHOICES: dict[str, MixerChoice] = {}


def add_mixer_choice(name: str, choice: MixerChoice) -> None:
    """Make a mixer's name one that `ModelConfig.mixers` takes.

    Raises:
        ValueError: the name is taken.
    """
    if name in _CHOICES:
        raise ValueError(f"mixer {name!r}: there is one of this name; choose another")
    _CHOICES[name] = choice


def mixer_names() -> tuple[str, ...]:
    """All names, in the order in which they were added."""
    return tuple(_CHOICES)


def mixer_choice(name: str) -> MixerChoice | None:
    """What is known of a mixer; one that a package installed here offers is loaded for it. None for no such name."""
    if name not in _CHOICES:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            try:
                entry.load()
            except Exception as error:  # of another package's code, whatever it is
                reason = f"{type(error).__name__}: {error}"
                raise ConfigError(f"model.mixers: {name!r} of {entry.value} could not be loaded ({reason})") from error
    return _CHOICES.get(name)
