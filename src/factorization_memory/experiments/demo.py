"""Contents of `fmem demo`: two books, prompts, a text to inspect, two models that learn to recall."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from factorization_memory._files import write_atomic
from factorization_memory.runs.names import RECALL_DEMO_NAME

if TYPE_CHECKING:
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.evaluation import RecallProgress
    from factorization_memory.runs.recall_record import RecallDemoRecord

PROMPTS = ("“My dear Watson,” said", "おれは")
VOCABULARY = 512
HELD_OUT = 0.1
RECALL_STEPS = 100
INSPECTED_CHARACTERS = {"en": 900, "ja": 450}


def pack_books(folder: Path) -> PackedCorpus:
    """The two books, packed with a tokenizer trained on the part that is not held out."""
    from factorization_memory.data.corpora import builtin_corpus, read_documents
    from factorization_memory.data.shards import pack
    from factorization_memory.data.tokenizer import Tokenizer

    books = list(read_documents(builtin_corpus()))
    # Slightly less than the training part: in these two books the held-out tail starts after it.
    texts = [book.text[: int(len(book.text) * (1 - 1.2 * HELD_OUT))] for book in books]
    tokenizer: Tokenizer = Tokenizer.train(texts, VOCABULARY)
    return pack([(None, builtin_corpus())], tokenizer, folder, holdout="tail", holdout_fraction=HELD_OUT)


def inspected_text(corpus: PackedCorpus) -> str:
    """The start of the held-out part of each book."""
    return "\n\n".join(_held_out_text(corpus, name)[:length] for name, length in INSPECTED_CHARACTERS.items())


def learn_recall(
    run_dir: Path, steps: int, progress: Callable[[dict[str, RecallProgress]], None] | None = None
) -> RecallDemoRecord:
    """Trains two small models on recall (see evaluation/recall_demo.py), recorded for the report of the run in `run_dir`."""
    from factorization_memory.evaluation import recall_demo

    record = recall_demo(steps, progress=progress)
    write_atomic(run_dir / RECALL_DEMO_NAME, json.dumps(record, ensure_ascii=False, allow_nan=False))
    return record


def _held_out_text(corpus: PackedCorpus, source: str) -> str:
    split = corpus.sources[source].splits["validation"]
    whole = corpus.tokenizer.stream()  # not a part of the character at the cut
    return "".join(whole.push(token) for token in split.tokens[:4096].tolist()).strip()
