"""What a comparison is made of. The flags of `fmem compare` are the fields of this dataclass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from factorization_memory.config import ConfigError, suggestion
from factorization_memory.experiments.contenders import Contender

SEARCHED_FACTORS = (0.5, 1.0, 2.0)
"""Learning rates to try if none are given, as multiples of the contender's own."""


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """Models to compare on equal terms, on what text and how; `make_plan` of planning.py makes a plan of them."""

    contenders: tuple[str, ...]
    """Each a PRESET, PRESET:field=value,... (such as paper-sparse:model.top-k=8,model.num-heads=4) or a run's config.json;
    prefix NAME= to name it."""
    corpus: Path
    """Packed corpus."""
    out: Path
    """Folder of the comparison, for compare.json, compare.md, compare.png and runs/."""
    seeds: tuple[str, ...] = ("0", "1", "2")
    """Seeds to train every contender with; NAME=0,1,2 gives one contender its own."""
    learning_rates: tuple[str, ...] = ()
    """Rates to search: numbers for all contenders, NAME=1e-3,2e-3 for one; by default 0.5, 1 and 2 times each contender's own.
    A single rate is used without a search."""
    search_steps: int | None = None
    """Steps of the short trainings that choose the learning rate; by default set by --search-fraction."""
    search_fraction: float = 0.2
    """Steps of the short trainings, as a fraction of training.steps."""
    search_seed: int = 1000
    """Seed of the short trainings; must not be one of --seeds."""
    own_schedules: bool = False
    """Each contender keeps the warm-up and decay of its preset; by default all use the first's, except for fields that
    a contender's own text sets."""
    match_to: str | None = None
    """Contender whose number of parameters all others are matched to; by default the first."""
    parameters: int | None = None
    """Number of parameters outside the embedding to match all contenders to, instead of --match-to."""
    positions: tuple[int, ...] = (4, 16)
    """Multiples of the training context (powers of two) at which loss by position is reported; may be empty."""
    max_tokens: int | None = None
    """Held-out tokens of each source to measure the loss on; by default all."""
    stretches: int = 8
    """Stretches of text of each source to read for the loss by position."""
    recall: bool = False
    """Also run the recall suite on each trained model (see `fmem evaluate --recall`)."""
    parallel: int = 1
    """Number of trainings to run at the same time."""
    gpus: int = 1
    """Number of GPUs to spread them over."""
    alone_steps: int = 0
    """If positive, also train each contender alone for this many steps, to measure its tokens per second."""


def check(settings: ComparisonSettings, overrides: Mapping[str, str]) -> None:
    """Raises ConfigError for settings that no comparison can have, and for overrides of what has a setting of its own."""
    if len(settings.contenders) < 2:
        raise ConfigError(f"contenders={' '.join(settings.contenders)!r}: name two or more")
    for name, value, least in (
        ("parallel", settings.parallel, 1),
        ("gpus", settings.gpus, 1),
        ("stretches", settings.stretches, 1),
        ("alone_steps", settings.alone_steps, 0),
        ("max_tokens", settings.max_tokens, 1),
        ("search_steps", settings.search_steps, 1),
        ("parameters", settings.parameters, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: use {least} or more")
    if not 0 < settings.search_fraction <= 1:
        raise ConfigError(f"search_fraction={settings.search_fraction}: use 0 < fraction <= 1")
    for multiple in settings.positions:
        if multiple < 2 or multiple & (multiple - 1):
            raise ConfigError(f"positions={multiple}: use powers of two, 2 or more (the edges of the position bins)")
    if settings.match_to is not None and settings.parameters is not None:
        raise ConfigError(f"parameters={settings.parameters}: cannot be combined with --match-to; drop one of them")
    for field, remedy in (
        ("training.seed", "give the seeds with --seeds"),
        ("data.corpus", "name the corpus with --corpus"),
        ("optimizer.learning_rate", "give the candidates with --learning-rates"),
    ):
        if field in overrides:
            raise ConfigError(f"--{field.replace('_', '-')}={overrides[field]}: {remedy}")


def require_contender(name: str, names: Sequence[str], flag: str) -> None:
    """Raises ConfigError with the most similar of `names` if `name` is none of them."""
    if name not in names:
        raise ConfigError(f"{flag}: unknown contender {name!r}{suggestion(name, names)}")


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
            raise ConfigError(f"--seeds: no seed for {name!r}; give one or more for all, or {name}=0,1")
    return seeds


def _by_contender(texts: Sequence[str], contenders: Sequence[Contender], flag: str) -> tuple[list[str], dict[str, list[str]]]:
    """The words of a flag that takes A,B for all contenders and NAME=A,B for one: those for all, and each one's own."""
    shared: list[str] = []
    own: dict[str, list[str]] = {}
    names = [contender.name for contender in contenders]
    for text in texts:
        # A contender's name may hold "=" itself.
        name, equals, values = text.rpartition("=")
        if equals:
            require_contender(name, names, flag)
            own.setdefault(name, []).extend(values.split(","))
        else:
            shared += text.split(",")
    return shared, own


def _seeds(words: list[str], name: str | None = None) -> tuple[int, ...]:
    """Seeds, ascending, from words: those of the contender `name`, or of all."""
    said = f"seeds={'' if name is None else f'{name}='}{','.join(words)}"
    if not all(word.isascii() and word.isdigit() and int(word) < 2**32 for word in words):
        raise ConfigError(f"{said}: use whole numbers from 0 to {2**32 - 1}, or NAME=0,1,2 for one contender")
    seeds = tuple(sorted(map(int, words)))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{said}: has duplicates; give each once")
    return seeds


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e9:
        raise ConfigError(f"learning_rates={text!r}: use positive numbers, or NAME=1e-3,2e-3 for one contender")
    return rate
