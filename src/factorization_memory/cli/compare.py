"""`fmem compare A B ...`: train models of equal size on the same text, each at its own learning rate, and compare them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from factorization_memory.cli.common import choose, emit, parse, write_aside
from factorization_memory.cli.compare_display import Display
from factorization_memory.cli.tables import table, wide_console
from factorization_memory.config import ConfigError, to_dict
from factorization_memory.experiments.contenders import Contender, read_contender, split_overrides

if TYPE_CHECKING:
    from rich.console import Console

    from factorization_memory.config import RunConfig
    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.experiments.compare import Plan
    from factorization_memory.experiments.processes import Job

PLAN_NAME, RECORD_NAME, TABLE_NAME, FIGURE_NAME = "plan.json", "compare.json", "compare.md", "compare.png"
SEARCHED_FACTORS = (0.5, 1.0, 2.0)
"""Learning rates that are tried where none are given, times the contender's own."""
CHECKED_STEPS = 3
WIDTH = 132
"""Of the tables where nobody's terminal sets it: six losses with their spreads beside a name."""


@dataclass(frozen=True)
class CompareOptions:
    """Compare models on equal terms: as many parameters outside the embedding, the same tokens in the same order, each at the
    best of several learning rates, over several seeds. Text and steps are those of the first contender. Any field of a run set
    by its flag (`fmem train PRESET --help` lists them) holds for all. The same command goes on where it was stopped."""

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


def run(arguments: list[str]) -> int:
    """`fmem compare`."""
    rest, overrides = split_overrides(arguments)
    options = parse(CompareOptions, rest, "compare")
    _check(options, overrides)
    plan = make_plan(options, overrides)
    people = wide_console()
    if not people.is_terminal:
        people.width = max(people.width, WIDTH)
    _show_plan(plan, people)
    if options.dry_run:
        emit(plan.description(), options.json)
        return 0
    from factorization_memory.training.guard import RunLock

    if not options.train and not (plan.folder / PLAN_NAME).exists():
        raise ConfigError(f"--out={plan.folder}: holds no comparison to make a record of; leave --no-train out to begin one")
    with RunLock(plan.folder):
        more = _keep_plan(plan)
        started, stopped = _work(plan, options, arguments, people) if options.train else (0, None)
        record = _record(plan, options, arguments, changed=more or started > 0 or not options.train)
    _show_record(record, people)
    emit(record, options.json)
    if stopped is not None:
        import signal

        people.print(f"stopped by {stopped}; the same command goes on from there", soft_wrap=True)
        return 128 + signal.Signals[stopped].value
    people.print(f"{options.out / TABLE_NAME}", soft_wrap=True)
    return 0 if record["complete"] else 1


def _check(options: CompareOptions, overrides: dict[str, str]) -> None:
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
    if any(options.search_seed in own for own in seeds.values()):
        raise ConfigError(
            f"--search-seed={options.search_seed}: it is one of --seeds; the learning rate must be chosen with another"
        )

    from factorization_memory.data.shards import PackedCorpus
    from factorization_memory.experiments.compare import Corpus, Plan, make_entries
    from factorization_memory.training import resolve_device

    opened = PackedCorpus.open(options.corpus.resolve())
    corpus = Corpus(opened.folder, opened.fingerprint, opened.tokenizer.fingerprint, opened.tokenizer.vocab_size)
    entries = make_entries(contenders, corpus, rates, seeds, options.parameters or options.match_to or names[0])
    first = entries[0].config
    if options.train:
        resolve_device(first.training.device)
    steps = first.training.steps
    search_steps = options.search_steps or max(1, round(options.search_fraction * steps))
    if search_steps > steps:
        raise ConfigError(f"--search-steps={search_steps}: use at most training.steps={steps}")
    evaluation = {
        "max_position": max(options.positions, default=0) * first.data.context_length,
        "max_tokens": options.max_tokens,
        "stretches": options.stretches,
    }
    every = dict.fromkeys(seed for own in seeds.values() for seed in own)
    order = {str(seed): same_order(opened, {each.name: each.config for each in entries}, seed) for seed in every}
    return Plan(
        options.out, entries, corpus, options.search_seed, search_steps, options.alone_steps, options.positions, evaluation,
        order,
    )  # fmt: skip


