"""`fmem import DIR RUN`: turns a model in Hugging Face's format into a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from factorization_memory.cli.common import emit, parse, say
from factorization_memory.config import ConfigError


@dataclass(frozen=True)
class ImportOptions:
    """Make a run folder of a model in the layout of Hugging Face's libraries: one that `fmem export` wrote, also after others
    have trained it, or a Llama, Mistral or Mamba2 with a tokenizer of ours. Only safetensors is read."""

    model: tyro.conf.Positional[Path]
    """Folder with config.json, weights and tokenizer.json."""
    run: tyro.conf.Positional[Path]
    """Run folder to write."""
    json: bool = False
    """Write the result to stdout as JSON."""


def run(arguments: list[str]) -> int:
    """`fmem import`."""
    options = parse(ImportOptions, arguments, "import")
    from factorization_memory.runs import import_model

    try:
        checkpoint = import_model(options.model, options.run)
    except FileExistsError as error:
        raise ConfigError(str(error)) from None
    say(
        f"{checkpoint}: use it with fmem generate, evaluate or inspect, or train from it with --init-from; it cannot be resumed"
    )
    emit({"checkpoint": str(checkpoint)}, options.json)
    return 0
