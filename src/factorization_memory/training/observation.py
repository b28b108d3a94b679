"""What is observed of the model between the steps of a run: its evaluation, samples, and the health of its routing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from factorization_memory.config import TrainingConfig
from factorization_memory.models import LanguageModel
from factorization_memory.models.finite import not_finite
from factorization_memory.models.routing import RoutingHealth, memory_layers
from factorization_memory.runs.checkpoint import model_tensors
from factorization_memory.runs.checkpoint_folder import TrainingState
from factorization_memory.runs.record import RunRecord
from factorization_memory.runs.training_record import EvaluationLine, HeldOut, RoutingLine, SampleLine, SampleRecord
from factorization_memory.training.guard import diverged
from factorization_memory.training.progress import TrainingObserver

if TYPE_CHECKING:
    from factorization_memory.data.loader import Batch

Evaluate = Callable[[LanguageModel, int], HeldOut]
"""Maps the model, in evaluation mode, and the step to `sources` (by name) and `bits_per_byte`, which ranks checkpoints."""
Sample = Callable[[LanguageModel], list[SampleRecord]]
"""Maps the model, in evaluation mode, to its samples, as JSON-ready dictionaries (`prompt`, `text`)."""


@dataclass
class Observation:
    """Observes a model as often as configured, and writes what it finds to the run's record and state."""

    model: LanguageModel
    config: TrainingConfig
    state: TrainingState
    record: RunRecord
    observer: TrainingObserver
    device: torch.device
    autocast: torch.autocast
    """The precision of training."""
    evaluate: Evaluate | None
    sample: Sample | None

    def observe(self, batch: Batch, checkpoint: Path | None) -> bool:
        """Evaluates and samples, if due, in the precision of training; returns whether this evaluation is the best yet.

        Args:
            batch: of the step, to measure routing on.
            checkpoint: the last one, which is named if the model has diverged.

        Raises:
            TrainingDivergedError: a weight is not finite.
        """
        training, step = self.config, self.state.step
        last, best = step == training.steps, False
        evaluating = last or bool(training.evaluate_every and step % training.evaluate_every == 0)
        sampling = self.sample is not None and bool(training.sample_every and (last or step % training.sample_every == 0))
        wrong = not_finite(model_tensors(self.model)) if evaluating or sampling else None
        if wrong is not None:
            raise diverged(step, f"weight {wrong!r} is NaN or infinite", checkpoint)
        devices = [self.device] if self.device.type == "cuda" else []
        # Restore the random generators afterwards, so that the frequency of evaluation does not affect training.
        with torch.random.fork_rng(devices), torch.no_grad(), self.autocast:
            self.model.eval()
            if evaluating:
                best = self._evaluate()
                self._measure_routing(batch)
            if sampling:
                assert self.sample is not None
                sample: SampleLine = {"step": step, "samples": self.sample(self.model)}
                self.record.append("sample", sample)
                self.observer.on_sample(sample)
            self.model.train()
        self.state.observed_step = step
        return best

    def _evaluate(self) -> bool:
        if self.evaluate is None:
            return False
        state = self.state
        evaluation: EvaluationLine = {"step": state.step, **self.evaluate(self.model, state.step)}
        self.record.append("evaluation", evaluation)
        self.observer.on_evaluation(evaluation)
        state.last_evaluation = evaluation
        before = math.inf if state.best_evaluation is None else state.best_evaluation["bits_per_byte"]
        if not evaluation["bits_per_byte"] < before:
            return False
        state.best_step, state.best_evaluation = state.step, evaluation
        return True

    def _measure_routing(self, batch: Batch) -> None:
        if not memory_layers(self.model):
            return
        health = RoutingHealth(self.model)
        with health.observe():
            self.model(
                batch.tokens.to(self.device),
                batch.targets.to(self.device),
                cu_seqlens=None if batch.cu_seqlens is None else batch.cu_seqlens.to(self.device),
                keep_state=False,
            )
        layers = health.summary()
        routing: RoutingLine = {
            "step": self.state.step,
            "states": sum(len(head) for layer in layers for head in layer["share"]),
            "dead_states": sum(sum(layer["dead"]) for layer in layers),
            "entropy": [statistics.fmean(layer["entropy"]) for layer in layers],
            "balance": [statistics.fmean(layer["balance"]) for layer in layers],
            "layers": layers,
        }
        self.record.append("routing", routing)
        self.observer.on_routing(routing)
