"""Compares models on equal terms: equal parameters, the same tokens in the same order, each at its own best learning rate.

A plan has everything that determines the result. It is stored in `plan.json`; a folder accepts no other plan, except one that
adds contenders or seeds, which keeps what was trained. Its trainings are jobs (processes.py): for each contender short ones to
choose the learning rate, then one per seed. Their run folders are read back into one record (record.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorization_memory.config import ConfigError, RunConfig, to_dict
from factorization_memory.experiments.contenders import Contender
from factorization_memory.experiments.processes import Job
from factorization_memory.models.matching import (
    Match,
    fitting_target,
    match_parameters,
    non_embedding_parameters,
    reach,
)
from factorization_memory.runs.comparison_record import Candidate, CandidateLoss, Search
from factorization_memory.runs.training_record import RunResult

PLAN_VERSION = 2
SAME_COMMAND_MAY_CHANGE = ("data.corpus", "data.read_ahead")
"""Fields omitted from `plan.json`: the corpus's location (its fingerprint identifies it) and how it is read."""


SCHEDULE = ("schedule", "warmup_steps", "decay_fraction", "final_ratio")
"""Fields of `OptimizerConfig` that shape the learning rate over the steps: the same for all unless told otherwise."""


@dataclass(frozen=True)
class Corpus:
    """What a comparison needs to know about its corpus."""

    folder: Path
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int


def slug(name: str) -> str:
    """A contender's name as a folder name."""
    return re.sub(r"[^\w.+=-]+", "-", name)


@dataclass(frozen=True)
class Entry:
    """A contender, matched in size and with the shared text and steps."""

    name: str
    text: str
    config: RunConfig
    match: Match
    rates: tuple[float, ...]
    """Learning rates to choose from, ascending."""
    seeds: tuple[int, ...]
    """One training for each."""

    @property
    def slug(self) -> str:
        """Its name as a folder name."""
        return slug(self.name)


