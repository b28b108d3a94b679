"""Loads a trained model from a run folder, one of its checkpoints, or a folder in Hugging Face's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from factorization_memory.config import RunConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.models import LanguageModel
from factorization_memory.models.device import resolve_device
from factorization_memory.models.pretrained import is_pretrained
from factorization_memory.runs.checkpoint import load_tensors
from factorization_memory.runs.checkpoint_folder import (
    FOLDER_NAME,
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    read_run_config,
    read_state,
)
from factorization_memory.runs.exported import read_exported
from factorization_memory.runs.names import STATE_NAME, TOKENIZER_NAME


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[LanguageModel, Tokenizer, RunConfig]:
    """Loads a trained model in evaluation mode and float32 on `device`, with its tokenizer and the configuration of its run.

    `path` is a run folder (its best checkpoint, else its last), one checkpoint's folder inside it, or a folder in Hugging
    Face's layout, as written by `export_run`; unknown fields of its training configuration have their defaults.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        FormatError: the same, for Hugging Face's layout.
    """
    path = Path(path)
    device = resolve_device(device, "device") if isinstance(device, str) else device
    if not is_own(path) and is_pretrained(path):
        model, tokenizer, config = read_exported(path)
        return model.to(device), tokenizer, config
    path = checkpoint_of(path)
    record = read_state(path)
    config = read_run_config(record, path)
    tokenizer = tokenizer_of(path, record)
    return model_of(path, config).to(device), tokenizer, config


def is_own(path: Path) -> bool:
    """Whether a folder is a run's or a checkpoint's."""
    return (path / STATE_NAME).exists() or bool(FOLDER_NAME.fullmatch(path.name)) or bool(list_checkpoints(path))


def checkpoint_of(path: Path) -> Path:
    """The checkpoint's folder for `path`, which may be a run folder."""
    if (path / STATE_NAME).exists() or FOLDER_NAME.fullmatch(path.name):
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run folder or a checkpoint's folder")
    return find_checkpoint(path, "best")


def model_of(path: Path, config: RunConfig) -> LanguageModel:
    """The model in the checkpoint at `path`, in evaluation mode."""
    model = LanguageModel(config.model)
    load_tensors(model, path)
    return model.eval()


def tokenizer_file(path: Path) -> Path:
    """The tokenizer file of the checkpoint at `path`: its own, or its run's."""
    places = (path / TOKENIZER_NAME, path.resolve().parent.parent / TOKENIZER_NAME)
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise CheckpointError(f"{path}: no {TOKENIZER_NAME} beside it or in its run folder; copy the run's to either")
    return found


def tokenizer_of(path: Path, record: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of the checkpoint at `path` with state `record`. Raises CheckpointError if its fingerprint differs."""
    file = tokenizer_file(path)
    tokenizer = Tokenizer.load(file)
    if tokenizer.fingerprint != record["tokenizer_fingerprint"]:
        raise CheckpointError(
            f"{file}: not the tokenizer this model was trained with: its fingerprint is {tokenizer.fingerprint}, "
            f"the checkpoint's {record['tokenizer_fingerprint']}; put the run's own {TOKENIZER_NAME} there"
        )
    return tokenizer
