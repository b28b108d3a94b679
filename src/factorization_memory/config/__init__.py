"""All options of a run as frozen, typed dataclasses. Standard library only, so that importing configurations is cheap.

A run is one `RunConfig`: the model, the data, the optimizer, the training loop. `presets.py` has named ones; the command line
overrides any field by its flag (`--model.top-k 8`). Each class validates itself on construction and raises `ConfigError`
naming the field, its value and the remedy.
"""

from factorization_memory.config.checks import ConfigError
from factorization_memory.config.memory import Backend, MemoryConfig
from factorization_memory.config.model import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from factorization_memory.config.plain import from_dict, suggestion, to_dict
from factorization_memory.config.retired import RETIRED, is_neutral, without_retired
from factorization_memory.config.run import DataConfig, OptimizerConfig, RunConfig, TrainingConfig

__all__ = [
    "RETIRED",
    "AttentionConfig",
    "Backend",
    "ConfigError",
    "DataConfig",
    "GatedDeltaNetConfig",
    "Mamba2Config",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainingConfig",
    "from_dict",
    "is_neutral",
    "suggestion",
    "to_dict",
    "without_retired",
]