@dataclass(frozen=True)
class Plan:
    """Everything that determines the result of a comparison."""

    folder: Path
    entries: tuple[Entry, ...]
    corpus: Corpus
    search_seed: int
    search_steps: int
    alone_steps: int
    positions: tuple[int, ...]
    evaluation: dict[str, Any]
    order: dict[str, str]
    """Digest of the text that a training of each seed reads, by seed."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of all contenders, each once."""
        return tuple(dict.fromkeys(seed for entry in self.entries for seed in entry.seeds))

    def description(self) -> dict[str, Any]:
        """The plan as JSON, to compare with another's."""
        contenders = {}
        for entry in self.entries:
            config = to_dict(entry.config)
            for name in SAME_COMMAND_MAY_CHANGE:
                section, _, field = name.partition(".")
                del config[section][field]
            contenders[entry.name] = {"learning_rates": list(entry.rates), "seeds": list(entry.seeds), **config}
        return {
            "schema_version": PLAN_VERSION,
            "contenders": contenders,
            "corpus": {"fingerprint": self.corpus.fingerprint, "tokenizer_fingerprint": self.corpus.tokenizer_fingerprint},
            "search_seed": self.search_seed,
            "search_steps": self.search_steps,
            "alone_steps": self.alone_steps,
            "positions": list(self.positions),
            "evaluation": self.evaluation,
            "order": self.order,
        }

    def jobs(self) -> list[Job]:
        """The first jobs: each contender's search, or its seeds if there is nothing to search."""
        return [job for entry in self.entries for job in (self.search_jobs(entry) or self.seed_jobs(entry))]

    def after(self, job: Job) -> list[Job]:
        """The jobs that can start when `job` has ended: the seeds, after the last of a search."""
        entry = next(each for each in self.entries if each.name == job.contender)
        if job.kind != "search" or not all(each.done for each in self.search_jobs(entry)):
            return []
        return self.seed_jobs(entry)

    @property
    def total_steps(self) -> int:
        """Total optimizer steps of all trainings: searches, seeds, and those run alone."""
        each = [
            len(entry.seeds) * entry.config.training.steps
            + (len(entry.rates) * self.search_steps if len(entry.rates) > 1 else 0)
            + self.alone_steps
            for entry in self.entries
        ]
        return sum(each)

    def search_jobs(self, entry: Entry) -> list[Job]:
        """One short training for each learning rate, its schedule shortened as a whole; none for a single rate."""
        if len(entry.rates) < 2:
            return []
        training = dataclasses.replace(
            entry.config.training, steps=self.search_steps, seed=self.search_seed, evaluate_every=0, checkpoint_every=0
        )
        share = self.search_steps / entry.config.training.steps
        warmup = min(round(entry.config.optimizer.warmup_steps * share), self.search_steps - 1)
        jobs = []
        for rate in entry.rates:
            optimizer = dataclasses.replace(entry.config.optimizer, learning_rate=rate, warmup_steps=warmup)
            config = dataclasses.replace(entry.config, optimizer=optimizer, training=training)
            jobs.append(self._job(entry, "search", f"learning rate {rate:g}", f"search-{rate!r}", config))
        return jobs

    def seed_jobs(self, entry: Entry) -> list[Job]:
        """One training for each seed at the chosen learning rate; none until that is known."""
        rate = self.search(entry)["chosen"]
        if rate is None:
            return []
        optimizer = dataclasses.replace(entry.config.optimizer, learning_rate=rate)
        jobs = []
        for seed in entry.seeds:
            training = dataclasses.replace(entry.config.training, seed=seed)
            config = dataclasses.replace(entry.config, optimizer=optimizer, training=training)
            jobs.append(self._job(entry, "seed", f"seed {seed}", f"seed-{seed}", config, self.evaluation))
        return jobs

    def alone_jobs(self) -> list[Job]:
        """One short training of each contender, run one after the other, to measure tokens per second."""
        jobs = []
        for entry in self.entries if self.alone_steps else ():
            training = dataclasses.replace(
                entry.config.training, steps=self.alone_steps, evaluate_every=0, evaluation_tokens=1, checkpoint_every=0
            )
            config = dataclasses.replace(entry.config, training=training)
            jobs.append(self._job(entry, "alone", "alone", "alone", config))
        return jobs

    def search(self, entry: Entry) -> Search:
        """How the learning rate was chosen, as far as it is: `chosen` is None while a candidate is missing, or if all
        diverged."""
        jobs = self.search_jobs(entry)
        candidates: list[Candidate] = []
        for rate, job in zip(entry.rates, jobs, strict=True) if jobs else ():
            losses = _held_out(job.result())
            diverged = job.diverged or (job.done and losses["loss"] is None)
            candidates.append({"learning_rate": rate, **losses, "diverged": diverged, "folder": self._relative(job)})
        if not jobs:
            return {"chosen": entry.rates[0], "searched": False, "at_edge": None, "candidates": []}
        ready = all(job.done for job in jobs)
        rated = [(candidate["loss"], candidate["learning_rate"]) for candidate in candidates if candidate["loss"] is not None]
        chosen = min(rated, key=lambda each: each[0])[1] if ready and rated else None
        at_edge = None if chosen is None else chosen in (entry.rates[0], entry.rates[-1])
        return {"chosen": chosen, "searched": True, "at_edge": at_edge, "candidates": candidates}

    def all_jobs(self) -> Iterator[Job]:
        """Every job known so far."""
        for entry in self.entries:
            yield from self.search_jobs(entry)
            yield from self.seed_jobs(entry)
        yield from self.alone_jobs()

    def _job(
        self, entry: Entry, kind: Any, label: str, name: str, config: RunConfig, evaluation: dict[str, Any] | None = None
    ) -> Job:
        return Job(entry.name, kind, label, self.folder / "runs" / entry.slug / name, config, evaluation)

    def _relative(self, job: Job) -> str:
        return job.folder.relative_to(self.folder).as_posix()


