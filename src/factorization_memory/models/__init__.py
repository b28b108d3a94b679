"""Language models."""

from factorization_memory.layers.model_state import ModelState
from factorization_memory.models.language_model import LanguageModel

__all__ = ["LanguageModel", "ModelState"]
