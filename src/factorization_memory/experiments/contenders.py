"""Contenders of a comparison, read from text: `paper`, `paper-sparse:model.top-k=8,model.num-heads=4`, `runs/mine/config.json`.

A value is parsed by the field's type, then validated like any configuration, so errors are reported in the same way.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorization_memory._files import JSONError, read_json
from factorization_memory.config import RETIRED, ConfigError, ModelConfig, RunConfig, from_dict, suggestion, to_dict
from factorization_memory.presets import PRESETS
from factorization_memory.runs.names import CONFIG_NAME

SECTIONS = ("model", "data", "optimizer", "training")
OWN_FIELDS = ("model.", "optimizer.", "training.micro_batch_size")
"""Fields in which contenders may differ: the micro-batch size changes neither the order of the text nor the batch size."""


@dataclass(frozen=True)
class Contender:
    """One side of a comparison."""

    name: str
    """Name in tables, figures and folders."""
    text: str
    """As it was given."""
    config: RunConfig
    own_fields: frozenset[str] = frozenset()
    """The fields that its text sets."""


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits command-line words into other words and flags that name a field of a run: `--model.top-k 8` becomes
    `{"model.top_k": "8"}`."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith(tuple(f"--{section}." for section in SECTIONS)):
            rest.append(word)
            continue
        flag, equals, text = word[2:].partition("=")
        section, _, last = flag.replace("-", "_").rpartition(".")
        negated = last.startswith("no_")
        name = f"{section}.{last.removeprefix('no_')}" if negated else f"{section}.{last}"
        hint = field_type(name)
        if hint is bool and not equals:
            text = "false" if negated else "true"
        elif negated:
            raise ConfigError(f"--{flag}: no such field; only a field that is true or false has a --no- flag")
        elif not equals:
            several = typing.get_origin(hint) in (tuple, dict)
            values: list[str] = []
            while words and not words[0].startswith("--") and (several or not values):
                values.append(words.pop(0))
            if not values:
                raise ConfigError(f"--{flag}: value missing; give one after the flag")
            text = ",".join(values)
        overrides[name] = text
    return rest, overrides


def read_contender(text: str, overrides: Mapping[str, str]) -> Contender:
    """`[NAME=]PRESET-OR-FILE[:field=value,...]` as a contender.

    `overrides` are the fields that all contenders share; what the text itself sets goes before them. Raises ConfigError that
    names the part of the text that is off.
    """
    named = re.fullmatch(r"([\w.+-]+)=(.+)", text) if "=" in text.partition(":")[0] else None
    body = named[2] if named else text
    base, _, settings = body.partition(":")
    own: dict[str, str] = {}
    # A comma followed by a name and "=" separates settings; other commas separate the values of one field.
    for part in re.split(r",(?=[\w.-]+=)", settings) if settings else ():
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"contender {text!r}: {part!r} is not a setting; write field=value, such as model.top-k=8")
        name = name.replace("-", "_")
        if not name.startswith(OWN_FIELDS):
            raise ConfigError(
                f"contender {text!r}: {name}={value}: contenders may differ only in model and optimizer; "
                f"to change it for all, use --{name.replace('_', '-')}"
            )
        own[name] = value
    try:
        config = override(_base(base), {**overrides, **own})
    except ConfigError as error:
        raise ConfigError(f"contender {text!r}: {error}") from None
    default = Path(base).resolve().parent.name if base.endswith(".json") else base
    return Contender(named[1] if named else default + (f":{settings}" if settings else ""), text, config, frozenset(own))


def _base(text: str) -> RunConfig:
    if text in PRESETS:
        return PRESETS[text]()
    path = Path(text)
    if not text.endswith(".json"):
        raise ConfigError(f"{text!r} is not a preset{suggestion(text, PRESETS)}; a file name must end in .json")
    try:
        values = read_json(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); give a run's {CONFIG_NAME}") from None
    except JSONError as error:
        raise ConfigError(f"{error}; give a run's {CONFIG_NAME}") from None
    return from_dict(RunConfig, values)


def override(config: RunConfig, settings: Mapping[str, str]) -> RunConfig:
    """`config` with fields set from text, by names like "model.attention.num_heads". Raises ConfigError as `from_dict` does."""
    values = to_dict(config)
    for name, text in settings.items():
        hint = field_type(name)
        *sections, last = name.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = _plain(hint, text)
    return from_dict(RunConfig, values)


def field_type(name: str) -> Any:
    """The type of a field of RunConfig, from a name like "model.top_k". Raises ConfigError with the most similar name."""
    kind: Any = RunConfig
    for i, part in enumerate(parts := name.split(".")):
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if kind is ModelConfig and part in RETIRED[ModelConfig.__name__]:
            version = RETIRED[ModelConfig.__name__][part][1]
            raise ConfigError(
                f"{name}: this field was removed; leave it out (factorization_memory {version} was the last to have it)"
            )
        if part not in hints:
            before = "".join(f"{each}." for each in parts[:i])
            known = [f"{before}{each}" for each in hints]
            raise ConfigError(f"{name}: no such field{suggestion(name, known) if known else ''}")
        kind = hints[part]
    if dataclasses.is_dataclass(kind):
        raise ConfigError(
            f"{name}: a section, not a field; set one of its fields, such as {name}.{dataclasses.fields(kind)[0].name}"
        )
    return kind


def _plain(hint: Any, text: str) -> Any:
    """`text` as the plain value that `from_dict` takes for `hint`, or as it is where it is none: `from_dict` then says so."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if text.lower() in ("none", "null"):
            return None
        return _plain(next(kind for kind in typing.get_args(hint) if kind is not type(None)), text)
    if origin is tuple:
        return [_plain(typing.get_args(hint)[0], part) for part in text.split(",")]
    if origin is dict:
        parts = text.split(",")
        kind = typing.get_args(hint)[1]
        return {key: _plain(kind, value) for key, value in zip(parts[::2], parts[1::2], strict=len(parts) % 2 == 0)}
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            return text
    return text
