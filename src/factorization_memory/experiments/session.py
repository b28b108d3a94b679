"""One run as a library call: train, evaluate, generate, report.

    session = Session(config, "runs/mine")
    session.run(prompts=("Once upon a time",))

or one step at a time, as `fmem train`, `fmem demo` and the processes of `fmem compare` do it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory._files import write_atomic
from factorization_memory.data.shards import PackedCorpus
from factorization_memory.evaluation import evaluate_corpus, inspect_text
from factorization_memory.experiments.evaluation import Progress, evaluate_model, keep_evaluation
from factorization_memory.experiments.samples import continue_prompts
from factorization_memory.generation import SamplingConfig, generate
from factorization_memory.models.device import resolve_device
from factorization_memory.reports.report import write_report
from factorization_memory.runs import find_checkpoint, load_model
from factorization_memory.runs.names import INSPECTION_NAME, SAMPLES_NAME
from factorization_memory.training import Trainer
from factorization_memory.training.initial import BUILTIN

if TYPE_CHECKING:
    from factorization_memory.config import RunConfig
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel
    from factorization_memory.runs.evaluation_record import EvaluationRecord
    from factorization_memory.runs.inspection_record import InspectionRecord
    from factorization_memory.runs.training_record import HeldOut, RunResult, SampleRecord
    from factorization_memory.training import TrainingObserver


class Session:
    """The run of `config`, on the packed corpus that it names, in the folder `run_dir`; `observer` is told of its training.

    The steps after `train` are about the best checkpoint. `evaluate` and `write` return records that `keep_evaluation` and
    `keep_samples` put into the run folder; the others do so themselves. Raises CorpusError where there is no packed corpus.
    """

    def __init__(self, config: RunConfig, run_dir: Path | str, observer: TrainingObserver | None = None) -> None:
        self.config = with_absolute_paths(config)
        self.run_dir = Path(run_dir)
        self.observer = observer
        self.corpus = PackedCorpus.open(Path(self.config.data.corpus))

    def run(
        self,
        *,
        resume: bool = False,
        prompts: Sequence[str] = (),
        sampling: SamplingConfig | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """All of it. Returns `training` and, unless a signal stopped that, `evaluation`, `samples` (of `prompts`) and `report`,
        the path of the page. Raises what `Trainer.run` raises."""
        training = self.train(resume)
        if training["stopped"] == "interrupted":
            return {"training": training}
        evaluation = self.evaluate(progress=progress)
        samples = [sample for prompt in prompts for sample in self.write(prompt, sampling=sampling)]
        if samples:
            self.keep_samples(samples)
        report = keep_evaluation(self.run_dir, evaluation) or write_report(self.run_dir)
        return {"training": training, "evaluation": evaluation, "samples": samples, "report": str(report)}

    def train(self, resume: bool = False) -> RunResult:
        """Train, evaluating and sampling as the configuration says; returns what `result.json` holds."""
        self.__dict__.pop("trained", None)  # the best checkpoint may have changed
        trainer = Trainer(
            self.config,
            self.corpus,
            self.run_dir,
            evaluate=evaluator(self.config, self.corpus),
            sample=sampler(self.config, self.corpus),
            observer=self.observer,
        )
        return trainer.run(resume)

    @cached_property
    def trained(self) -> tuple[str, LanguageModel, Tokenizer, RunConfig]:
        """The best checkpoint: its name, model, tokenizer, configuration."""
        checkpoint = find_checkpoint(self.run_dir, "best")
        return checkpoint.name, *load_model(checkpoint, resolve_device(self.config.training.device))

    def evaluate(self, **options: Any) -> EvaluationRecord:
        """The full evaluation on held-out text; `options` are those of `evaluate_model`."""
        checkpoint, model, _, config = self.trained
        return evaluate_model(model, self.corpus, config, checkpoint, **options)

    def write(self, prompt: str, **options: Any) -> list[SampleRecord]:
        """Continue a prompt; `options` are those of `continue_prompts`."""
        _, model, tokenizer, _ = self.trained
        return continue_prompts(model, tokenizer, (prompt,), **options)

    def keep_samples(self, samples: list[SampleRecord]) -> None:
        """Saves what `write` returned, for the report."""
        write_atomic(self.run_dir / SAMPLES_NAME, json.dumps(samples, ensure_ascii=False, indent=1))

    def inspect(self, text: str) -> InspectionRecord:
        """Record how the model uses its memory on a text."""
        _, model, tokenizer, _ = self.trained
        record = inspect_text(model, tokenizer, text)
        write_atomic(self.run_dir / INSPECTION_NAME, json.dumps(record, ensure_ascii=False))
        return record


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """`config` with absolute paths, so that the run finds them from any working directory."""
    corpus, source = str(Path(config.data.corpus).resolve()), config.training.init_from
    if source and source != BUILTIN:
        source = str(Path(source).resolve())
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, corpus=corpus),
        training=dataclasses.replace(config.training, init_from=source),
    )


def evaluator(config: RunConfig, corpus: PackedCorpus) -> Callable[[LanguageModel, int], HeldOut]:
    """The evaluation that the trainer calls: held-out loss of each source."""

    def evaluate(model: LanguageModel, step: int) -> HeldOut:
        result = evaluate_corpus(
            model, corpus, context_length=config.data.context_length, max_tokens=config.training.evaluation_tokens
        )
        return {"sources": result["sources"], "bits_per_byte": result["total"]["bits_per_byte"]}

    return evaluate


def sampler(config: RunConfig, corpus: PackedCorpus) -> Callable[[LanguageModel], list[SampleRecord]]:
    """The samples that the trainer asks for: a short continuation of each prompt."""

    def sample(model: LanguageModel) -> list[SampleRecord]:
        texts: list[SampleRecord] = []
        for prompt in config.training.sample_prompts:
            (generation,) = generate(model, corpus.tokenizer, prompt, max_tokens=64, sampling=SamplingConfig(min_p=0.05))
            texts.append({"prompt": prompt, "text": generation.text})
        return texts

    return sample
