"""Reads models in Hugging Face's layout, without its libraries.

A folder has config.json (flat fields, below) and model.safetensors, or several such files and an index. Only safetensors is
read: other weight formats can contain code that runs on loading.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from factorization_memory._files import JSONError, UnreadableError, read_json, require_readable
from factorization_memory.config import RETIRED, ConfigError, ModelConfig, from_dict, to_dict
from factorization_memory.models.finite import not_finite
from factorization_memory.models.language_model import LanguageModel
from factorization_memory.models.pretrained.conversion import NATIVE, from_native, native_config

MODEL_TYPE = "factorization_memory"
CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_NAME = "tokenizer.json"
RENAMED = {"num_layers": "num_hidden_layers", "norm_eps": "rms_norm_eps", "temperature": "affinity_temperature"}
"""Our field names and the exported ones, if different: as in other models, or to avoid a clash with the sampling
temperature."""
_OURS = {theirs: ours for ours, theirs in RENAMED.items()}


class FormatError(ValueError):
    """A folder without a readable model: the message names the file, the fault and the remedy."""


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that describe a model, with the automatic `intermediate_size` resolved."""
    fields = {RENAMED.get(name, name): value for name, value in to_dict(config).items()}
    return json.loads(json.dumps(fields | {"intermediate_size": config.feed_forward_size}))


