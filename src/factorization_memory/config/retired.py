"""Fields that configurations once had, so that what was saved with them loads or is refused, never misread.

A field is retired when measurement shows that it leads nowhere (docs/experiments.md has the figures). A saved configuration
that holds the value which means "without it" loads; any other is refused, with the last version that had the field.
"""

from __future__ import annotations

from typing import Any

from factorization_memory.config.checks import ConfigError

RETIRED: dict[str, dict[str, tuple[Any, str]]] = {
    "ModelConfig": {
        "merge_top_k": (None, "0.1.0"),
        "affinity_threshold": (None, "0.1.0"),
        "affinity": ("softmax", "0.1.0"),
        "query": ("shared", "0.1.0"),
        "norm": ("merged", "0.1.0"),
        "conv_input": ("value", "0.1.0"),
        "dropout": (0.0, "0.1.0"),
    },
}
"""By class and field: the neutral value, and the last version that had the field."""


def without_retired(section: str, values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The fields of a saved section that are not retired.

    Args:
        section: name of its class.
        values: its fields.
        path: where it stands, as "model.", for the message.

    Raises:
        ConfigError: a retired field holds another value than the neutral one.
    """
    retired = RETIRED.get(section, {})
    for name in values.keys() & retired.keys():
        neutral, version = retired[name]
        if values[name] != neutral:
            raise ConfigError(
                f"{path}{name}={values[name]!r}: this field is gone; use factorization_memory {version}, the last version that "
                f"had it, or {name}={neutral!r}"
            )
    return {name: value for name, value in values.items() if name not in retired}
