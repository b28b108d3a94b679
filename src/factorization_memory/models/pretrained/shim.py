"""The file next to a saved model through which `trust_remote_code=True` finds our classes if they have not been imported.

Its single line imports them from the installed package; if that is missing, `transformers` says so, and to
`pip install factorization_memory`.
"""

from __future__ import annotations

from pathlib import Path

from factorization_memory._files import write_atomic

MODULE = "modeling_factorization_memory"
CLASSES = {
    "AutoConfig": "FactorizationMemoryConfig",
    "AutoModel": "FactorizationMemoryModel",
    "AutoModelForCausalLM": "FactorizationMemoryForCausalLM",
    "AutoModelForSequenceClassification": "FactorizationMemoryForSequenceClassification",
}
AUTO_MAP = {automatic: f"{MODULE}.{name}" for automatic, name in CLASSES.items()}
"""The field `auto_map` of config.json."""


def save_shim(folder: Path | str) -> None:
    """Writes the file atomically."""
    line = f"from factorization_memory.models.huggingface import {', '.join(CLASSES.values())}\n"
    write_atomic(Path(folder) / f"{MODULE}.py", line)