def config_from_fields(fields: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a model from such fields; any may be missing.

    Raises:
        ConfigError: a field is unknown, has the wrong type or conflicts with another; the message uses its exported name.
    """
    for ours, theirs in RENAMED.items():
        if ours in fields:
            raise ConfigError(f"{ours}: no such field; did you mean {theirs!r}?")
    try:
        return from_dict(ModelConfig, {_OURS.get(name, name): value for name, value in fields.items()}, "model.")
    except ConfigError as error:
        message = re.sub(r"\bmodel\.(\w+)", lambda match: RENAMED.get(match[1], match[1]), str(error))
        raise ConfigError(message) from None


def field_names() -> list[str]:
    """The names of all such fields."""
    return list(config_fields(ModelConfig()))


def exported_name(name: str) -> str:
    """The exported name of a weight of `LanguageModel`."""
    return name.replace("head.", "lm_head.", 1) if name.startswith("head.") else f"model.{name}"


def own_name(name: str) -> str:
    """The inverse of `exported_name`."""
    return name.removeprefix("lm_").removeprefix("model.")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of such a folder, by their exported names.

    Raises:
        FormatError: the weights are missing, in another format, or damaged.
    """
    folder = Path(folder)
    names = [WEIGHTS_NAME]
    if not (folder / WEIGHTS_NAME).exists():
        if not (folder / INDEX_NAME).exists():
            others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            found = f"{', '.join(others)} can run code when loaded and is not read; " if others else ""
            raise FormatError(f"{folder}: no {WEIGHTS_NAME} here; {found}save the model with safetensors")
        names = indexed_files(folder)
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            require_readable(folder / name)
            tensors |= load_file(folder / name)
        except FileNotFoundError:
            raise FormatError(f"{folder / name}: missing, but listed in {INDEX_NAME}; copy the whole model") from None
        except UnreadableError:
            raise
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{folder / name}: damaged or cut short ({error}); copy or download it again") from None
    return tensors


def indexed_files(folder: Path) -> list[str]:
    """The files named by an index. Raises `FormatError` unless all are safetensors files inside the folder."""
    path = Path(folder) / INDEX_NAME
    files = _read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise FormatError(f"{path}: its weight_map does not map every weight to a file; copy or download it again")
    for name in files.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FormatError(f"{path}: lists {name!r}, which is not a safetensors file of this folder; do not use this model")
    return sorted(set(files.values()))


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json. Raises `FormatError` if it is missing or not a configuration."""
    path = Path(folder) / CONFIG_NAME
    fields = _read_json(path)
    if not isinstance(fields.get("model_type"), str):
        raise FormatError(f"{path}: no field 'model_type'; this is not a model in Hugging Face's layout")
    return fields


def read_model_config(folder: Path | str) -> ModelConfig:
    """The configuration of the model in such a folder, ours or one of `NATIVE`.

    Raises:
        FormatError: it is missing, of another kind, or invalid; the message names the file.
    """
    path = Path(folder) / CONFIG_NAME
    fields = read_config(Path(folder))
    kind = fields["model_type"]
    if kind not in (MODEL_TYPE, *NATIVE):
        takes = ", ".join(map(repr, (MODEL_TYPE, *NATIVE)))
        raise FormatError(f"{path}: model_type={kind!r} is not supported; use a model of type {takes}")
    try:
        if kind in NATIVE:
            config = native_config(fields)
        else:
            known = {*field_names(), *RETIRED[ModelConfig.__name__]}
            config = config_from_fields({name: value for name, value in fields.items() if name in known})
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from None
    if config.vocab_size < 1:
        raise FormatError(f"{path}: vocab_size={config.vocab_size}: use the number of ids of its tokenizer")
    return config


def is_pretrained(folder: Path | str) -> bool:
    """Whether a folder has this layout, even if damaged: its config.json names a model type or is unreadable, or it has
    weights and no config.json."""
    folder = Path(folder)
    if not (folder / CONFIG_NAME).exists():
        return any((folder / name).exists() for name in (WEIGHTS_NAME, INDEX_NAME))
    try:
        return "model_type" in _read_json(folder / CONFIG_NAME)
    except FormatError:
        return True


def load_pretrained(folder: Path | str, device: torch.device | str = "cpu") -> LanguageModel:
    """Loads the model of a folder, ours or one of `NATIVE`, in evaluation mode and float32.

    Raises:
        FormatError: there is no such model, it is damaged, or its weights do not match its configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder; give one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    config = read_model_config(folder)
    kind = read_config(folder)["model_type"]
    weights = read_weights(folder)
    if kind in NATIVE:
        try:
            weights = from_native(kind, weights)
        except (ValueError, RuntimeError, IndexError) as error:  # a missing weight, or incompatible shapes
            raise FormatError(f"{folder}: {error}") from None
    else:
        weights = {own_name(name): tensor for name, tensor in weights.items()}
    if config.tie_word_embeddings and "embedding.weight" in weights:
        table = weights["embedding.weight"]
        if not torch.equal(weights.setdefault("head.weight", table), table):
            raise FormatError(
                f"{folder}: the head's weight differs from the embedding's, though {CONFIG_NAME} says they are tied; "
                "set tie_word_embeddings to false"
            )
    # Before allocating anything of that size.
    if config.num_layers > len(weights):
        raise FormatError(f"{folder / CONFIG_NAME}: {config.num_layers:,} layers, but {len(weights):,} weights; use its own")
    with torch.device("meta"):
        check_weights(LanguageModel(config), weights, folder, str if kind in NATIVE else exported_name)
    model = LanguageModel(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[name])
    return model.to(device).eval()


def builtin_model() -> Path:
    """Folder of the small model of English and Japanese books that comes with the package; its README.md is its card."""
    return Path(str(importlib.resources.files(__package__) / "builtin"))


def check_weights(model: LanguageModel, weights: Mapping[str, Tensor], folder: Path, named: Callable[[str], str]) -> None:
    """Raises `FormatError` for the first weight, by our names, that is missing, unexpected, of another shape, of integers, NaN
    or infinite; the message calls it `named(name)`."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights or name not in own:
            problem = "is missing" if name not in weights else "is unexpected"
            raise FormatError(f"{folder}: weight {named(name)!r} {problem} by {CONFIG_NAME}; use the one saved with it")
        if weights[name].shape != own[name].shape:
            raise FormatError(
                f"{folder}: weight {named(name)!r} has shape {tuple(weights[name].shape)}, but according to "
                f"{CONFIG_NAME} {tuple(own[name].shape)}; use the one saved with it"
            )
        if not weights[name].is_floating_point():
            raise FormatError(f"{folder}: weight {named(name)!r} is {weights[name].dtype}; save it in float32 or bfloat16")
    wrong = not_finite({named(name): tensor for name, tensor in weights.items()})
    if wrong is not None:
        raise FormatError(f"{folder}: weight {wrong!r} is NaN or infinite; use an earlier checkpoint, or download it again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = read_json(path)
    except FileNotFoundError:
        raise FormatError(f"{path}: missing; give a folder in Hugging Face's layout") from None
    except JSONError as error:
        raise FormatError(f"{path}: not JSON, damaged or cut short ({error.reason}); copy or download it again") from None
    if not isinstance(fields, dict):
        raise FormatError(f"{path}: not a JSON object; copy or download it again")
    return fields