def learning_rates(texts: Sequence[str], contenders: Sequence[Contender]) -> dict[str, tuple[float, ...]]:
    """The candidates of each contender, from the words of `--learning-rates`."""
    shared: list[float] = []
    own: dict[str, list[float]] = {}
    names: dict[str, Any] = {contender.name: [] for contender in contenders}
    for text in texts:
        # A contender's name may hold "=" itself.
        name, equals, values = text.rpartition("=")
        if equals:
            choose(name, names, "--learning-rates: contender")
            own[name] = [_rate(value) for value in values.split(",")]
        else:
            shared += [_rate(value) for value in text.split(",")]
    rates = {}
    for contender in contenders:
        default = [contender.config.optimizer.learning_rate * factor for factor in SEARCHED_FACTORS]
        rates[contender.name] = tuple(sorted(set(own.get(contender.name) or shared or default)))
    return rates


def training_seeds(texts: Sequence[str], contenders: Sequence[Contender]) -> dict[str, tuple[int, ...]]:
    """The seeds of each contender, from the words of `--seeds`."""
    shared: list[str] = []
    own: dict[str, list[str]] = {}
    names: dict[str, Any] = {contender.name: [] for contender in contenders}
    for text in texts:
        # A contender's name may hold "=" itself.
        name, equals, values = text.rpartition("=")
        if equals:
            choose(name, names, "--seeds: contender")
            own.setdefault(name, []).extend(values.split(","))
        else:
            shared += text.split(",")
    return {contender.name: _seeds(own.get(contender.name) or shared, contender.name) for contender in contenders}


def _seeds(words: list[str], name: str) -> tuple[int, ...]:
    if not words:
        raise ConfigError(f"--seeds: {name!r} has none; give one or more for all, or as {name}=0,1")
    if not all(word.isascii() and word.isdigit() for word in words):
        raise ConfigError(f"--seeds={' '.join(words)!r}: use whole numbers from 0 on, or NAME=0,1,2 for one contender")
    seeds = tuple(map(int, words))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds={' '.join(words)!r}: give each once")
    return seeds


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e9:
        raise ConfigError(f"--learning-rates={text!r}: use positive numbers, or NAME=1e-3,2e-3 for one contender")
    return rate


def same_order(corpus: PackedCorpus, configs: dict[str, RunConfig], seed: int) -> str:
    """Digest of the text that the first steps and the last of a training with `seed` read, the same for every contender.

    Raises RuntimeError if it is not.
    """
    from factorization_memory.data.loader import BatchLoader

    digests: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, config in configs.items():
        steps = config.training.steps
        # The loader knows no more of a run than this.
        known = (config.data.__repr__(), config.sequences_per_step, config.micro_batch_size, config.training.carry_state, steps)
        if known not in digests:
            digest = hashlib.blake2b(digest_size=8)
            for step in sorted({*range(min(CHECKED_STEPS, steps)), steps - 1}):
                with BatchLoader(
                    corpus, dataclasses.replace(config.data, read_ahead=0), sequences_per_step=config.sequences_per_step,
                    micro_batch_size=config.micro_batch_size, carry_state=config.training.carry_state, seed=seed,
                    start_step=step,
                ) as loader:  # fmt: skip
                    batches = next(loader)
                # Packed sequences are laid out flat: the tokens in their order, however they are cut.
                for part in ("tokens", "targets"):
                    for batch in batches:
                        digest.update(getattr(batch, part).numpy().tobytes())
            digests[known] = digest.hexdigest()
        found[name] = digests[known]
    first, *others = found
    for name in others:
        if found[name] != found[first]:
            raise RuntimeError(f"contender {name!r}: it would not read the text in the order of {first!r}; nothing was trained")
    return found[first]


