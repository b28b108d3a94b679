"""The initial model of a training run with `training.init_from`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from factorization_memory.config import ConfigError, RunConfig, to_dict
from factorization_memory.models.pretrained import builtin_model, is_pretrained
from factorization_memory.models.pretrained.format import read_model_config
from factorization_memory.runs.checkpoint_folder import read_run_config, read_state
from factorization_memory.runs.exported import exported_config
from factorization_memory.runs.loading import checkpoint_of, is_own, load_model, tokenizer_file
from factorization_memory.runs.names import TOKENIZER_NAME

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel

BUILTIN = "builtin"
"""The name in `training.init_from` of the model that comes with the package."""


def initial_config(source: str) -> RunConfig:
    """The configuration of the model named by `training.init_from`, as returned by `load_model`, without reading its weights.

    Raises:
        CheckpointError, FormatError: there is no such model, or it is damaged.
    """
    path = initial_path(source)
    if not is_own(path) and is_pretrained(path):
        return dataclasses.replace(exported_config(path), model=read_model_config(path))
    path = checkpoint_of(path)
    return read_run_config(read_state(path), path)


def initial_path(source: str) -> Path:
    """The folder named by `training.init_from`."""
    return builtin_model() if source == BUILTIN else Path(source)


def load_initial(model: LanguageModel, tokenizer: Tokenizer, source: str) -> None:
    """Copies the weights of the model named by `training.init_from` into `model`, to be trained on text of `tokenizer`.

    Raises:
        CheckpointError, FormatError: there is no such model, or it is damaged.
        ConfigError: its sizes or options differ, or it uses another tokenizer.
    """
    weights, own, config = load_model(initial_path(source))
    if own.fingerprint != tokenizer.fingerprint:
        path = initial_path(source)
        file = path / TOKENIZER_NAME if is_pretrained(path) and not is_own(path) else tokenizer_file(checkpoint_of(path))
        raise ConfigError(
            f"training.init_from={source!r}: its tokenizer (fingerprint {own.fingerprint}) is not the corpus's "
            f"({tokenizer.fingerprint}); pack the texts with `fmem data pack ... --tokenizer {file}`"
        )
    ours, theirs = to_dict(model.config), to_dict(config.model)
    for name, value in theirs.items():
        if name != "backend" and ours[name] != value and not (name == "intermediate_size" and _same_width(model, config)):
            raise ConfigError(
                f"model.{name}={ours[name]!r}: the model of training.init_from={source!r} has {value!r}; drop this field, or "
                "train from random weights"
            )
    model.load_state_dict(weights.state_dict())


def _same_width(model: LanguageModel, config: RunConfig) -> bool:
    return model.config.feed_forward_size == config.model.feed_forward_size
