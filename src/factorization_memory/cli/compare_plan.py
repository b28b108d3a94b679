"""Turns the options of `fmem compare` into a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from factorization_memory.cli.common import choose
from factorization_memory.config import ConfigError
from factorization_memory.experiments.contenders import Contender, read_contender

if TYPE_CHECKING:
    from factorization_memory.experiments.plan import Plan

SEARCHED_FACTORS = (0.5, 1.0, 2.0)
"""Learning rates to try if none are given, as multiples of the contender's own."""


@dataclass(frozen=True)
class CompareOptions:
    """Compare models on equal terms: as many parameters outside the embedding, the same tokens in the same order, each at the
    best of several learning rates, over several seeds. Text, steps and schedule are those of the first contender. Any field of
    a run set by its flag (`fmem train PRESET --help` lists them) holds for all. The same command goes on where it was stopped.
    """

    contenders: tyro.conf.Positional[tuple[str, ...]]
    """Each PRESET, PRESET:field=value,field=value (as paper-sparse:model.top-k=8,model.num-heads=4), or a run's config.json;
    NAME= before it gives it a name."""
    corpus: Path
    """Packed corpus."""
    out: Path
    """Folder of the comparison: compare.json, compare.md, compare.png, runs/."""
    seeds: tuple[str, ...] = ("0", "1", "2")
    """A training of every contender for each; NAME=0,1,2 gives one its own."""
    learning_rates: tuple[str, ...] = ()
    """Rates to choose from: numbers for all contenders, NAME=1e-3,2e-3 for one; none takes half, once and twice each one's own.
    A single rate is taken without a search."""
    search_steps: int | None = None
    """Steps of the short trainings that choose the learning rate; by default a share of all, see --search-fraction."""
    search_fraction: float = 0.2
    """Share of the steps that the short trainings have."""
    search_seed: int = 1000
    """Seed of the short trainings, none of --seeds."""
    own_schedules: bool = False
    """Each contender keeps the warm-up and decay of its preset; by default all have the first's, but for what their own text
    sets."""
    match_to: str | None = None
    """Contender whose number of parameters all take; by default the first."""
    parameters: int | None = None
    """Number of parameters outside the embedding that all take, instead."""
    positions: tuple[int, ...] = (4, 16)
    """Loss is also read at so many times the training context (powers of two); may be empty."""
    max_tokens: int | None = None
    """Held-out tokens of each source that the loss is measured on; by default all."""
    stretches: int = 8
    """Stretches of text of each source that are read by position."""
    recall: bool = False
    """Also ask each trained model what its context held (see `fmem evaluate --recall`)."""
    parallel: int = 1
    """Trainings that run at the same time."""
    gpus: int = 1
    """GPUs that they are shared out over."""
    alone_steps: int = 0
    """If positive, each contender also trains so many steps with nothing beside it, for its tokens per second."""
    dry_run: bool = False
    """Say what would be compared, and stop."""
    train: bool = True
    """Without, nothing is trained: the record is made of the runs that are done."""
    json: bool = False
    """Write the result to stdout as JSON."""


