"""`fmem train PRESET`: train a model on a packed corpus, into a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from factorization_memory.cli.common import choose, console, emit, interrupted_status, parse
from factorization_memory.config import ConfigError, RunConfig
from factorization_memory.presets import PRESETS

if TYPE_CHECKING:
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.models import LanguageModel


@dataclass(frozen=True)
class TrainOptions:
    """Train a model. Any field of the preset can be overridden by its flag."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run_dir: Path = Path("runs/run")
    """Run folder: records, checkpoints, report."""
    resume: bool = False
    """Go on from the run folder's last checkpoint, on the very same loss curve."""
    json: bool = False
    """Write the result to stdout as JSON."""


def preset_and_options(arguments: list[str], verb: str, options: type[Any]) -> Any:
    """Options of `fmem VERB PRESET [flags]`, the preset's configuration their default."""
    if not arguments or arguments[0].startswith("-"):
        listing = "\n".join(f"  {name:<14}{make.__doc__}" for name, make in PRESETS.items())
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        message = f"usage: fmem {verb} PRESET [options]; fmem {verb} PRESET --help lists every option\n\n{listing}"
        if not asked:
            raise ConfigError(message)
        print(message)
        raise SystemExit(0)
    preset = choose(arguments[0], PRESETS, "preset")()
    return parse(options, arguments[1:], f"{verb} {arguments[0]}", default=options(config=preset))


def run(arguments: list[str]) -> int:
    """`fmem train`."""
    options: TrainOptions = preset_and_options(arguments, "train", TrainOptions)
    if not options.config.data.corpus:
        raise ConfigError("data.corpus='': name a packed corpus with --data.corpus DIR; `fmem data pack` makes one")
    result = train(options.config, options.run_dir, options.resume)
    emit(result, options.json)
    if result["stopped"] == "interrupted":
        console().print(
            f"stopped by {result['signal']} after step {result['steps']:,}; the same command with --resume goes on from there"
        )
        return interrupted_status(result)
    from factorization_memory.experiments.report import write_report

    console().print(f"report: {write_report(options.run_dir)}")
    return 0


def train(config: RunConfig, run_dir: Path, resume: bool = False) -> dict[str, Any]:
    """Train with a progress bar, evaluating and sampling as the configuration says; returns the result."""
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.training import RichProgress, Trainer

    # The run remembers its corpus wherever it is called from later.
    folder = Path(config.data.corpus).resolve()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=str(folder)))
    corpus = PackedCorpus.open(folder)
    trainer = Trainer(
        config, corpus, run_dir, evaluate=evaluator(config, corpus), sample=sampler(config, corpus),
        observer=RichProgress(console()),
    )  # fmt: skip
    return trainer.run(resume)


def evaluator(config: RunConfig, corpus: PackedCorpus) -> Callable[[LanguageModel, int], dict[str, Any]]:
    """The evaluation that the trainer calls: held-out loss of each source."""
    from factorization_memory.evaluation import evaluate_corpus

    def evaluate(model: LanguageModel, step: int) -> dict[str, Any]:
        result = evaluate_corpus(
            model, corpus, context_length=config.data.context_length, max_tokens=config.training.evaluation_tokens
        )
        return {"sources": result["sources"], "bits_per_byte": result["total"]["bits_per_byte"]}

    return evaluate


def sampler(config: RunConfig, corpus: PackedCorpus) -> Callable[[LanguageModel], list[dict[str, Any]]]:
    """The samples that the trainer asks for: a short continuation of each prompt."""
    from factorization_memory.generation import SamplingConfig, generate

    def sample(model: LanguageModel) -> list[dict[str, Any]]:
        texts = []
        for prompt in config.training.sample_prompts:
            (generation,) = generate(model, corpus.tokenizer, prompt, max_tokens=64, sampling=SamplingConfig(min_p=0.05))
            texts.append({"prompt": prompt, "text": generation.text})
        return texts

    return sample