def _keep_plan(plan: Plan) -> bool:
    """Write the plan, or see that the folder holds it or one that it goes on from; returns whether it was written."""
    from factorization_memory.experiments.compare import first_difference, part_to_keep, with_defaults
    from factorization_memory.experiments.processes import read_json

    path = plan.folder / PLAN_NAME
    # Through JSON, which knows lists alone.
    own = json.loads(json.dumps(plan.description()))
    if path.exists():
        kept = with_defaults(read_json(path))
        difference = first_difference(kept, part_to_keep(kept, own))
        if difference is not None:
            name, old, new = difference
            raise ConfigError(
                f"--out={plan.folder}: holds another comparison, with {name or 'a plan'} = {_brief(old)} where this one has "
                f"{_brief(new)}; repeat its command (with more contenders or seeds, if you like), or choose another folder"
            )
        if first_difference(kept, own) is None:
            return False
    write_aside(path, json.dumps(own, ensure_ascii=False, indent=1))
    return True


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


def _work(plan: Plan, options: CompareOptions, arguments: list[str], people: Console) -> tuple[int, str | None]:
    """Run what is not done yet; returns the number of processes started, and the signal that stopped it. The record is
    written whenever a training of a seed has ended, so that what is there can be read whatever happens to the others."""
    import torch

    from factorization_memory.experiments.processes import run_jobs
    from factorization_memory.training.guard import GracefulStop

    started = 0
    gpus = visible_gpus(options.gpus)

    def keep(job: Job) -> None:
        if job.kind != "seed" or not job.done:
            return
        try:
            for name in (TABLE_NAME, FIGURE_NAME):  # of fewer runs; made again at the end
                (plan.folder / name).unlink(missing_ok=True)
            write_aside(plan.folder / RECORD_NAME, _as_json(_make_record(plan, options, arguments)))
        except Exception as error:  # the others must not end with it
            people.print(f"{plan.folder / RECORD_NAME}: not written yet: {error}", markup=False, soft_wrap=True)

    with GracefulStop() as stop, Display(people, keep) as display:
        for jobs, parallel in ((plan.jobs(), options.parallel), (plan.alone_jobs(), 1)):
            started += run_jobs(
                jobs, command, parallel=parallel, threads=threads(torch.get_num_threads(), parallel), gpus=gpus,
                then=plan.after, stop=lambda: stop.requested, watcher=display,
            )  # fmt: skip
        return started, stop.requested


def command(job_file: Path) -> list[str]:
    """The command line that works on a job."""
    return [sys.executable, "-m", "factorization_memory.cli.compare_run", str(job_file)]


def visible_gpus(count: int) -> list[str]:
    """The first `count` GPUs that this process sees, as CUDA_VISIBLE_DEVICES calls them; none where one is enough.

    Raises ConfigError where there are fewer.
    """
    import torch

    if count == 1:
        return []
    if (there := torch.cuda.device_count()) < count:
        raise ConfigError(f"--gpus={count}: this process sees {there}; use {max(1, there)}, or see to CUDA_VISIBLE_DEVICES")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(there)])[:count]


