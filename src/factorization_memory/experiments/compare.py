"""Models compared on equal terms: as many parameters, the same tokens in the same order, each at its own best learning rate.

A plan says everything that decides the result; it stands in `plan.json`, and a folder takes no other. Its trainings are jobs
(processes.py): for each contender short ones to choose the learning rate, then one for each seed. What they leave in their run
folders is read back into one record, `compare.json`:

schema_version   1
command, environment, threads
parallel         a list: how many runs could be under way at once with those of the seeds, each number once
shared           context_length, steps, tokens, seeds, search, evaluation, positions, corpus fingerprints, order (a digest of
                 what every contender reads, by seed)
contenders       a list: name, text, config (as trained, for the first seed), parameters, matching, learning_rate, seeds,
                 summary, tokens_per_second_alone, difference
complete         whether every run is there; failures: those that are not, each with its message

Losses are nats per token, and bits per byte of text. `context` is the loss in windows of the training context; `positions` that
of tokens that stand between half of so many training contexts and all of them, the memory carried on from the beginning.
Spread is the sample standard deviation over seeds. A difference is to the first contender that has seeds, seed by seed.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorization_memory.config import ConfigError, RunConfig, to_dict
from factorization_memory.evaluation.position import beyond_context
from factorization_memory.experiments.contenders import Contender
from factorization_memory.experiments.matching import Match, match_parameters, non_embedding_parameters
from factorization_memory.experiments.processes import MEMORY_NAME, Job, read_json

SCHEMA_VERSION = 2
PLAN_VERSION = 1
UNITS = ("loss", "bits_per_byte")
SAME_COMMAND_MAY_CHANGE = ("data.corpus", "data.read_ahead")
"""Fields left out of `plan.json`: where the corpus lies (its fingerprint tells which it is) and how it is read."""


@dataclass(frozen=True)
class Corpus:
    """What a comparison needs to know of its corpus."""

    folder: Path
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int


@dataclass(frozen=True)
class Entry:
    """A contender, made equally large and given the shared text and steps."""

    name: str
    text: str
    config: RunConfig
    match: Match
    rates: tuple[float, ...]
    """Learning rates to choose from, ascending."""

    @property
    def slug(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"[^\w.+=-]+", "-", self.name)


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a comparison finds."""

    folder: Path
    entries: tuple[Entry, ...]
    corpus: Corpus
    seeds: tuple[int, ...]
    search_seed: int
    search_steps: int
    alone_steps: int
    positions: tuple[int, ...]
    evaluation: dict[str, Any]
    order: dict[str, str]
    """Digest of the text that a training of each seed reads, by seed."""

    def description(self) -> dict[str, Any]:
        """The plan as JSON, to compare with another's."""
        contenders = {}
        for entry in self.entries:
            config = to_dict(entry.config)
            for name in SAME_COMMAND_MAY_CHANGE:
                section, _, field = name.partition(".")
                del config[section][field]
            contenders[entry.name] = {"learning_rates": list(entry.rates), **config}
        return {
            "schema_version": PLAN_VERSION,
            "contenders": contenders,
            "corpus": {"fingerprint": self.corpus.fingerprint, "tokenizer_fingerprint": self.corpus.tokenizer_fingerprint},
            "seeds": list(self.seeds),
            "search_seed": self.search_seed,
            "search_steps": self.search_steps,
            "alone_steps": self.alone_steps,
            "positions": list(self.positions),
            "evaluation": self.evaluation,
            "order": self.order,
        }

    def jobs(self) -> list[Job]:
        """The first jobs: of each contender its search, or its seeds where there is nothing to search."""
        return [job for entry in self.entries for job in (self.search_jobs(entry) or self.seed_jobs(entry))]

    def after(self, job: Job) -> list[Job]:
        """The jobs that can begin when `job` has ended: the seeds, after the last of a search."""
        entry = next(each for each in self.entries if each.name == job.contender)
        if job.kind != "search" or not all(each.done for each in self.search_jobs(entry)):
            return []
        return self.seed_jobs(entry)

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
        """One training for each seed at the chosen learning rate; none while that is not known."""
        rate = self.search(entry)["chosen"]
        if rate is None:
            return []
        optimizer = dataclasses.replace(entry.config.optimizer, learning_rate=rate)
        jobs = []
        for seed in self.seeds:
            training = dataclasses.replace(entry.config.training, seed=seed)
            config = dataclasses.replace(entry.config, optimizer=optimizer, training=training)
            jobs.append(self._job(entry, "seed", f"seed {seed}", f"seed-{seed}", config, self.evaluation))
        return jobs

    def alone_jobs(self) -> list[Job]:
        """One short training of each contender, to be run one after the other, for their tokens per second."""
        jobs = []
        for entry in self.entries if self.alone_steps else ():
            training = dataclasses.replace(
                entry.config.training, steps=self.alone_steps, evaluate_every=0, evaluation_tokens=1, checkpoint_every=0
            )
            config = dataclasses.replace(entry.config, training=training)
            jobs.append(self._job(entry, "alone", "alone", "alone", config))
        return jobs

    def search(self, entry: Entry) -> dict[str, Any]:
        """How the learning rate was chosen, as far as it is: `chosen` is None while a candidate is missing, or if all
        diverged."""
        jobs = self.search_jobs(entry)
        candidates: list[dict[str, Any]] = []
        for rate, job in zip(entry.rates, jobs, strict=True) if jobs else ():
            losses = _held_out(job.result())
            diverged = job.diverged or (job.done and losses["loss"] is None)
            candidates.append({"learning_rate": rate, **losses, "diverged": diverged, "folder": self._relative(job)})
        if not jobs:
            return {"chosen": entry.rates[0], "searched": False, "at_edge": None, "candidates": []}
        ready = all(job.done for job in jobs)
        rated = [candidate for candidate in candidates if candidate["loss"] is not None]
        best = min(rated, key=lambda candidate: candidate["loss"]) if ready and rated else None
        chosen = None if best is None else best["learning_rate"]
        at_edge = None if chosen is None else chosen in (entry.rates[0], entry.rates[-1])
        return {"chosen": chosen, "searched": True, "at_edge": at_edge, "candidates": candidates}

    def all_jobs(self) -> Iterator[Job]:
        """Every job that is known so far."""
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


