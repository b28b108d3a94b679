"""The training loop: one model, one device, one run folder.

The parts of a run are in separate files: checks before it (preparation.py), the passes of a step (step.py), the learning rate
(schedule.py), guards (guard.py); checkpoints, records and the lock are in `runs`. Evaluation and sampling are passed in as
functions.
"""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from factorization_memory.config import ConfigError, RunConfig
from factorization_memory.data.loader import BatchLoader
from factorization_memory.models import LanguageModel
from factorization_memory.models.compilation import compiled_loss
from factorization_memory.models.device import autocast, resolve_device
from factorization_memory.models.finite import not_finite
from factorization_memory.models.routing import RoutingHealth, memory_layers
from factorization_memory.runs.checkpoint import load_checkpoint, model_tensors, save_checkpoint
from factorization_memory.runs.checkpoint_folder import (
    CheckpointError,
    NotFiniteError,
    TrainingState,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
)
from factorization_memory.runs.lock import RunLock
from factorization_memory.runs.record import RunFolderError, RunRecord
from factorization_memory.training.guard import GracefulStop, TrainingDivergedError, check_finite, diverged
from factorization_memory.training.initial import load_initial
from factorization_memory.training.optimizer import make_optimizer, set_learning_rate
from factorization_memory.training.preparation import check_same_run, complete_config, require_room_for_training
from factorization_memory.training.progress import ShieldedObserver, TrainingObserver
from factorization_memory.training.schedule import learning_rate
from factorization_memory.training.step import accumulate_gradient, clip_gradient

if TYPE_CHECKING:
    from factorization_memory.data.loader import Batch
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.models import ModelState

Evaluate = Callable[[LanguageModel, int], dict[str, Any]]
"""Maps the model, in evaluation mode, and the step to `sources` (by name) and `bits_per_byte`, which ranks checkpoints."""
Sample = Callable[[LanguageModel], list[dict[str, Any]]]
"""Maps the model, in evaluation mode, to its samples, as JSON-ready dictionaries (`prompt`, `text`)."""


class Trainer:
    """Trains one model on one device, into the run folder `run_dir`.

    `evaluate` and `sample` are called as often as configured; `observer` is notified of all events. Raises ConfigError for a
    device that does not exist, for a `model.vocab_size` other than the tokenizer's (0 means the tokenizer's), and for samples
    without prompts.
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: PackedCorpus,
        run_dir: Path,
        *,
        evaluate: Evaluate | None = None,
        sample: Sample | None = None,
        observer: TrainingObserver | None = None,
    ) -> None:
        self.config = complete_config(config, corpus.tokenizer.vocab_size)
        prompts = self.config.training.sample_prompts
        if self.config.training.sample_every > 0 and (not prompts or "" in prompts):
            raise ConfigError(
                f"training.sample_prompts={prompts!r}: a sample needs text to go on from; give prompts that are not empty, "
                "or set training.sample_every to 0"
            )
        self.corpus = corpus
        self.run_dir = Path(run_dir)
        self.evaluate = evaluate
        self.sample = sample
        self.observer = ShieldedObserver(observer if observer is not None else TrainingObserver())
        self.device = resolve_device(config.training.device)
        require_room_for_training(self.config, self.device)
        self.record = RunRecord(self.run_dir)

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Trains to the last step, or until SIGINT, SIGTERM or SIGHUP; returns the contents of `result.json`.

        `resume` continues from the folder's last checkpoint. Raises RunFolderError for a folder that has a run if `resume` is
        false, has none if it is true, or has a run of another configuration; RunLockedError if another process writes there;
        CheckpointError for a damaged checkpoint or a full disk; ConfigError for a `training.init_from` of another shape or
        tokenizer; TrainingDivergedError for a loss, gradient or weight that is not finite.
        """
        if resume and not self.record.exists:
            raise RunFolderError(f"{self.run_dir}: there is no run here to resume; start one without --resume")
        with RunLock(self.run_dir):
            if resume:
                check_same_run(self.record, self.config, self.corpus)
            elif self.record.exists:
                raise RunFolderError(
                    f"{self.run_dir}: already holds a run; continue it with --resume, or choose another folder"
                )
            run = _Run(self, resume)
            try:
                with GracefulStop() as stop:
                    return run.train(stop)
            finally:
                self.observer.on_end()


