"""The training loop: one model, one device, one run folder.

The parts of a run are in separate files: checks before it (preparation.py), the passes of a step (step.py), the learning rate
(schedule.py), evaluation and samples between steps (observation.py), guards (guard.py), its result (result.py); checkpoints,
records and the lock are in `runs`. Evaluation and sampling are passed in as functions.
"""

from __future__ import annotations

import math
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
from factorization_memory.runs.checkpoint import load_checkpoint, save_checkpoint
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
from factorization_memory.training.observation import Evaluate, Observation, Sample
from factorization_memory.training.optimizer import make_optimizer, set_learning_rate
from factorization_memory.training.preparation import check_same_run, complete_config, require_room_for_training
from factorization_memory.training.progress import ShieldedObserver, TrainingObserver
from factorization_memory.training.result import run_result, stopped_early
from factorization_memory.training.schedule import learning_rate
from factorization_memory.training.step import accumulate_gradient, clip_gradient

if TYPE_CHECKING:
    from factorization_memory.data.loader import Batch
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.models import ModelState
    from factorization_memory.runs.training_record import RunResult, StepFigures, StepTiming


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
                f"training.sample_prompts={prompts!r}: a sample needs a prompt to continue; use non-empty prompts, "
                "or training.sample_every=0"
            )
        self.corpus = corpus
        self.run_dir = Path(run_dir)
        self.evaluate = evaluate
        self.sample = sample
        self.observer = ShieldedObserver(observer if observer is not None else TrainingObserver())
        self.device = resolve_device(config.training.device)
        require_room_for_training(self.config, self.device)
        self.record = RunRecord(self.run_dir)

    def run(self, resume: bool = False) -> RunResult:
        """Trains to the last step, or until SIGINT, SIGTERM or SIGHUP; returns the contents of `result.json`.

        `resume` continues from the folder's last checkpoint. Raises RunFolderError for a folder that has a run if `resume` is
        false, has none if it is true, or has a run of another configuration; RunLockedError if another process writes there;
        CheckpointError for a damaged checkpoint or a full disk; ConfigError for a `training.init_from` of another shape or
        tokenizer; TrainingDivergedError for a loss, gradient or weight that is not finite.
        """
        if resume and not self.record.exists:
            raise RunFolderError(f"{self.run_dir}: no run to resume; start one without --resume")
        with RunLock(self.run_dir):
            if resume:
                check_same_run(self.record, self.config, self.corpus)
            elif self.record.exists:
                raise RunFolderError(
                    f"{self.run_dir}: already contains a run; continue it with --resume, or choose another folder"
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
        self.observation = Observation(
            self.model,
            self.config.training,
            self.state,
            self.record,
            self.observer,
            self.device,
            self.autocast,
            trainer.evaluate,
            trainer.sample,
        )

    def train(self, stop: GracefulStop) -> RunResult:
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

    def _step(self, batches: Sequence[Batch]) -> StepFigures:
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

    def _log(self, metrics: StepFigures, seconds: float, waited: float) -> None:
        self._add(seconds=seconds, waited=waited)
        state, sums = self.state, self.state.interval
        state.step_seconds += seconds
        state.seconds = time.perf_counter() - self.clock
        timing: StepTiming = {
            "tokens_per_second": sums["tokens"] / sums["seconds"],
            "seconds": state.seconds,
            "data_wait_share": sums["waited"] / sums["seconds"],
        }
        self.observer.on_step({**metrics, **timing})
        if state.step % self.config.training.log_every == 0 or state.step == self.config.training.steps:
            metrics["loss"] = sums["nats"] / sums["targets"]
            metrics["bits_per_byte"] = bits_per_byte(sums["nats"], sums["bytes"])
            metrics["gradient_norm"] = sums["gradient_norm"] / sums["steps"]
            state.last_train = {**metrics, **timing}
            self.record.append("train", state.last_train)
            state.interval = {}

    def _observe_or_save(self, batch: Batch) -> bool:
        """Evaluates and samples, if due; if that raises, saves the steps since the last checkpoint before reraising."""
        try:
            return self.observation.observe(batch, self.checkpoint)
        except TrainingDivergedError:
            raise  # nothing to save
        except Exception as error:
            if self.checkpoint != checkpoint_path(self.run_dir, self.state.step):
                try:
                    self._save()
                except CheckpointError as full:
                    error.add_note(str(full))
                    raise error from None
            message = f"step {self.state.step}: evaluation or sampling failed; saved {self.checkpoint}. Continue with --resume"
            error.add_note(message)
            self.observer.on_message(message)
            raise

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
            raise diverged(self.state.step, error.what, self.checkpoint) from None
        prune_checkpoints(self.run_dir, self.config.training.keep_checkpoints, self.state.best_step)
        self.observer.on_checkpoint(self.checkpoint)

    def _finish(self, stop: GracefulStop) -> RunResult:
        state, steps = self.state, self.config.training.steps
        state.seconds = time.perf_counter() - self.clock
        parameters = sum(parameter.numel() for parameter in self.parameters)
        result = run_result(state, steps, stop.requested, parameters, self.run_dir, self.checkpoint)
        self.record.write_result(result)
        if result["stopped"] == "interrupted":
            self.observer.on_message(stopped_early(state.step, steps, stop.requested, self.run_dir, self.checkpoint))
        return result


def bits_per_byte(nats: float, text_bytes: float) -> float | None:
    """Bits per byte of text with a total of `nats`; None for no text."""
    return nats / text_bytes / math.log(2) if text_bytes else None
