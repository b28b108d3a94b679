"""Text from a trained model: `generate` continues a prompt, `SamplingConfig` says how the next token is chosen."""

from factorization_memory.generation.decode import Generation, generate, prefill
from factorization_memory.generation.sampling import SamplingConfig, sample, sample_generators

__all__ = ["Generation", "SamplingConfig", "generate", "prefill", "sample", "sample_generators"]
