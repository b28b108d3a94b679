"""The results of a comparison, read back from its run folders: `compare.json`.

schema_version   2
command, environment, threads
parallel         a list: how many runs could be under way at once with those of the seeds, each number once
shared           context_length, steps, tokens, seeds, search, evaluation, positions, corpus fingerprints, order (a digest of
                 what every contender reads, by seed)
contenders       a list: name, text, config (as trained, for the first seed), parameters, matching, learning_rate,
                 planned_seeds, seeds (those that are there), summary, tokens_per_second_alone, difference
complete         whether every run is there; failures: those that are not, each with its message

Losses are nats per token, and bits per byte of text. `context` is the loss in windows of the training context; `recall` parts
its tokens by what the window held before (evaluation/recall.py), `distance` the repeated ones by how many tokens ago; `tasks`,
if asked for, are shares named right in the recall suite (evaluation/recall_suite.py); `positions` is the loss of tokens that
stand between half of so many training contexts and all of them, the memory carried on from the beginning.
Spread is the sample standard deviation over seeds. A difference is to the first contender that has seeds, seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from factorization_memory.config import to_dict
from factorization_memory.experiments.plan import Entry, Plan
from factorization_memory.experiments.run_figures import UNITS, is_finite, picked, seed_record, tokens_per_second
from factorization_memory.runs.comparison_record import (
    ComparisonFigures,
    ContenderRecord,
    Difference,
    MeanAndSpread,
    MissingRun,
    SeedRecord,
    Summary,
)

SCHEMA_VERSION = 2
FIGURES = (*UNITS, "accuracy")


def make_record(plan: Plan) -> ComparisonFigures:
    """The comparison so far: all of `compare.json` except the command, the environment and how it was run."""
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


def _contender_record(plan: Plan, entry: Entry) -> ContenderRecord:
    jobs = plan.seed_jobs(entry)
    # Failed runs are listed in the record's failures.
    seeds = [seed_record(job, plan.folder, plan.positions) for job in jobs if job.done and not job.diverged and is_finite(job)]
    embedding = entry.config.model.vocab_size * entry.config.model.hidden_size
    embedding *= 1 if entry.config.model.tie_word_embeddings else 2
    alone = next((job for job in plan.alone_jobs() if job.contender == entry.name), None)
    return {
        "name": entry.name,
        "text": entry.text,
        "config": to_dict(jobs[0].config if jobs else entry.config),
        "parameters": {
            "total": entry.match.parameters + embedding,
            "embedding": embedding,
            "non_embedding": entry.match.parameters,
        },
        "matching": {
            "varied": {name: {"from": old, "to": new} for name, (old, new) in entry.match.varied.items()},
            "target": entry.match.target,
            "difference": entry.match.difference,
        },
        "learning_rate": plan.search(entry),
        "planned_seeds": list(entry.seeds),
        "seeds": seeds,
        "summary": _summary(seeds),
        "tokens_per_second_alone": None if alone is None or not alone.done else tokens_per_second(alone),
    }


def _places(seed: SeedRecord) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every figure of a seed's record with its place, as ("context", "en") or ("positions", "4", "en")."""
    for source, part in seed["context"].items():
        yield ("context", source), part
    for multiple, sources in seed["positions"].items():
        for source, part in sources.items():
            yield ("positions", multiple, source), part
    for kind, parts in seed["recall"].items():
        for source, part in parts.items():
            yield ("recall", kind, source), part
    for name, parts in seed["distance"].items():
        for source, part in parts.items():
            yield ("distance", name, source), part
    for task, shares in seed["tasks"].items():
        for source, share in shares.items():
            yield ("tasks", task, source), share
    for source, bins in seed["by_position"].items():
        for each in bins:
            yield ("by_position", source, f"{each['start']}-{each['end']}"), each


def _summary(seeds: Sequence[SeedRecord]) -> Summary:
    """Mean and spread over seeds of every figure, in the same structure."""
    collected: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for seed in seeds:
        for place, part in _places(seed):
            collected.setdefault(place, []).append(part)
    summary: Any = {"n": len(seeds), "context": {}, "positions": {}, "by_position": {}}
    for place, parts in collected.items():
        if len(parts) < len(seeds):
            continue
        figures: dict[str, Any] = {
            unit: mean_and_spread([part[unit] for part in parts]) for unit in FIGURES if unit in parts[0]
        }
        if place[0] == "by_position":
            edges = picked(parts[0], "start", "end", "tokens")
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


def mean_and_spread(values: Sequence[float]) -> MeanAndSpread:
    """Mean and sample standard deviation; no spread of a single value."""
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def _difference(first: ContenderRecord, other: ContenderRecord) -> Difference:
    """`other` minus `first`, over the seeds that both have: mean and its standard error of each loss but those by position."""
    pairs = [(a, b) for a in first["seeds"] for b in other["seeds"] if a["seed"] == b["seed"]]
    difference: Any = {"n": len(pairs), "context": {}, "positions": {}}
    for place in dict.fromkeys(place for a, _ in pairs for place, _ in _places(a) if place[0] != "by_position"):
        parts = [(dict(_places(a)).get(place), dict(_places(b)).get(place)) for a, b in pairs]
        figures: dict[str, Any] = {}
        for unit in FIGURES:
            values = [b[unit] - a[unit] for a, b in parts if a is not None and b is not None and unit in a]
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


def _failures(plan: Plan) -> list[MissingRun]:
    """Missing runs: those that failed, are not finished, or could not start."""
    failures: list[MissingRun] = []
    for job in plan.all_jobs():
        failure = job.failure()
        # A search that diverged at some rate has found something.
        if not job.done or (job.diverged and job.kind != "search"):
            message = "not finished; run the same command again to continue" if failure is None else failure["message"]
        elif job.kind == "seed" and not is_finite(job):
            message = "evaluation gave NaN or infinity"
        else:
            continue
        failures.append({"run": job.title, "folder": job.folder.relative_to(plan.folder).as_posix(), "message": message})
    for entry in plan.entries:
        search = plan.search(entry)
        if search["searched"] and search["candidates"] and all(each["diverged"] for each in search["candidates"]):
            message = "training diverged at every learning rate; try lower ones"
            failures.append({"run": entry.name, "folder": f"runs/{entry.slug}", "message": message})
    return failures
