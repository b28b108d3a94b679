"""The layers that models are built from."""

from factorization_memory.layers.attention import Attention
from factorization_memory.layers.attention_state import AttentionState
from factorization_memory.layers.factorization_memory import FactorizationMemory
from factorization_memory.layers.feed_forward import FeedForward
from factorization_memory.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetState
from factorization_memory.layers.mamba2 import Mamba2, Mamba2State
from factorization_memory.layers.mixer import MIXERS, MixerKind, MixerWidth, SequenceMixer, UndoableMixer, register_mixer
from factorization_memory.layers.model_state import ModelState
from factorization_memory.layers.routing import Routing
from factorization_memory.layers.state import GrowingState, LayerState, LayerStateBase, MixerState

__all__ = [
    "MIXERS",
    "Attention",
    "AttentionState",
    "FactorizationMemory",
    "FeedForward",
    "GatedDeltaNet",
    "GatedDeltaNetState",
    "GrowingState",
    "LayerState",
    "LayerStateBase",
    "Mamba2",
    "Mamba2State",
    "MixerKind",
    "MixerState",
    "MixerWidth",
    "ModelState",
    "Routing",
    "SequenceMixer",
    "UndoableMixer",
    "register_mixer",
]
