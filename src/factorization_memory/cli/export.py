"""`fmem export RUN --to huggingface DIR`: a run's model in the format of Hugging Face's libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from factorization_memory.cli.common import emit, parse, say
from factorization_memory.config import ConfigError


@dataclass(frozen=True)
class ExportOptions:
    """Write a run's model, tokenizer and model card to a folder that `transformers` loads and the hub takes.

    A Transformer or Mamba-2 becomes the Llama, Mistral or Mamba2 of `transformers` that it is."""

    run: tyro.conf.Positional[Path]
    """Run folder, or the folder of one of its checkpoints."""
    output: tyro.conf.Positional[Path]
    """Folder to write."""
    to: Literal["huggingface"] = "huggingface"
    """Layout."""
    name: str = ""
    """Model name on the card; by default the folder's name."""
    license: str = ""
    """Licence of the weights, as the hub's identifier, for example apache-2.0."""
    data: str = ""
    """A sentence on the training data, for the card."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the exported weights; float32, as they were trained, loses nothing."""
    max_shard_size: str = "5GB"
    """Maximum size of a weights file, in bytes or with a unit."""
    overwrite: bool = False
    """Replace an existing exported model."""
    json: bool = False
    """Write the result to stdout as JSON."""


def run(arguments: list[str]) -> int:
    """`fmem export`."""
    options = parse(ExportOptions, arguments, "export")
    from factorization_memory.runs import export_run

    writers = {"huggingface": export_run}
    try:
        name = writers[options.to](
            options.run,
            options.output,
            name=options.name,
            license=options.license,
            data=options.data,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
        )
    except FileExistsError as error:
        raise ConfigError(str(error).replace("or overwrite it", "or pass --overwrite")) from None
    size = sum(path.stat().st_size for path in options.output.iterdir())
    say(f"{options.output}: {size / 1e6:,.1f} MB, for AutoModelForCausalLM.from_pretrained, as {name}")
    said = {"--license": options.license, "--data": options.data}
    missing = [flag for flag, value in said.items() if not value]
    if missing:
        say(f"its model card, README.md, is incomplete; fill it in with {' and '.join(missing)}")
    emit({"output": str(options.output), "class": name, "bytes": size}, options.json)
    return 0
