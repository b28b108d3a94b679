"""`fmem generate RUN`: continue a prompt with a trained model."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from factorization_memory.cli.common import console, emit, parse, read_text
from factorization_memory.config import ConfigError
from factorization_memory.generation.sampling import SamplingConfig


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt. The text streams to stdout (to stderr with --json)."""

    run: tyro.conf.Positional[Path]
    """Run folder, or the folder of one of its checkpoints."""
    prompt: str | None = None
    """Text to continue."""
    prompt_file: str | None = None
    """File that holds the text to continue; - reads stdin."""
    max_tokens: int = 256
    """Tokens to generate at most."""
    num_samples: int = 1
    """Continuations of the prompt; several are printed one after the other."""
    stop: tuple[str, ...] = ()
    """Strings that end a continuation, and are not part of it."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    prefill_chunk: int = 1024
    """Prompt tokens read at a time."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Write the results to stdout as JSON."""


def run(arguments: list[str]) -> int:
    """`fmem generate`."""
    try:
        options = parse(GenerateOptions, arguments, "generate")
    except ConfigError as error:
        # The library names its field; here it is a flag.
        raise ConfigError(re.sub(r"^sampling\.(\w+)", lambda field: "--" + field[1].replace("_", "-"), str(error))) from None
    for name in ("max_tokens", "num_samples", "prefill_chunk"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)}: use 1 or more")
    if (options.prompt is None) == (options.prompt_file is None):
        raise ConfigError("prompt: give exactly one of --prompt TEXT and --prompt-file FILE (- for stdin)")
    prompt = options.prompt if options.prompt is not None else read_text(options.prompt_file or "")
    if not prompt:
        raise ConfigError("prompt: it is empty; give at least one character to start from")
    from factorization_memory.training import load_model, resolve_device

    model, tokenizer, _ = load_model(options.run, resolve_device(options.device, "--device"))
    results = stream(
        model, tokenizer, prompt, to=sys.stderr if options.json else sys.stdout, max_tokens=options.max_tokens,
        sampling=options.sampling, num_samples=options.num_samples, stop=options.stop, prefill_chunk=options.prefill_chunk,
    )  # fmt: skip
    emit(results, options.json)
    return 0


def stream(model: Any, tokenizer: Any, prompt: str, *, to: Any, **options: Any) -> list[dict[str, Any]]:
    """Generate and write as it comes: the first continuation live, others after it; returns JSON-ready results."""
    from factorization_memory.generation import generate

    def write(text: str) -> None:
        to.write(text)
        to.flush()

    write(prompt)
    results = generate(model, tokenizer, prompt, on_text=lambda number, piece: write(piece) if number == 0 else None, **options)
    write("\n")
    for number, result in enumerate(results[1:], start=2):
        write(f"\n--- {number} ---\n{prompt}{result.text}\n")
    first = results[0]
    console().print(
        f"[dim]{first.prompt_tokens:,} prompt tokens in {first.prefill_seconds:.2f} s; {sum(len(r.tokens) for r in results):,} "
        f"tokens at {first.tokens_per_second:,.0f} tokens/s per sample; stopped by {first.stop_reason}[/dim]"
    )
    return [
        {
            "prompt": prompt, "text": r.text, "tokens": len(r.tokens), "stop_reason": r.stop_reason,
            "prefill_seconds": r.prefill_seconds, "seconds": r.seconds, "tokens_per_second": r.tokens_per_second,
        }
        for r in results
    ]  # fmt: skip