def _what_fits(configs: Sequence[RunConfig], target: int) -> str:
    """Advice for an impossible size: the sizes contenders can have, and one that fits all."""
    ranges = "; ".join(f"{config.name} {least:,} to {most:,}" for config in configs for least, most in [reach(config.model)])
    number = fitting_target([config.model for config in configs], target)
    remedy = f"--parameters {number} fits all" if number is not None else "no size found that fits all; change depths or widths"
    return f". Reachable sizes: {ranges}; {remedy}"


def make_entries(
    contenders: Sequence[Contender],
    corpus: Corpus,
    rates: dict[str, tuple[float, ...]],
    seeds: dict[str, tuple[int, ...]],
    match_to: str | int,
    own_schedules: bool = False,
) -> tuple[Entry, ...]:
    """The contenders with the text and the steps of the first, as many parameters as `match_to` (one of them, or a number), and
    their learning rates and seeds.

    The shape of the learning rate over the steps (`SCHEDULE`) is the first's too, but for the fields that a contender's own
    text sets; `own_schedules` leaves each that of its preset.

    Raises ConfigError that names the contender that cannot be made so.
    """
    first = contenders[0].config
    target: int | None = match_to if isinstance(match_to, int) else None
    complete = []
    for contender in contenders:
        try:
            training = dataclasses.replace(
                first.training,
                micro_batch_size=contender.config.training.micro_batch_size,
                sample_every=0,
                keep_checkpoints=1,
            )
            config = dataclasses.replace(
                contender.config,
                name=contender.name,
                model=dataclasses.replace(contender.config.model, vocab_size=corpus.vocab_size),
                data=dataclasses.replace(first.data, corpus=str(corpus.folder)),
                training=training,
                optimizer=contender.config.optimizer
                if own_schedules
                else dataclasses.replace(
                    contender.config.optimizer,
                    **{
                        name: getattr(first.optimizer, name)
                        for name in SCHEDULE
                        if f"optimizer.{name}" not in contender.own_fields
                    },
                ),
            )
        except ConfigError as error:
            raise ConfigError(f"contender {contender.name!r}: {error}") from None
        if config.optimizer.warmup_steps >= training.steps:
            raise ConfigError(
                f"contender {contender.name!r}: optimizer.warmup_steps={config.optimizer.warmup_steps}: use fewer than "
                f"training.steps={training.steps}, or train longer; otherwise the whole run is warm-up"
            )
        complete.append(config)
        if contender.name == match_to:
            target = non_embedding_parameters(config.model)
    assert target is not None
    entries = []
    for contender, config in zip(contenders, complete, strict=True):
        try:
            match = match_parameters(config.model, target)
        except ConfigError as error:
            raise ConfigError(f"contender {contender.name!r}: {error}{_what_fits(complete, target)}") from None
        own = tuple(sorted(rates[contender.name]))
        config = dataclasses.replace(config, model=match.model)
        entries.append(Entry(contender.name, contender.text, config, match, own, seeds[contender.name]))
    slugs = [entry.slug for entry in entries]
    for entry in entries:
        if slugs.count(entry.slug) > 1:
            raise ConfigError(
                f"contender {entry.text!r}: another contender uses the folder {entry.slug!r}; name each, as NAME=PRESET"
            )
    return tuple(entries)


def _held_out(result: RunResult | None) -> CandidateLoss:
    """Loss and bits per byte over all sources at the end of a training."""
    evaluation = None if result is None else result["evaluation"]
    if evaluation is None or evaluation["bits_per_byte"] is None:
        return {"loss": None, "bits_per_byte": None}
    parts = evaluation["sources"].values()
    loss = sum(part["loss"] * part["tokens"] for part in parts) / sum(part["tokens"] for part in parts)
    return {"loss": loss, "bits_per_byte": evaluation["bits_per_byte"]}
