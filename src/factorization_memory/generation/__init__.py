"""Text generation: `generate` continues one prompt, `generate_batch` many; `SamplingConfig` sets how the next token is chosen.
Underneath, `Engine` continues token ids of requests that may come and go, and `steps_for` runs decoding steps of a batch (as a
CUDA graph on a GPU, in compiled loops on a CPU)."""

from factorization_memory.generation.decode import Generation, generate, generate_batch
from factorization_memory.generation.engine import Engine, LogitsError
from factorization_memory.generation.graph import LoopSteps, StepGraph, Steps, steps_for, weights_dtype, with_dtype
from factorization_memory.generation.prefill import default_chunk, prefill, prefill_batch
from factorization_memory.generation.requests import Prefilled, Request
from factorization_memory.generation.sampling import SamplingConfig, sample, sample_generators
from factorization_memory.generation.text import TextStream, barred_tokens, note_on_prompt

__all__ = [
    "Engine",
    "Generation",
    "LogitsError",
    "LoopSteps",
    "Prefilled",
    "Request",
    "SamplingConfig",
    "StepGraph",
    "Steps",
    "TextStream",
    "barred_tokens",
    "default_chunk",
    "generate",
    "generate_batch",
    "note_on_prompt",
    "prefill",
    "prefill_batch",
    "sample",
    "sample_generators",
    "steps_for",
    "weights_dtype",
    "with_dtype",
]
