"""`fmem inspect [RUN]`: which memory states a text's tokens update and read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from factorization_memory._files import write_atomic
from factorization_memory.cli.common import emit, load, parse, read_text, say
from factorization_memory.config import ConfigError


@dataclass(frozen=True)
class InspectOptions:
    """Show the memory at work on a text: an HTML page with the text coloured by its strongest state, layer by layer."""

    run: tyro.conf.Positional[Path | None] = None
    """Run folder, the folder of one of its checkpoints, or one in Hugging Face's layout; by default the model that comes
    with the package."""
    text: str | None = None
    """Text to read."""
    file: str | None = None
    """File with the text; - reads stdin."""
    output: Path = Path("inspection.html")
    """HTML page to write."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Write the record to stdout as JSON."""


def run(arguments: list[str]) -> int:
    """`fmem inspect`."""
    options = parse(InspectOptions, arguments, "inspect")
    if (options.text is None) == (options.file is None):
        raise ConfigError("text: give exactly one of --text TEXT and --file FILE (- for stdin)")
    text = options.text if options.text is not None else read_text(options.file or "")
    if not text:
        raise ConfigError("text: empty; give at least one character to read")
    from factorization_memory.evaluation import inspect_text
    from factorization_memory.reports import inspection_html

    model, tokenizer, _ = load(options.run, options.device)
    record = inspect_text(model, tokenizer, text)
    write_atomic(options.output, inspection_html(record))
    say(f"{len(record['tokens']):,} tokens, {len(record['layers'])} layers: {options.output}")
    emit(record, options.json)
    return 0
