"""How good a model is and how it uses its memory: held-out loss, loss by position, an n-gram yardstick, recall tasks,
inspection of a text.

`evaluate_run` does it all and returns what `evaluation.json` of a run folder holds; `run.py` describes that layout.
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
