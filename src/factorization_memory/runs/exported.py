"""Reads a folder in Hugging Face's layout as the run that it was exported from: model, tokenizer, training configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from factorization_memory._files import JSONError, read_json
from factorization_memory.config import ConfigError, RunConfig, from_dict
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.models import LanguageModel
from factorization_memory.models.pretrained import load_pretrained
from factorization_memory.models.pretrained.export import TRAINING_NAME, digest
from factorization_memory.models.pretrained.format import CONFIG_NAME, TOKENIZER_NAME, read_config, read_weights
from factorization_memory.runs.checkpoint_folder import CheckpointError, wrong_state_field

FORMAT_VERSION = 1
"""Format version of training.json."""


def read_exported(folder: Path) -> tuple[LanguageModel, Tokenizer, RunConfig]:
    """The model of an export, in evaluation mode, its tokenizer, and the configuration of its run as far as known."""
    model = load_pretrained(folder)
    file = folder / TOKENIZER_NAME
    if not file.exists():
        raise CheckpointError(f"{file}: missing; copy the model's tokenizer there")
    tokenizer = Tokenizer.load(file)
    record = _training(folder)
    config = exported_config(folder)
    fields = read_config(folder)
    ends = {"eos_token_id": tokenizer.document_end, "pad_token_id": tokenizer.padding}
    wrong = [name for name, own in ends.items() if fields.get(name) not in (None, own, [own])]
    other = record.get("tokenizer_fingerprint") not in (None, tokenizer.fingerprint)
    if tokenizer.vocab_size > model.config.vocab_size or wrong or other:
        raise CheckpointError(
            f"{file}: not this model's tokenizer: its {CONFIG_NAME} has vocab_size={model.config.vocab_size} and "
            f"eos_token_id={fields.get('eos_token_id')}; put the model's own there"
        )
    return model, tokenizer, dataclasses.replace(config, model=model.config)


def exported_config(folder: Path) -> RunConfig:
    """The training configuration in training.json; its `model` may differ from the model in the folder."""
    try:
        return from_dict(RunConfig, _training(folder).get("config", {"name": "imported"}))
    except ConfigError as error:
        raise _unreadable(folder / TRAINING_NAME, str(error)) from None


def _training(folder: Path) -> dict[str, Any]:
    """The contents of training.json; {} if it is missing."""
    path = folder / TRAINING_NAME
    record = read_object(path)
    if record and (not isinstance(record.get("format_version"), int) or record["format_version"] > FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: format version {record.get('format_version')!r} is not one that this package reads "
            f"({FORMAT_VERSION}); upgrade factorization-memory, or remove the file (it only records how the model was trained)"
        )
    return record


def known_training(folder: Path) -> dict[str, Any]:
    """The contents of training.json if they describe these weights; {} if the weights were trained further since."""
    record = _training(folder)
    if not record or record.get("weights") != digest(read_weights(folder)):
        return {}
    for name, kind in (("state", dict), ("corpus_fingerprint", str), ("environment", dict), ("sources", dict)):
        if not isinstance(record.get(name), kind):
            raise _unreadable(folder / TRAINING_NAME, f"the field {name!r} cannot be {record.get(name)!r}")
    wrong = wrong_state_field(record["state"])
    if wrong is not None:
        raise _unreadable(folder / TRAINING_NAME, wrong)
    return record


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: {reason}; restore it, or remove it (it only records how the model was trained)")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if it is missing."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        return {}
    except JSONError as error:
        raise CheckpointError(f"{path}: not JSON, damaged or cut short ({error.reason}); restore it, or remove it") from None
    return values if isinstance(values, dict) else {}