class _Run:
    """One call of `Trainer.run`: the model, the optimizer and their progress."""

    def __init__(self, trainer: Trainer, resume: bool) -> None:
        self.trainer = trainer
        self.config, self.observer, self.record = trainer.config, trainer.observer, trainer.record
        self.run_dir, self.device = trainer.run_dir, trainer.device
        training = self.config.training
        torch.manual_seed(training.seed)
        self.model = LanguageModel(self.config.model).to(self.device)
        self.optimizer = make_optimizer(self.model, self.config.optimizer)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.autocast = autocast(training, self.device)
        self.compiled: Callable[..., Any] | None = None
        if training.compile:
            # Graph breaks allowed: the plain PyTorch form of the recurrence does not compile to a single graph.
            self.compiled = compiled_loss(self.model, False, training.activation_memory_budget)
        self.byte_lengths = torch.tensor([len(token) for token in trainer.corpus.tokenizer.token_bytes])
        self.state = TrainingState()
        self.carried: list[ModelState | None] | None = None
        if training.carry_state:
            self.carried = [None] * (self.config.sequences_per_step // self.config.micro_batch_size)
        self.checkpoint: Path | None = None
        if resume and list_checkpoints(self.run_dir):
            self.checkpoint = find_checkpoint(self.run_dir, "last")
            self.state, self.carried = load_checkpoint(
                self.checkpoint, model=self.model, optimizer=self.optimizer, config=self.config
            )
        elif training.init_from:
            load_initial(self.model, trainer.corpus.tokenizer, training.init_from)
        # Before anything is written: a configuration that does not fit the corpus must leave no run behind.
        self.loader = self._loader(self.state.step)
        self.record.cut_after(self.state.step, self.state.observed_step)
        self.record.remove_result()
        if resume:
            # Even if no step is left: keep_checkpoints may have changed, and a killed write may have left a partial folder.
            prune_checkpoints(self.run_dir, self.config.training.keep_checkpoints, self.state.best_step)
        self.record.begin(self.config, trainer.corpus.tokenizer, self.device, self.state.step if resume else None)
        self.clock = time.perf_counter() - self.state.seconds

    def train(self, stop: GracefulStop) -> dict[str, Any]:
        steps, every = self.config.training.steps, self.config.training.checkpoint_every
        state = self.state
        self.observer.on_start(steps, sum(parameter.numel() for parameter in self.parameters), state.step)
        self.model.train()
        if state.observed_step < state.step:
            # Interrupted after a step but before its evaluation: do that now.
            with self._loader(state.step - 1) as loader:
                batches = next(iter(loader))
            if self._observe_or_save(batches[-1]):
                self._save()
        stopping = stop.requested is not None
        with self.loader as loader:
            batches_of_step = iter(loader)
            while state.step < steps and not stopping:
                started, waited = time.perf_counter(), loader.wait_seconds
                batches = next(batches_of_step)
                metrics = self._step(batches)
                self._log(metrics, time.perf_counter() - started, loader.wait_seconds - waited)
                improved = stop.requested is None and self._observe_or_save(batches[-1])
                stopping = stop.requested is not None
                if improved or stopping or state.step == steps or (every and state.step % every == 0):
                    self._save()
        return self._finish(stop)

    def _loader(self, start_step: int) -> BatchLoader:
        return BatchLoader(
            self.trainer.corpus,
            self.config.data,
            sequences_per_step=self.config.sequences_per_step,
            micro_batch_size=self.config.micro_batch_size,
            carry_state=self.config.training.carry_state,
            seed=self.config.training.seed,
            start_step=start_step,
        )

    def _step(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """One optimizer step; returns its metrics and adds them to the sums of the log's interval."""
        step = self.state.step + 1
        rate = learning_rate(self.config.optimizer, step, self.config.training.steps)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        gradient = accumulate_gradient(self.model, batches, self.carried, self.autocast, self.device, self.compiled)
        norm = clip_gradient(self.parameters, self.config.optimizer.clip_norm)
        # The only synchronization in a step.
        *losses, gradient_norm = torch.stack([*gradient.losses, norm]).tolist()
        check_finite(step, losses, gradient_norm, gradient.windows, self.checkpoint)
        self.optimizer.step()
        self.carried = gradient.carried
        nats = math.fsum(loss * targets for loss, targets in zip(losses, gradient.targets, strict=True))
        count = sum(gradient.targets)
        text_bytes = sum(int(self.byte_lengths[batch.targets[batch.targets >= 0]].sum()) for batch in batches)
        tokens = sum(batch.tokens.numel() for batch in batches)
        self.state.step = step
        self.state.tokens += tokens
        self._add(nats=nats, targets=count, bytes=text_bytes, gradient_norm=gradient_norm, steps=1, tokens=tokens)
        return {
            "step": step,
            "tokens": self.state.tokens,
            "loss": nats / count,
            "bits_per_byte": bits_per_byte(nats, text_bytes),
            "learning_rate": rate,
            "gradient_norm": gradient_norm,
        }

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self.state.interval[name] = self.state.interval.get(name, 0) + value

    def _log(self, metrics: dict[str, Any], seconds: float, waited: float) -> None:
        self._add(seconds=seconds, waited=waited)
        state, sums = self.state, self.state.interval
        state.step_seconds += seconds
        state.seconds = time.perf_counter() - self.clock
        timing = {
            "tokens_per_second": sums["tokens"] / sums["seconds"],
            "seconds": state.seconds,
            "data_wait_share": sums["waited"] / sums["seconds"],
        }
        self.observer.on_step({**metrics, **timing})
        if state.step % self.config.training.log_every == 0 or state.step == self.config.training.steps:
            means = {
                "loss": sums["nats"] / sums["targets"],
                "bits_per_byte": bits_per_byte(sums["nats"], sums["bytes"]),
                "gradient_norm": sums["gradient_norm"] / sums["steps"],
            }
            state.last_train = {**metrics, **means, **timing}
            self.record.append("train", state.last_train)
            state.interval = {}

    def _observe_or_save(self, batch: Batch) -> bool:
        """`_observe`; if it raises, saves the steps since the last checkpoint before reraising."""
        try:
            return self._observe(batch)
        except TrainingDivergedError:
            raise  # nothing to save
        except Exception as error:
            if self.checkpoint != checkpoint_path(self.run_dir, self.state.step):
                try:
                    self._save()
                except CheckpointError as full:
                    error.add_note(str(full))
                    raise error from None
            message = f"step {self.state.step}: its evaluation or sample failed; kept {self.checkpoint}. Resume with --resume"
            error.add_note(message)
            self.observer.on_message(message)
            raise

    def _observe(self, batch: Batch) -> bool:
        """Evaluates and samples, if due, in the precision of training; returns whether this evaluation is the best yet."""
        training, step = self.config.training, self.state.step
        last, best = step == training.steps, False
        evaluating = last or bool(training.evaluate_every and step % training.evaluate_every == 0)
        sampling = self.trainer.sample is not None and bool(
            training.sample_every and (last or step % training.sample_every == 0)
        )
        wrong = not_finite(model_tensors(self.model)) if evaluating or sampling else None
        if wrong is not None:
            raise diverged(step, f"weight {wrong!r} is NaN or infinite", self.checkpoint)
        devices = [self.device] if self.device.type == "cuda" else []
        # Restore the random generators afterwards, so that the frequency of evaluation does not affect training.
        with torch.random.fork_rng(devices), torch.no_grad(), self.autocast:
            self.model.eval()
            if evaluating:
                best = self._evaluate()
                self._measure_routing(batch)
            if sampling:
                assert self.trainer.sample is not None
                sample = {"step": step, "samples": self.trainer.sample(self.model)}
                self.record.append("sample", sample)
                self.observer.on_sample(sample)
            self.model.train()
        self.state.observed_step = step
        return best

    def _evaluate(self) -> bool:
        if self.trainer.evaluate is None:
            return False
        state = self.state
        evaluation = {"step": state.step, **self.trainer.evaluate(self.model, state.step)}
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
        routing = {
            "step": self.state.step,
            "states": sum(len(head) for layer in layers for head in layer["share"]),
            "dead_states": sum(sum(layer["dead"]) for layer in layers),
            "entropy": [statistics.fmean(layer["entropy"]) for layer in layers],
            "balance": [statistics.fmean(layer["balance"]) for layer in layers],
            "layers": layers,
        }
        self.record.append("routing", routing)
        self.observer.on_routing(routing)

    def _save(self) -> None:
        self.state.seconds = time.perf_counter() - self.clock
        try:
            self.checkpoint = save_checkpoint(
                self.run_dir,
                model=self.model,
                optimizer=self.optimizer,
                config=self.config,
                state=self.state,
                tokenizer_fingerprint=self.trainer.corpus.tokenizer.fingerprint,
                corpus_fingerprint=self.trainer.corpus.fingerprint,
                carried=self.carried,
            )
        except NotFiniteError as error:
            raise diverged(self.state.step, f"the checkpoint {error}", self.checkpoint) from None
        prune_checkpoints(self.run_dir, self.config.training.keep_checkpoints, self.state.best_step)
        self.observer.on_checkpoint(self.checkpoint)

    def _finish(self, stop: GracefulStop) -> dict[str, Any]:
        state, steps = self.state, self.config.training.steps
        finished = state.step == steps and state.observed_step == steps
        state.seconds = time.perf_counter() - self.clock
        best = None if state.best_step is None else checkpoint_path(self.run_dir, state.best_step)
        result = {
            "stopped": "finished" if finished else "interrupted",
            "signal": None if finished else stop.requested,
            "steps": state.step,
            "total_steps": steps,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_second": state.tokens / state.step_seconds if state.step_seconds else None,
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            "train": state.last_train,
            "evaluation": state.last_evaluation,
            "best_evaluation": state.best_evaluation,
            "checkpoints": {
                name: None if path is None else path.relative_to(self.run_dir).as_posix()
                for name, path in (("last", self.checkpoint), ("best", best))
            },
        }
        self.record.write_result(result)
        if not finished:
            kept = (
                "before its first step; no checkpoint was needed" if self.checkpoint is None else f"and kept {self.checkpoint}"
            )
            self.observer.on_message(
                f"{stop.requested}: stopped at step {state.step} of {steps} {kept}. "
                f"Resume with `fmem train --resume {shlex.quote(str(self.run_dir))}`, or the same command and --resume"
            )
        return result


def bits_per_byte(nats: float, text_bytes: float) -> float | None:
    """Bits per byte of text with a total of `nats`; None for no text."""
    return nats / text_bytes / math.log(2) if text_bytes else None
