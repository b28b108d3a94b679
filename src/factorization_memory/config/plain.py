"""Configurations as plain dictionaries, and back."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from typing import Any, Literal, TypeVar

from factorization_memory.config.checks import ConfigError
from factorization_memory.config.retired import without_retired

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """The inverse of `to_dict`: a configuration of class `cls`, also after a round trip through JSON.

    Retired fields may be present with their neutral value. Raises `ConfigError` for one with another value, for an unknown
    field (naming the nearest valid one) or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path.rstrip('.') or 'configuration'}={values!r}: expected an object of fields")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments = {}
    for name, value in without_retired(cls.__name__, values, path).items():
        if name not in known:
            raise ConfigError(f"{path}{name}: no such field{suggestion(name, known)}")
        arguments[name] = _from_plain(hints[name], value, f"{path}{name}")
    return cls(**arguments)


def require_types(config: Any, section: str) -> None:
    """Raises `ConfigError` for the first field whose value is not of its type. Nested configurations check themselves."""
    for name, hint in _hints(config.__class__).items():
        if not dataclasses.is_dataclass(hint):
            _from_plain(hint, getattr(config, name), f"{section}.{name}")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def suggestion(name: str, known: typing.Iterable[str]) -> str:
    """`"; did you mean ...?"` with the valid name nearest to `name`, or the list of them."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; choose from {', '.join(sorted(known))}"


def _from_plain(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, f"{path}.")
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _from_plain(next(o for o in options if o is not type(None)), value, path)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ConfigError(f"{path}={value!r}: use one of {', '.join(map(repr, allowed))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r}: expected a list")
        kinds = typing.get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(value) != len(kinds):
            raise ConfigError(f"{path}={value!r}: expected {len(kinds)} values")
        return tuple(_from_plain(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}={value!r}: expected an object")
        return {name: _from_plain(typing.get_args(hint)[1], item, f"{path}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{path}: got a number of {len(str(value))} digits, too large for a float") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path}={value!r}: expected {hint.__name__}")
    return value
