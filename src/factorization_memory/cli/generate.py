"""`fmem generate [RUN]`: continue prompts with a trained model."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from factorization_memory._streams import best_effort, lacks
from factorization_memory.cli.common import at_least, console, emit, load, parse, read_text, say, write_out
from factorization_memory.config import ConfigError
from factorization_memory.generation.sampling import SamplingConfig

if TYPE_CHECKING:
    from factorization_memory.runs.training_record import SampleRecord


@dataclass(frozen=True)
class GenerateOptions:
    """Continue one prompt or several, all at once. The text streams to stdout (to stderr with --json)."""

    run: tyro.conf.Positional[Path | None] = None
    """Run folder, the folder of one of its checkpoints, or one in Hugging Face's layout; by default the model that comes
    with the package."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be repeated."""
    prompt_file: str | None = None
    """File with the text to continue; - reads stdin."""
    max_tokens: int = 256
    """Maximum number of tokens to generate."""
    num_samples: int = 1
    """Number of continuations of each prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end a continuation; they are not printed."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    prefill_chunk: int = 0
    """Prompt tokens read at a time; 0 means 16384 on a GPU, 1024 on a CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights and arithmetic: auto means bfloat16 on a GPU, float32 on a CPU. Memories are always float32."""
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
    at_least(options, max_tokens=1, num_samples=1)
    if options.prefill_chunk < 0:
        raise ConfigError(f"--prefill-chunk={options.prefill_chunk}: use 1 or more tokens, or 0 (automatic)")
    if bool(options.prompt) == (options.prompt_file is not None):
        raise ConfigError(
            "prompt: give exactly one of --prompt TEXT (once or several times) and --prompt-file FILE (- for stdin)"
        )
    prompts = options.prompt or (read_text(options.prompt_file or ""),)
    if not all(prompts):
        raise ConfigError("prompt: empty; give at least one character to start from")
    from factorization_memory.generation import weights_dtype, with_dtype

    model, tokenizer, _ = load(options.run, options.device)
    note_on_prompts(tokenizer, prompts)
    model = with_dtype(model, weights_dtype(options.precision, next(model.parameters()).device))
    results = stream(
        model,
        tokenizer,
        *prompts,
        to=best_effort(sys.stderr) if options.json else sys.stdout,
        max_tokens=options.max_tokens,
        sampling=options.sampling,
        num_samples=options.num_samples,
        stop=options.stop,
        prefill_chunk=options.prefill_chunk or None,
    )
    if not options.json and any(lacks(sys.stdout, result["text"]) for result in results):
        say(f"stdout is in {sys.stdout.encoding}, which lacks some characters (written as \\u...); set PYTHONIOENCODING=utf-8")
    emit(results, options.json)
    return 0


def note_on_prompts(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Prints a note for each prompt that ends in a space the tokenizer would have in the next word."""
    from factorization_memory.generation import note_on_prompt

    for prompt in prompts:
        if (note := note_on_prompt(tokenizer, prompt)) is not None:
            console().print(f"note: {note}", style="dim", markup=False, soft_wrap=True)


def stream(model: Any, tokenizer: Any, *prompts: str, to: Any, **options: Any) -> list[SampleRecord]:
    """Streams continuations, the first live, the others after it; returns their records."""
    from factorization_memory.experiments.samples import continue_prompts

    def write(text: str) -> None:
        if to is sys.stdout:
            return write_out(text)
        to.write(text)
        return to.flush()

    write(prompts[0])
    results = continue_prompts(
        model, tokenizer, prompts, on_text=lambda number, piece: write(piece) if number == 0 else None, **options
    )
    write("\n")
    for number, result in enumerate(results[1:], start=2):
        write(f"\n--- {number} ---\n{result['prompt']}{result['text']}\n")
    show_speeds(results, len(results) // len(prompts))
    return results


def show_speeds(results: list[SampleRecord], samples: int) -> None:
    """Prints on stderr how fast prompts were read and `samples` continuations of each were generated."""
    first = results[0]
    read, written = sum(each["prompt_tokens"] for each in results[::samples]), sum(each["tokens"] for each in results)
    seconds, captured = max(each["seconds"] for each in results), max(each["capture_seconds"] for each in results)
    of_first = f" ({first['tokens_per_second']:,.0f} of the first)" if len(results) > 1 else ""
    reading = f"{first['prefill_tokens_per_second']:,.0f} tokens/s"
    graph = f"the step captured as a CUDA graph in {captured:.2f} s; " if captured else ""
    console().print(
        f"[dim]{read:,} prompt tokens in {first['prefill_seconds']:.2f} s ({reading}); "
        f"{graph}{written:,} tokens in {seconds:.2f} s, {first['total_tokens_per_second']:,.0f} tokens/s{of_first}; "
        f"stopped by {first['stop_reason']}[/dim]",
        soft_wrap=True,
    )
