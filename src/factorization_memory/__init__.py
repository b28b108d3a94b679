"""Factorization Memory: a recurrent language-model layer with a two-dimensional memory (arXiv 2511.00315).

The names below are imported lazily, so that `import factorization_memory` itself stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from factorization_memory._version import __version__

if TYPE_CHECKING:
    from factorization_memory.layers import FactorizationMemory
    from factorization_memory.models import LanguageModel
    from factorization_memory.ops import factorization_memory, factorization_memory_step

_HOMES = {
    "FactorizationMemory": "factorization_memory.layers",
    "LanguageModel": "factorization_memory.models",
    "factorization_memory": "factorization_memory.ops",
    "factorization_memory_step": "factorization_memory.ops",
}

__all__ = ["FactorizationMemory", "LanguageModel", "__version__", "factorization_memory", "factorization_memory_step"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
