"""Size and cost of a run, computed without weights, a GPU or, if none is named, a corpus."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from factorization_memory.benchmarks.notes import training_rate
from factorization_memory.benchmarks.timing import machine
from factorization_memory.config import ConfigError, RunConfig
from factorization_memory.data.shards import PackedCorpus
from factorization_memory.experiments.demo import VOCABULARY
from factorization_memory.models.counting import count, training_memory
from factorization_memory.models.device import resolve_device
from factorization_memory.training.preparation import complete_config
from factorization_memory.training.schedule import learning_rate

ASSUMED_VOCABULARY = 16384
"""Vocabulary size of a run whose corpus is not named yet; the preset `demo` uses that of `fmem demo`."""


def run_cost(config: RunConfig) -> dict[str, Any]:
    """Parameter counts, memory and schedule of a run."""
    model, corpus = config.model, None
    if config.data.corpus:
        corpus = PackedCorpus.open(Path(config.data.corpus))
        model = complete_config(config, corpus.tokenizer.vocab_size).model
    elif not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=VOCABULARY if config.name == "demo" else ASSUMED_VOCABULARY)
    counts = count(model, config.data.context_length)
    steps, tokens = config.training.steps, config.training.tokens_per_step
    bfloat16 = config.training.precision == "bfloat16"
    marks = sorted({1, config.optimizer.warmup_steps or 1, *(max(1, steps * i // 8) for i in range(1, 9))})
    return {
        "preset": config.name,
        "vocab_size": model.vocab_size,
        "vocabulary_assumed": corpus is None and not config.model.vocab_size,
        "parameters": {"total": counts.parameters, "embedding": counts.embedding_parameters},
        "flops_per_token": {
            "train": counts.train_flops,
            "prefill": counts.prefill_flops,
            "decode": counts.decode_flops,
            "of_which_recurrence": counts.recurrence_flops,
            "of_which_attention": counts.attention_flops,
        },
        "state_bytes": counts.state_bytes,
        "state_bytes_per_token": counts.state_bytes_per_token,
        "training_memory_bytes": training_memory(model, config.micro_batch_size, config.data.context_length, bfloat16),
        "precision": "bfloat16" if bfloat16 else "float32",
        "precision_assumed": config.training.precision == "auto",
        "steps": steps,
        "tokens": steps * tokens,
        "tokens_per_step": tokens,
        "micro_batches": config.sequences_per_step // config.micro_batch_size,
        "epochs": None if corpus is None else _epochs(config, corpus),
        "train_flops": counts.train_flops * steps * tokens,
        "time": _time(config, counts.train_flops * steps * tokens),
        "learning_rate": {str(step): learning_rate(config.optimizer, step, steps) for step in marks if step <= steps},
    }


def _epochs(config: RunConfig, corpus: PackedCorpus) -> dict[str, Any]:
    """Epochs of the corpus's training text: `total`, and per source if `data.weights` sets shares."""
    read = config.training.steps * config.training.tokens_per_step
    sizes = {name: len(source.splits["train"].tokens) for name, source in corpus.sources.items()}
    weights = {name: config.data.weights.get(name, 0.0) for name in sizes} if config.data.weights else {}
    every = sum(weights.values())
    by_source = {name: read * weight / every / sizes[name] for name, weight in weights.items() if every and sizes[name]}
    return {"total": read / max(1, sum(sizes.values())), "training_tokens": sum(sizes.values()), "sources": by_source}


def _time(config: RunConfig, flops: int) -> dict[str, Any] | None:
    """`seconds` of all steps by the last `fmem bench training` on this machine, and its `date`; None if there is none."""
    try:
        device = resolve_device(config.training.device)
    except ConfigError:
        return None  # planned for another machine
    precision = config.training.precision
    bfloat16 = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    dtype = "bfloat16" if bfloat16 else "float32"
    found = training_rate(device.type, machine(device)["name"], dtype, config.data.context_length)
    return None if found is None else {"seconds": flops / found[0], "flops_per_second": found[0], "date": found[1]}
