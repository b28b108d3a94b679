"""Evaluates a model and its use of memory: held-out loss, loss by position, an n-gram baseline, recall tasks, inspection of
single texts.

`evaluate_run` does it all and returns the contents of a run folder's `evaluation.json`; `run.py` describes the layout.
"""

from factorization_memory.evaluation.inspection import inspect_text
from factorization_memory.evaluation.loss import evaluate_corpus, evaluate_loss
from factorization_memory.evaluation.ngram import NgramModel
from factorization_memory.evaluation.position import beyond_context, loss_by_position, reading_stretches
from factorization_memory.evaluation.reading import writes_read
from factorization_memory.evaluation.recall_demo import recall_demo
from factorization_memory.evaluation.recall_learning import RecallProgress, learn_recall
from factorization_memory.evaluation.recall_suite import evaluate_recall, held_out_texts
from factorization_memory.evaluation.run import evaluate_run

__all__ = [
    "NgramModel",
    "RecallProgress",
    "beyond_context",
    "evaluate_corpus",
    "evaluate_loss",
    "evaluate_recall",
    "evaluate_run",
    "held_out_texts",
    "inspect_text",
    "learn_recall",
    "loss_by_position",
    "reading_stretches",
    "recall_demo",
    "writes_read",
]
