"""Checks before a run starts or resumes: its vocabulary, the machine's memory, and that it is the same run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from factorization_memory.config import ConfigError, RunConfig
from factorization_memory.models.capacity import require_room
from factorization_memory.models.language_model import parameter_count
from factorization_memory.runs.checkpoint import difference_from
from factorization_memory.runs.checkpoint_folder import find_checkpoint, list_checkpoints, read_state
from factorization_memory.runs.record import RunFolderError, RunRecord

if TYPE_CHECKING:
    from factorization_memory.data.shards import PackedCorpus


def complete_config(config: RunConfig, vocab_size: int) -> RunConfig:
    """`config` with the tokenizer's vocabulary size filled in. Raises ConfigError if it has a different one."""
    size = config.model.vocab_size
    if config.training.init_from and size > vocab_size:
        return config  # a model may have more ids than its tokenizer
    if size not in (0, vocab_size):
        raise ConfigError(
            f"model.vocab_size={size}: the corpus's tokenizer has {vocab_size} tokens; use 0 to take the tokenizer's"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def require_room_for_training(config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError for sizes that certainly exceed the machine's memory, by a lower bound of what a step needs."""
    parameters = parameter_count(config.model)
    require_room(
        f"model: {parameters:,} parameters with their gradients and AdamW moments",
        16 * parameters,
        "use fewer layers or a smaller width",
        device,
    )
    # Per token its id, and the first block's input in bfloat16.
    forward = config.micro_batch_size * config.data.context_length * (8 + 2 * config.model.hidden_size)
    require_room(
        f"training.micro_batch_size={config.training.micro_batch_size}: {config.micro_batch_size:,} sequences of "
        f"{config.data.context_length:,} tokens at once",
        forward,
        "use fewer",
        device,
    )
    batches = 1 + min(config.data.read_ahead, config.training.steps)
    require_room(
        f"training.tokens_per_step={config.training.tokens_per_step}: {batches:,} batches of ids and targets",
        batches * 16 * config.training.tokens_per_step,
        "use fewer tokens, or a smaller data.read_ahead",
    )


def check_same_run(record: RunRecord, config: RunConfig, corpus: PackedCorpus) -> None:
    """Raises RunFolderError if the run of `record` cannot resume with this configuration, tokenizer or corpus."""
    run_dir = record.run_dir
    difference = difference_from(record.read_config(), config)
    if difference is not None:
        name, old, new = difference
        same = "the same value or a larger one" if name == "training.steps" else "the same value"
        raise RunFolderError(
            f"{run_dir}: this run was started with {name}={old!r}, not {new!r}; resume with {same}, "
            "or start a new run in another folder"
        )
    if list_checkpoints(run_dir):
        saved = read_state(find_checkpoint(run_dir, "last"))
        for what, own in (("tokenizer", corpus.tokenizer.fingerprint), ("corpus", corpus.fingerprint)):
            if saved[f"{what}_fingerprint"] != own:
                raise RunFolderError(
                    f"data.corpus={config.data.corpus!r}: its {what} (fingerprint {own}) differs from the one that "
                    f"{run_dir} was trained on ({saved[f'{what}_fingerprint']}); use that corpus"
                )
