"""Reads and writes models in Hugging Face's layout without `transformers`; and the model that comes with the package."""

from factorization_memory.models.pretrained.card import CardFacts, model_card
from factorization_memory.models.pretrained.export import save_pretrained
from factorization_memory.models.pretrained.format import FormatError, builtin_model, is_pretrained, load_pretrained

__all__ = [
    "CardFacts",
    "FormatError",
    "builtin_model",
    "is_pretrained",
    "load_pretrained",
    "model_card",
    "save_pretrained",
]
