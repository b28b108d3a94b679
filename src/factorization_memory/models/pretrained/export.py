"""Writes a model, its tokenizer and its card in Hugging Face's layout.

| file | what |
| --- | --- |
| config.json, generation_config.json | the model's configuration; end and padding ids for `generate()` |
| model.safetensors | weights; several files and an index if large |
| tokenizer.json, tokenizer_config.json | the tokenizer, as `PreTrainedTokenizerFast` |
| README.md | the model card |
| modeling_factorization_memory.py | for `trust_remote_code=True`, unless `transformers` knows the model |
| training.json | how it was trained, for `fmem import` |
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from factorization_memory._files import atomic_folder, parse_json
from factorization_memory.config import ModelConfig
from factorization_memory.models.finite import not_finite
from factorization_memory.models.language_model import LanguageModel
from factorization_memory.models.pretrained.conversion import NATIVE, native_fields, native_type, to_native
from factorization_memory.models.pretrained.format import (
    CONFIG_NAME,
    MODEL_TYPE,
    TOKENIZER_NAME,
    config_fields,
    exported_name,
    is_pretrained,
)
from factorization_memory.models.pretrained.shim import AUTO_MAP, CLASSES, save_shim

CARD_NAME, TRAINING_NAME = "README.md", "training.json"
DOCUMENT_END, PADDING = "</s>", "<pad>"
"""Special tokens of our tokenizers; the first also precedes a document."""
TOKENIZER_FIELDS: dict[str, Any] = {
    "bos_token": DOCUMENT_END,
    "eos_token": DOCUMENT_END,
    "pad_token": PADDING,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": True,
    "model_input_names": ["input_ids", "attention_mask"],
}
"""Settings of `PreTrainedTokenizerFast` that tokenizer.json lacks."""
_WRITTEN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|training|model\.safetensors\.index)\.json|README\.md"
    r"|model(-\d+-of-\d+)?\.safetensors|modeling_factorization_memory\.py"
)
"""Files that may be replaced in an existing folder."""


def save_pretrained(
    model: LanguageModel,
    folder: Path | str,
    tokenizer_file: Path | str,
    *,
    card: str,
    dtype: torch.dtype = torch.float32,
    context_length: int = 1024,
    training: Mapping[str, Any] | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> str:
    """Writes a model to a folder, atomically.

    Our Transformers and Mamba-2 models are written as the equivalent `LlamaForCausalLM`, `MistralForCausalLM` or
    `Mamba2ForCausalLM`, all others as `FactorizationMemoryForCausalLM`.

    Args:
        tokenizer_file: its tokenizer.json.
        card: text of README.md.
        dtype: dtype of the weights: float32, bfloat16 or float16.
        context_length: tokens of a training sequence.
        training: contents of training.json; None writes no such file.
        max_shard_size: maximum size of one file of weights, in bytes or as "5GB".
        overwrite: replace an existing folder.

    Returns:
        The name of the class.

    Raises:
        FileExistsError: the folder exists; with `overwrite`, it contains something other than an exported model.
        OSError: it cannot be written, or another export to it finished first.
        ValueError: the tokenizer is not one of ours; a weight is not finite in `dtype`.
    """
    folder, tokenizer_file = Path(folder).absolute(), Path(tokenizer_file)
    require_free(folder, overwrite)
    definition = tokenizer_file.read_text(encoding="utf-8")
    ids = special_ids(definition, tokenizer_file)
    kind = native_type(model.config)
    name = CLASSES["AutoModelForCausalLM"] if kind is None else NATIVE[kind]
    fields: dict[str, Any] = {
        "architectures": [name],
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **(_own_fields(model.config) if kind is None else native_fields(model.config, context_length)),
        **ids,
    }
    # Copies: safetensors refuses tensors that share storage, as some do.
    weights = {
        key: value.to("cpu", dtype).clone(memory_format=torch.contiguous_format)
        for key, value in exported_weights(model).items()
    }
    wrong = not_finite(weights)
    if wrong is not None:
        raise ValueError(f"weight {wrong!r} is not finite in {fields['dtype']}; export in float32, or an earlier checkpoint")
    with atomic_folder(folder, overwrite=overwrite) as aside:
        try:
            save_torch_state_dict(weights, aside, max_shard_size=max_shard_size)
        except SafetensorError as error:
            # Not an OSError, but its message ends with the number of one: "... (os error 28)".
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, f"{folder}: {error}") from error
        _write_json(aside / CONFIG_NAME, fields)
        for path in aside.glob("*.safetensors"):
            path.chmod((aside / CONFIG_NAME).stat().st_mode)  # as written, only the owner can read them
        _write_json(aside / "generation_config.json", ids)
        (aside / TOKENIZER_NAME).write_text(definition, encoding="utf-8")
        _write_json(aside / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENIZER_FIELDS})
        (aside / CARD_NAME).write_text(card, encoding="utf-8")
        if training is not None:
            _write_json(aside / TRAINING_NAME, {**training, "weights": digest(weights)})
        if kind is None:
            save_shim(aside)
    return name


def require_free(folder: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless a folder can be written: it does not exist, or contains only an exported model."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(f"{folder}: already exists; choose another folder, or overwrite it")
    if folder.is_symlink() or not folder.is_dir() or not is_pretrained(folder):
        raise FileExistsError(f"{folder}: not an exported model, so left unchanged; choose another folder")
    others = sorted(path.name for path in folder.iterdir() if path.is_dir() or not _WRITTEN.fullmatch(path.name))
    if others:
        raise FileExistsError(f"{folder}: contains {others[0]!r}, which no export wrote; choose another folder")


def digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 of weights as in the files: names, types and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def exported_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The weights under their exported names, without a tied head."""
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["head.weight"]
    if native_type(model.config) is not None:
        return to_native(model.config, weights)
    return {exported_name(name): tensor for name, tensor in weights.items()}


def special_ids(definition: str, path: Path) -> dict[str, int]:
    """The fields with ids of special tokens, from the text of a tokenizer.json."""
    try:
        known = {token["content"]: token["id"] for token in parse_json(definition)["added_tokens"]}
        end, padding = known[DOCUMENT_END], known[PADDING]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not one of our tokenizers, with {DOCUMENT_END} and {PADDING} ({error})") from None
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": padding}


def _own_fields(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": MODEL_TYPE, "auto_map": AUTO_MAP, **config_fields(config)}


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")
