"""Language models."""

from factorization_memory.layers.state import ModelState
from factorization_memory.models.language_model import LanguageModel

__all__ = ["LanguageModel", "ModelState"]
