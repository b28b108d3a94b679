"""Fields that configurations once had, so that files saved with them either load or are refused, but are never misread.

A field is retired when measurements show no benefit (docs/experiments.md has the figures). A saved configuration with the
field's neutral value, "without it", loads; any other is refused, naming the last version that had the field.
"""

from __future__ import annotations

from typing import Any

from factorization_memory.config.checks import ConfigError

FIRST = "0.1.0 (commit 1f9596a)"

RETIRED: dict[str, dict[str, tuple[Any, str]]] = {
    "ModelConfig": {
        "merge_top_k": (None, FIRST),
        "affinity_threshold": (None, FIRST),
        "affinity": ("softmax", FIRST),
        "query": ("shared", FIRST),
        "norm": ("merged", FIRST),
        "conv_input": ("value", FIRST),
        "dropout": (0.0, FIRST),
    },
}
"""By class and field: the neutral value, and the last version that had the field."""


def without_retired(section: str, values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The fields of a saved section that are not retired.

    Args:
        section: name of its class.
        values: its fields.
        path: its prefix for the message, such as "model.".

    Raises:
        ConfigError: a retired field has a value other than the neutral one.
    """
    for name, value in values.items():
        if name in RETIRED.get(section, {}) and not is_neutral(section, name, value):
            version = RETIRED[section][name][1]
            raise ConfigError(
                f"{path}{name}={value!r}: this field was removed; load models trained with it in "
                f"factorization_memory {version}, and leave it out of new runs"
            )
    return {name: value for name, value in values.items() if name not in RETIRED.get(section, {})}


def is_neutral(section: str, name: str, value: Any) -> bool:
    """Whether a retired field of a section's class has its neutral value."""
    return name in RETIRED.get(section, {}) and bool(value == RETIRED[section][name][0])
