"""Continuations of given prompts by a model, as records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from factorization_memory.generation import generate_batch

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel
    from factorization_memory.runs.training_record import SampleRecord


def continue_prompts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    on_text: Callable[[int, str], None] | None = None,
    **options: Any,
) -> list[SampleRecord]:
    """Continue each prompt; returns a JSON-ready record for each continuation, with the time it took.

    `options` are further arguments of `generate_batch`, which calls `on_text` with the number of a continuation and what has
    been added to it.
    """
    results = generate_batch(model, tokenizer, prompts, on_text=on_text, **options)
    samples = len(results) // len(prompts)
    read, written = sum(result.prompt_tokens for result in results[::samples]), sum(len(result.tokens) for result in results)
    prefill, seconds = results[0].prefill_seconds, max(result.seconds for result in results)
    return [
        {
            "prompt": prompts[number // samples],
            "text": result.text,
            "tokens": len(result.tokens),
            "stop_reason": result.stop_reason,
            "prompt_tokens": result.prompt_tokens,
            "prefill_seconds": result.prefill_seconds,
            "capture_seconds": result.capture_seconds,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
            "prefill_tokens_per_second": read / prefill if prefill > 0 else 0.0,
            "total_tokens_per_second": written / seconds if seconds > 0 else 0.0,
        }
        for number, result in enumerate(results)
    ]
