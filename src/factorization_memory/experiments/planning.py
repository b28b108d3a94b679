"""From the settings of a comparison to its plan."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from factorization_memory.config import ConfigError
from factorization_memory.data.shards import PackedCorpus
from factorization_memory.evaluation.recall_suite import ITEMS, LENGTHS
from factorization_memory.experiments.comparison_settings import (
    ComparisonSettings,
    check,
    learning_rates,
    require_contender,
    training_seeds,
)
from factorization_memory.experiments.contenders import read_contender
from factorization_memory.experiments.evaluation import require_recall_texts
from factorization_memory.experiments.plan import Corpus, Plan, make_entries
from factorization_memory.experiments.reading_order import same_order


def make_plan(settings: ComparisonSettings, overrides: Mapping[str, str] = MappingProxyType({})) -> Plan:
    """The plan of a comparison, whose folder is `settings.out`.

    `overrides` are fields of a run that hold for all contenders, as text by name, like `{"training.steps": "200"}`.

    Raises ConfigError for what cannot be compared, CorpusError where there is no packed corpus, RuntimeError where contenders
    would read another text.
    """
    check(settings, overrides)
    contenders = [read_contender(text, overrides) for text in settings.contenders]
    names = [contender.name for contender in contenders]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"contender {name!r}: this name is used twice; give each its own, as NAME={name}")
    if settings.match_to is not None:
        require_contender(settings.match_to, names, "--match-to")
    rates = learning_rates(settings.learning_rates, contenders)
    seeds = training_seeds(settings.seeds, contenders)
    corpus = PackedCorpus.open(settings.corpus.resolve())
    if settings.recall:
        require_recall_texts(corpus, LENGTHS)
    if any(settings.search_seed in own for own in seeds.values()):
        raise ConfigError(f"search_seed={settings.search_seed}: also one of --seeds; choose a seed that is not")
    known = Corpus(corpus.folder, corpus.fingerprint, corpus.tokenizer.fingerprint, corpus.tokenizer.vocab_size)
    match_to = settings.parameters or settings.match_to or names[0]
    entries = make_entries(contenders, known, rates, seeds, match_to, settings.own_schedules)
    first = entries[0].config
    steps = first.training.steps
    search_steps = settings.search_steps or max(1, round(settings.search_fraction * steps))
    if search_steps > steps:
        raise ConfigError(f"search_steps={search_steps}: use at most training.steps={steps}")
    evaluation: dict[str, Any] = {
        "max_position": max(settings.positions, default=0) * first.data.context_length,
        "max_tokens": settings.max_tokens,
        "stretches": settings.stretches,
    }
    if settings.recall:
        evaluation["recall_items"] = ITEMS
    every = dict.fromkeys(seed for own in seeds.values() for seed in own)
    order = {str(seed): same_order(corpus, {each.name: each.config for each in entries}, seed) for seed in every}
    return Plan(
        settings.out,
        entries,
        known,
        settings.search_seed,
        search_steps,
        settings.alone_steps,
        settings.positions,
        evaluation,
        order,
    )