def threads(available: int, parallel: int) -> int:
    """CPU threads of each of `parallel` processes."""
    return max(1, available // parallel)


def _record(plan: Plan, options: CompareOptions, arguments: list[str], changed: bool) -> dict[str, Any]:
    """The record, written with its table and figure; the one on disk where nothing has changed since."""
    from factorization_memory.experiments.processes import read_json

    path = plan.folder / RECORD_NAME
    record, before = _make_record(plan, options, arguments), read_json(path)
    same_form = before is not None and before["schema_version"] == record["schema_version"]
    if same_form and not changed and before["failures"] == record["failures"]:
        _write_pages(plan.folder, before, again=False)
        return dict(before)
    _write_pages(plan.folder, record, again=True)
    # Last: with it, the comparison is there.
    write_aside(path, _as_json(record))
    return record


def _make_record(plan: Plan, options: CompareOptions, arguments: list[str]) -> dict[str, Any]:
    """The record as it stands, of values that JSON knows. Where nothing is trained, the machine that it names is that of the
    run that began last."""
    import torch

    from factorization_memory.experiments.processes import JOB_NAME, read_json
    from factorization_memory.experiments.record import make_record
    from factorization_memory.training import resolve_device
    from factorization_memory.training.record import describe_environment, strict_json

    made = make_record(plan)
    device, count = plan.entries[0].config.training.device, threads(torch.get_num_threads(), options.parallel)
    environment = describe_environment(resolve_device(device if options.train else "cpu"))
    if not options.train:
        found = [
            (read_json(job.folder / "environment.json"), read_json(job.folder / JOB_NAME))
            for job in plan.all_jobs()
            if job.done
        ]
        theirs, order = max(found, key=lambda each: (each[0] or {}).get("date", ""), default=(None, None))
        environment |= {name: value for name, value in (theirs or {}).items() if name in environment}
        count = (order or {}).get("threads", count)
    environment["command"] = ["fmem", "compare", *(each for each in arguments if each not in ("--no-train", "--no_train"))]
    record = {
        "schema_version": made.pop("schema_version"),
        "command": shlex.join(environment["command"]),
        "environment": environment,
        "threads": count,
        **made,
    }
    return dict(json.loads(strict_json(record)))


def _as_json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1)


def _write_pages(folder: Path, record: dict[str, Any], again: bool) -> None:
    """The record's figure, if it has one, and its table; without `again` only what is missing."""
    from factorization_memory.experiments.comparison_table import markdown

    page, picture = folder / TABLE_NAME, folder / FIGURE_NAME
    curves = {each["name"]: each["summary"]["by_position"] for each in record["contenders"]}
    drawable = any(curves.values())
    if drawable and (again or not picture.exists()):
        from factorization_memory.experiments.figures import comparison_curves, png

        figure = comparison_curves(curves, record["shared"]["context_length"])
        assert figure is not None
        png(figure, picture)
    if again or not page.exists():
        write_aside(page, markdown(record, figure=drawable))


def _show_plan(plan: Plan, people: Console) -> None:
    from factorization_memory.experiments.comparison_table import change, differing, seeds_text

    first = plan.entries[0].config
    tokens = first.training.steps * first.training.tokens_per_step
    people.print(
        f"{tokens:,} tokens each ({first.training.steps:,} steps, context {first.data.context_length:,}), "
        f"{seeds_text({entry.name: entry.seeds for entry in plan.entries})}; learning rates by {plan.search_steps:,} steps",
        soft_wrap=True,
    )
    shown = table("", "contender", "parameters", "off", "varied", "learning rates")
    for entry in plan.entries:
        varied = ", ".join(change(name, old, new) for name, (old, new) in entry.match.varied.items())
        rates = " ".join(f"{rate:g}" for rate in entry.rates)
        shown.add_row(entry.name, f"{entry.match.parameters:,}", f"{entry.match.difference:+.2%}", varied or "nothing", rates)
    people.print(shown)
    for sentence in differing({entry.name: to_dict(entry.config) for entry in plan.entries}):
        people.print(sentence, markup=False, soft_wrap=True)


def _show_record(record: dict[str, Any], people: Console) -> None:
    from factorization_memory.experiments.comparison_table import notes, tables

    for part in tables(record):
        people.print(f"\n{part.title}", soft_wrap=True)
        shown = table("", *part.columns)
        shown.columns[0].overflow = "fold"
        for row in part.rows:
            shown.add_row(*row)
        people.print(shown)
    for note in notes(record):
        people.print(note, markup=False, soft_wrap=True)