def make_entries(
    contenders: Sequence[Contender],
    corpus: Corpus,
    rates: dict[str, tuple[float, ...]],
    match_to: str | int,
) -> tuple[Entry, ...]:
    """The contenders with the text and the steps of the first, as many parameters as `match_to` (one of them, or a number), and
    their learning rates.

    Raises ConfigError that names the contender that cannot be made so.
    """
    first = contenders[0].config
    target: int | None = match_to if isinstance(match_to, int) else None
    complete = []
    for contender in contenders:
        try:
            training = dataclasses.replace(
                first.training,
                micro_batch_size=contender.config.training.micro_batch_size, sample_every=0, keep_checkpoints=1,
            )  # fmt: skip
            config = dataclasses.replace(
                contender.config,
                name=contender.name,
                model=dataclasses.replace(contender.config.model, vocab_size=corpus.vocab_size),
                data=dataclasses.replace(first.data, corpus=str(corpus.folder)),
                training=training,
            )
        except ConfigError as error:
            raise ConfigError(f"contender {contender.name!r}: {error}") from None
        if config.optimizer.warmup_steps >= training.steps:
            raise ConfigError(
                f"contender {contender.name!r}: optimizer.warmup_steps={config.optimizer.warmup_steps}: use fewer than "
                f"training.steps={training.steps}, or train longer; all would be warm-up"
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
            raise ConfigError(f"contender {contender.name!r}: {error}") from None
        own = tuple(sorted(rates[contender.name]))
        config = dataclasses.replace(config, model=match.model)
        entries.append(Entry(contender.name, contender.text, config, match, own))
    slugs = [entry.slug for entry in entries]
    for entry in entries:
        if slugs.count(entry.slug) > 1:
            raise ConfigError(
                f"contender {entry.text!r}: another has the folder {entry.slug!r}; give each a name, as NAME=PRESET"
            )
    return tuple(entries)


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Name, old and new value of the first place in which two JSON documents differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            name = f"{path}.{key}" if path else key
            if key not in old or key not in new:
                return name, old.get(key), new.get(key)
            found = first_difference(old[key], new[key], name)
            if found is not None:
                return found
        return None
    return None if old == new else (path, old, new)


def make_record(plan: Plan) -> dict[str, Any]:
    """The comparison as far as it has come: all of `compare.json` but the command, the environment and how it was run."""
    contenders = [_contender_record(plan, entry) for entry in plan.entries]
    trained = [contender for contender in contenders if contender["seeds"]]
    for contender in contenders:
        other = contender in trained[1:]
        contender["difference"] = _difference(trained[0], contender) if other else None
    failures = _failures(plan)
    first = plan.entries[0].config
    return {
        "schema_version": SCHEMA_VERSION,
        "parallel": sorted({number for each in contenders for seed in each["seeds"] for number in seed["parallel"]}),
        "shared": {
            "context_length": first.data.context_length,
            "steps": first.training.steps,
            "tokens": first.training.steps * first.training.tokens_per_step,
            "tokens_per_step": first.training.tokens_per_step,
            "parameters": plan.entries[0].match.target,
            "seeds": list(plan.seeds),
            "search": {"steps": plan.search_steps, "seed": plan.search_seed},
            "alone_steps": plan.alone_steps,
            "evaluation": plan.evaluation,
            "positions": list(plan.positions),
            "corpus": str(plan.corpus.folder),
            "corpus_fingerprint": plan.corpus.fingerprint,
            "tokenizer_fingerprint": plan.corpus.tokenizer_fingerprint,
            "order": plan.order,
        },
        "contenders": contenders,
        "complete": not failures,
        "failures": failures,
    }


def _contender_record(plan: Plan, entry: Entry) -> dict[str, Any]:
    jobs = plan.seed_jobs(entry)
    # Those that failed stand in the record's failures.
    seeds = [_seed_record(plan, job) for job in jobs if job.done and not job.diverged and _finite(job)]
    embedding = entry.config.model.vocab_size * entry.config.model.hidden_size
    embedding *= 1 if entry.config.model.tie_word_embeddings else 2
    alone = next((job for job in plan.alone_jobs() if job.contender == entry.name), None)
    return {
        "name": entry.name,
        "text": entry.text,
        "config": to_dict(jobs[0].config if jobs else entry.config),
        "parameters": {
            "total": entry.match.parameters + embedding, "embedding": embedding, "non_embedding": entry.match.parameters,
        },
        "matching": {
            "varied": {name: {"from": old, "to": new} for name, (old, new) in entry.match.varied.items()},
            "target": entry.match.target,
            "difference": entry.match.difference,
        },
        "learning_rate": plan.search(entry),
        "seeds": seeds,
        "summary": _summary(seeds),
        "tokens_per_second_alone": None if alone is None or not alone.done else _tokens_per_second(alone),
    }  # fmt: skip


def _seed_record(plan: Plan, job: Job) -> dict[str, Any]:
    """The figures of one finished training."""
    evaluation = read_json(job.folder / "evaluation.json")
    result = job.result()
    assert result is not None
    context = {**evaluation["sources"], "all": evaluation["total"]}
    positions: dict[str, dict[str, Any]] = {}
    by_position: dict[str, list[dict[str, Any]]] = {}
    for source, read in evaluation.get("position", {}).items():
        for multiple in plan.positions:
            part = beyond_context(read, multiple)
            if part is not None:
                positions.setdefault(str(multiple), {})[source] = _picked(part, "start", "end", "tokens", *UNITS)
        by_position[source] = [_picked(each, "start", "end", "tokens", *UNITS) for each in read["bins"]]
    return {
        "seed": job.config.training.seed,
        "folder": job.folder.relative_to(plan.folder).as_posix(),
        "context": {source: _picked(part, "tokens", *UNITS) for source, part in context.items()},
        "positions": positions,
        "by_position": by_position,
        "tokens_per_second": _tokens_per_second(job),
        "seconds": result["seconds"],
        "memory": read_json(job.folder / MEMORY_NAME),
        "parallel": job.parallel(),
    }


def _finite(job: Job) -> bool:
    """Whether all figures of a finished training's evaluation are numbers; those that are not finite are written as null."""
    evaluation = read_json(job.folder / "evaluation.json")
    parts = [{unit: part[unit] for unit in UNITS} for part in (*evaluation["sources"].values(), evaluation["total"])]
    parts += [each for read in evaluation.get("position", {}).values() for each in read["bins"]]
    return all(value is not None for part in parts for value in part.values())


def _tokens_per_second(job: Job) -> float | None:
    """Median over the intervals of the log, the first left out where there are others: it holds what is done once."""
    rates = [line["tokens_per_second"] for line in job.metrics()]
    return statistics.median(rates[1:] or rates) if rates else None


def _held_out(result: dict[str, Any] | None) -> dict[str, float | None]:
    """Loss and bits per byte of all sources together, at the end of a training."""
    evaluation = None if result is None else result["evaluation"]
    if evaluation is None or evaluation["bits_per_byte"] is None:
        return {"loss": None, "bits_per_byte": None}
    parts = evaluation["sources"].values()
    loss = sum(part["loss"] * part["tokens"] for part in parts) / sum(part["tokens"] for part in parts)
    return {"loss": loss, "bits_per_byte": evaluation["bits_per_byte"]}


def _picked(part: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: part[name] for name in names}


def _places(seed: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every figure of a seed's record with its place, as ("context", "en") or ("positions", "4", "en")."""
    for source, part in seed["context"].items():
        yield ("context", source), part
    for multiple, sources in seed["positions"].items():
        for source, part in sources.items():
            yield ("positions", multiple, source), part
    for source, bins in seed["by_position"].items():
        for each in bins:
            yield ("by_position", source, f"{each['start']}-{each['end']}"), each


def _summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds of every figure, in the same places."""
    collected: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for seed in seeds:
        for place, part in _places(seed):
            collected.setdefault(place, []).append(part)
    summary: dict[str, Any] = {"n": len(seeds), "context": {}, "positions": {}, "by_position": {}}
    for place, parts in collected.items():
        if len(parts) < len(seeds):
            continue
        figures: dict[str, Any] = {unit: mean_and_spread([part[unit] for part in parts]) for unit in UNITS}
        if place[0] == "by_position":
            edges = _picked(parts[0], "start", "end", "tokens")
            summary["by_position"].setdefault(place[1], []).append({**edges, **figures})
        else:
            into = summary
            for key in place[:-1]:
                into = into.setdefault(key, {})
            into[place[-1]] = figures
    speeds = [seed["tokens_per_second"] for seed in seeds if seed["tokens_per_second"] is not None]
    peaks = [seed["memory"]["allocated_bytes"] for seed in seeds if seed["memory"] is not None]
    summary["tokens_per_second"] = statistics.median(speeds) if speeds else None
    summary["peak_memory_bytes"] = max(peaks, default=None)
    return summary


def mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; no spread of a single value."""
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def _difference(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`other` minus `first`, over the seeds that both have: mean and its standard error of each loss but those by position."""
    pairs = [(a, b) for a in first["seeds"] for b in other["seeds"] if a["seed"] == b["seed"]]
    difference: dict[str, Any] = {"n": len(pairs), "context": {}, "positions": {}}
    for place in dict.fromkeys(place for a, _ in pairs for place, _ in _places(a) if place[0] != "by_position"):
        parts = [(dict(_places(a)).get(place), dict(_places(b)).get(place)) for a, b in pairs]
        figures: dict[str, Any] = {}
        for unit in UNITS:
            values = [b[unit] - a[unit] for a, b in parts if a is not None and b is not None]
            if len(values) == len(pairs):
                spread = mean_and_spread(values)["spread"]
                error = None if spread is None else spread / math.sqrt(len(values))
                figures[unit] = {"mean": statistics.fmean(values), "standard_error": error}
        into = difference
        for key in place[:-1]:
            into = into.setdefault(key, {})
        if figures:
            into[place[-1]] = figures
    return difference


def _failures(plan: Plan) -> list[dict[str, Any]]:
    """What is missing: runs that failed, are not through, or could not begin."""
    failures = []
    for job in plan.all_jobs():
        failure = job.failure()
        # A search that diverged at some rate has found something.
        if not job.done or (job.diverged and job.kind != "search"):
            message = "not finished; the same command goes on with it" if failure is None else failure["message"]
        elif job.kind == "seed" and not _finite(job):
            message = "its evaluation is not finite"
        else:
            continue
        failures.append({"run": job.title, "folder": job.folder.relative_to(plan.folder).as_posix(), "message": message})
    for entry in plan.entries:
        search = plan.search(entry)
        if search["searched"] and search["candidates"] and all(each["diverged"] for each in search["candidates"]):
            message = "the training diverged at every learning rate; give smaller ones"
            failures.append({"run": entry.name, "folder": f"runs/{entry.slug}", "message": message})
    return failures
