"""The layers that models are built from."""

from factorization_memory.layers.attention import Attention, AttentionState
from factorization_memory.layers.factorization_memory import FactorizationMemory
from factorization_memory.layers.feed_forward import FeedForward
from factorization_memory.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetState
from factorization_memory.layers.mamba2 import Mamba2, Mamba2State
from factorization_memory.layers.mixer import SequenceMixer
from factorization_memory.layers.routing import Routing
from factorization_memory.layers.state import GrowingState, LayerState, MixerState, ModelState

__all__ = [
    "Attention",
    "AttentionState",
    "FactorizationMemory",
    "FeedForward",
    "GatedDeltaNet",
    "GatedDeltaNetState",
    "GrowingState",
    "LayerState",
    "Mamba2",
    "Mamba2State",
    "MixerState",
    "ModelState",
    "Routing",
    "SequenceMixer",
]