def check(options: CompareOptions, overrides: dict[str, str]) -> None:
    if len(options.contenders) < 2:
        raise ConfigError(f"contenders={' '.join(options.contenders)!r}: name two or more")
    for flag, value, least in (
        ("--parallel", options.parallel, 1),
        ("--gpus", options.gpus, 1),
        ("--stretches", options.stretches, 1),
        ("--alone-steps", options.alone_steps, 0),
        ("--max-tokens", options.max_tokens, 1),
        ("--search-steps", options.search_steps, 1),
        ("--parameters", options.parameters, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{flag}={value}: use {least} or more")
    if not 0 < options.search_fraction <= 1:
        raise ConfigError(f"--search-fraction={options.search_fraction}: use 0 < fraction <= 1")
    for multiple in options.positions:
        if multiple < 2 or multiple & (multiple - 1):
            raise ConfigError(f"--positions={multiple}: use powers of two from 2 on, the edges of the position bins")
    if options.match_to is not None and options.parameters is not None:
        raise ConfigError(f"--parameters={options.parameters}: not together with --match-to; drop one of both")
    for name, remedy in (
        ("training.seed", "give the seeds with --seeds"),
        ("data.corpus", "name the corpus with --corpus"),
        ("optimizer.learning_rate", "give the candidates with --learning-rates"),
    ):
        if name in overrides:
            raise ConfigError(f"--{name.replace('_', '-')}={overrides[name]}: {remedy}")


def make_plan(options: CompareOptions, overrides: dict[str, str]) -> Plan:
    """The plan of a comparison. Raises ConfigError for what cannot be compared."""
    contenders = [read_contender(text, overrides) for text in options.contenders]
    names = [contender.name for contender in contenders]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"contender {name!r}: named twice; give each its own name, as NAME={name}")
    known: dict[str, Any] = dict.fromkeys(names)
    if options.match_to is not None:
        choose(options.match_to, known, "--match-to: contender")
    rates = learning_rates(options.learning_rates, contenders)
    seeds = training_seeds(options.seeds, contenders)

    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.experiments import planning
    from factorization_memory.models.device import resolve_device

    corpus = PackedCorpus.open(options.corpus.resolve())
    if options.recall:
        from factorization_memory.cli.evaluate_recall import check_recall
        from factorization_memory.evaluation.recall_suite import LENGTHS

        check_recall(corpus, LENGTHS)
    plan = planning.make_plan(
        contenders,
        corpus,
        options.out,
        rates=rates,
        seeds=seeds,
        match_to=options.parameters or options.match_to or names[0],
        own_schedules=options.own_schedules,
        search_seed=options.search_seed,
        search_steps=options.search_steps,
        search_fraction=options.search_fraction,
        alone_steps=options.alone_steps,
        positions=options.positions,
        max_tokens=options.max_tokens,
        stretches=options.stretches,
        recall=options.recall,
    )
    if options.train:
        resolve_device(plan.entries[0].config.training.device)
    return plan


def learning_rates(texts: Sequence[str], contenders: Sequence[Contender]) -> dict[str, tuple[float, ...]]:
    """The candidates of each contender, from the words of `--learning-rates`."""
    shared, own = _by_contender(texts, contenders, "--learning-rates")
    rates = {}
    for contender in contenders:
        given = [_rate(word) for word in own.get(contender.name, shared)]
        default = [contender.config.optimizer.learning_rate * factor for factor in SEARCHED_FACTORS]
        rates[contender.name] = tuple(sorted(set(given or default)))
    return rates


def training_seeds(texts: Sequence[str], contenders: Sequence[Contender]) -> dict[str, tuple[int, ...]]:
    """The seeds of each contender, from the words of `--seeds`."""
    shared, own = _by_contender(texts, contenders, "--seeds")
    usual, others = _seeds(shared), {name: _seeds(words, name) for name, words in own.items()}
    seeds = {contender.name: others.get(contender.name, usual) for contender in contenders}
    for name, each in seeds.items():
        if not each:
            raise ConfigError(f"--seeds: {name!r} has none; give one or more for all, or as {name}=0,1")
    return seeds


def _by_contender(texts: Sequence[str], contenders: Sequence[Contender], flag: str) -> tuple[list[str], dict[str, list[str]]]:
    """The words of a flag that takes A,B for all contenders and NAME=A,B for one: those for all, and each one's own."""
    shared: list[str] = []
    own: dict[str, list[str]] = {}
    names: dict[str, Any] = {contender.name: [] for contender in contenders}
    for text in texts:
        # A contender's name may hold "=" itself.
        name, equals, values = text.rpartition("=")
        if equals:
            choose(name, names, f"{flag}: contender")
            own.setdefault(name, []).extend(values.split(","))
        else:
            shared += text.split(",")
    return shared, own


def _seeds(words: list[str], name: str | None = None) -> tuple[int, ...]:
    """Seeds, ascending, from words: those of the contender `name`, or of all."""
    said = f"--seeds={'' if name is None else f'{name}='}{','.join(words)}"
    if not all(word.isascii() and word.isdigit() and int(word) < 2**32 for word in words):
        raise ConfigError(f"{said}: use whole numbers from 0 to {2**32 - 1}, or NAME=0,1,2 for one contender")
    seeds = tuple(sorted(map(int, words)))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{said}: give each once")
    return seeds


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e9:
        raise ConfigError(f"--learning-rates={text!r}: use positive numbers, or NAME=1e-3,2e-3 for one contender")
    return rate
