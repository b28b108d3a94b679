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
    """Run folder, the folder of one of its checkpoints, or one in Hugging Face's layout; without it, the model that comes with
    the package."""
    corpus: Path | None = None
    """Packed corpus; by default the one that the run was trained on. For the model that comes with the package: the two books
    that come with it too, which it has not read."""
    max_position: int | None = None
    """Read by position up to here; by default 16 training contexts, 0 leaves positions out."""
    max_tokens: int | None = None
    """Held-out tokens of each source that the loss is measured on; by default all."""
    stretches: int = 8
    """Stretches of text of each source that are read by position."""
    recall: bool = False
    """Also ask what the context held: the value behind a key, a number hidden in a book, a stretch of text once more."""
    recall_items: int = 4
    """Texts of each length and number of hidden sentences; errors shrink with its square root."""
    recall_lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Tokens of these texts."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda or cuda:N."""
    harness: tuple[str, ...] | None = None
    """Tasks or groups of lm-evaluation-harness, or `english` or `japanese` for several of them, instead of held-out text."""
    harness_data: Path | None = None
    """Folder with data of tasks, TASK/SPLIT.jsonl (or .json, .parquet); what is not there comes from the hub."""
    harness_tasks: Path | None = None
    """Folder with YAML files of tasks of your own."""
    harness_shots: int | None = None
    """Examples before each question; by default each task's own number."""
    harness_limit: int | None = None
    """Only the first so many examples of each task."""
    harness_batch_size: int = 64
    """Sequences that the tasks read or write at a time."""
    json: bool = False
    """Write the result to stdout as JSON."""
