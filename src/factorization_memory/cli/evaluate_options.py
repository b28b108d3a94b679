"""The options of `fmem evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a trained model: loss, perplexity, bits per byte, recall from the context, loss by position with carried memory,
    routing health, with --recall also tasks of recall; or, with --harness, tasks of lm-evaluation-harness."""

    run: tyro.conf.Positional[Path | None] = None
    """Run folder, the folder of one of its checkpoints, or one in Hugging Face's layout; by default the model that comes
    with the package."""
    corpus: Path | None = None
    """Packed corpus; by default the one that the run was trained on. For the model that comes with the package: the two books
    that come with it, which it was not trained on."""
    max_position: int | None = None
    """Measure loss by position up to this one; by default 16 training contexts, 0 skips it."""
    max_tokens: int | None = None
    """Held-out tokens of each source to measure the loss on; by default all."""
    stretches: int = 8
    """Stretches of text of each source to read for the loss by position."""
    recall: bool = False
    """Also test recall from the context: the value behind a key, a number hidden in a book, a repeated stretch of text."""
    recall_items: int = 4
    """Texts for each length and number of hidden sentences; standard errors shrink with its square root."""
    recall_lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Lengths of these texts, in tokens."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda or cuda:N."""
    harness: tuple[str, ...] | None = None
    """Run these tasks or groups of lm-evaluation-harness, or our groups `english` or `japanese`, instead of reading held-out
    text."""
    harness_data: Path | None = None
    """Folder with task data, TASK/SPLIT.jsonl (or .json, .parquet); anything missing there comes from the hub."""
    harness_tasks: Path | None = None
    """Folder with YAML files of your own tasks."""
    harness_shots: int | None = None
    """Few-shot examples before each question; by default each task's own number."""
    harness_limit: int | None = None
    """Use only this many examples of each task, the first ones."""
    harness_batch_size: int = 64
    """Sequences per batch when running tasks."""
    json: bool = False
    """Write the result to stdout as JSON."""
