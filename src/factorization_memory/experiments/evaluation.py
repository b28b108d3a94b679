"""The evaluation of a trained model as stored in its run's `evaluation.json`: the record of evaluation/run.py, and

evaluated        {checkpoint, corpus_fingerprint, max_position, max_tokens, stretches}: its arguments; null is the default;
                 with recall_tasks also recall_items and, if given, recall_lengths
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from factorization_memory._files import read_json_or_none, write_atomic
from factorization_memory.config import ConfigError
from factorization_memory.data.corpora import builtin_corpus
from factorization_memory.data.shards import PackedCorpus, pack
from factorization_memory.evaluation import evaluate_run
from factorization_memory.evaluation.recall_suite import held_out_texts
from factorization_memory.models.device import autocast
from factorization_memory.reports.report import write_report
from factorization_memory.runs.names import EVALUATION_NAME, TOKENIZER_NAME

if TYPE_CHECKING:
    from factorization_memory.config import RunConfig
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel
    from factorization_memory.runs.evaluation_record import Evaluated, EvaluationRecord, RecallOptions

Progress = Callable[[str, int, int], None]
"""Called with the current task, the amount done, and the total."""
BUILTIN = "builtin"
"""Replaces the checkpoint's name for the model that comes with the package."""


def evaluate_model(
    model: LanguageModel,
    corpus: PackedCorpus,
    config: RunConfig,
    checkpoint: str,
    *,
    max_position: int | None = None,
    max_tokens: int | None = None,
    stretches: int = 8,
    ngram_orders: tuple[int, ...] = (3, 5),
    progress: Progress | None = None,
    **recall: Unpack[RecallOptions],
) -> EvaluationRecord:
    """`evaluate_run` in the precision of the run that `config` is of; `recall` are its arguments for the recall suite.

    `evaluated` in the record says what was evaluated (the name of the `checkpoint`) and how.
    """
    with autocast(config.training, next(model.parameters()).device):
        record = evaluate_run(
            model,
            corpus,
            config,
            max_position=max_position,
            max_tokens=max_tokens,
            stretches=stretches,
            ngram_orders=ngram_orders,
            progress=progress,
            **recall,
        )
    evaluated: Evaluated = {
        "checkpoint": checkpoint,
        "corpus_fingerprint": corpus.fingerprint,
        "max_position": max_position,
        "max_tokens": max_tokens,
        "stretches": stretches,
        **recall,
    }
    return {"evaluated": evaluated, **record}


def keep_evaluation(run_dir: Path, record: EvaluationRecord) -> Path | None:
    """Saves an evaluation in its run folder and updates the report; returns the report's path.

    Returns None if the run already has an evaluation of the same checkpoint that covers more.
    """
    path = run_dir / EVALUATION_NAME
    kept = read_json_or_none(path)
    if kept is not None and told_by(record, kept):
        return None
    write_atomic(path, json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1))
    return write_report(run_dir)


def told_by(record: EvaluationRecord, kept: EvaluationRecord) -> bool:
    """Whether `kept`, of the same model and text as `record`, covers all of it on as much text, and more in some part."""
    evaluated: Mapping[str, object] = kept.get("evaluated", {})
    wanted: Mapping[str, object] = record["evaluated"]
    if any(evaluated.get(name) != wanted[name] for name in ("checkpoint", "corpus_fingerprint")):
        return False

    def extent(evaluation: EvaluationRecord) -> tuple[int, ...]:
        positions = evaluation.get("position", {}).values()
        return (
            evaluation["total"]["tokens"],
            min((each["max_position"] for each in positions), default=0),
            min((each["stretches"] for each in positions), default=0),
            len(evaluation.keys() & {"recall", "ngram", "position", "recall_tasks"}),
            evaluation.get("recall_tasks", {}).get("items", 0),
        )

    mine, theirs = extent(record), extent(kept)
    return mine != theirs and all(own <= other for own, other in zip(mine, theirs, strict=True))


@contextmanager
def held_out_corpus(corpus: Path | None, model: Path | None, tokenizer: Tokenizer, config: RunConfig) -> Iterator[PackedCorpus]:
    """The packed corpus to evaluate a loaded model on: the folder `corpus`, or else the one that it was trained on.

    `model` is the folder that it was loaded from; None is the model that comes with the package, whose text is by default the
    two books that come with it too, packed for as long as the context lasts, almost entirely as held-out text.

    Raises ValueError if there is no such corpus or it was packed with another tokenizer.
    """
    if corpus is None and model is None:
        with tempfile.TemporaryDirectory() as temporary:
            books = [(None, builtin_corpus())]
            yield pack(books, tokenizer, Path(temporary) / "packed", holdout="tail", holdout_fraction=0.99)
        return
    if corpus is None and not config.data.corpus:
        raise ValueError(f"{model}: an exported model does not record its corpus; give one with --corpus DIR")
    folder = corpus or Path(config.data.corpus)
    if not folder.exists():
        raise ValueError(f"{folder}: the run's corpus no longer exists; give its new place with --corpus DIR")
    packed = PackedCorpus.open(folder)
    if packed.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{folder}: packed with a different tokenizer than the model's; pack it with the {TOKENIZER_NAME} beside the model"
        )
    yield packed


def require_recall_texts(corpus: PackedCorpus, lengths: Sequence[int]) -> None:
    """Raises ConfigError if the held-out text is too short for the recall suite: to be told before the rest is evaluated."""
    longest = max(map(len, held_out_texts(corpus).values()), default=0)
    if longest < min(lengths):
        raise ConfigError(
            f"--recall: the longest held-out text of the corpus has {longest} tokens, but the shortest haystack needs "
            f"{min(lengths)}; pack the corpus with a larger --holdout-fraction, or drop --recall"
        )
