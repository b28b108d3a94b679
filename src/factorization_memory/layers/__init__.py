"""The layers that models are built from."""

from factorization_memory.layers.factorization_memory import FactorizationMemory, Routing
from factorization_memory.layers.feed_forward import FeedForward
from factorization_memory.layers.state import LayerState, ModelState

__all__ = ["FactorizationMemory", "FeedForward", "LayerState", "ModelState", "Routing"]
