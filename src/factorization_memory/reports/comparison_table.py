"""A comparison's record as tables for people: the same rows on a terminal and in `compare.md`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from factorization_memory._text import markdown_cell
from factorization_memory.runs.comparison_record import ComparisonRecord, ContenderRecord, MeanAndSpread
from factorization_memory.runs.recall_names import KINDS, distance_name, distance_ranges

TASKS = {"associative": "values", "needle": "needles", "copy": "copies"}
"""Tasks of the recall suite, with their names in the tables."""


@dataclass
class Table:
    """A titled table of text."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)


def tables(record: ComparisonRecord) -> list[Table]:
    """Losses; what the models are; differences to the first contender that has seeds; recall, also by distance, and its
    tasks; searches of the learning rate."""
    made = (
        _losses(record),
        _models(record),
        _differences(record),
        _recall(record),
        _distances(record),
        _tasks(record),
        _searches(record),
    )
    return [each for each in made if each.rows and len(each.columns) > 1]


def _extended(contender: ContenderRecord) -> str:
    """A contender's learning rates and one beyond the edge that its best is at, as `--learning-rates` takes them."""
    tried = sorted(each["learning_rate"] for each in contender["learning_rate"]["candidates"])
    if contender["learning_rate"]["chosen"] == tried[0]:
        tried = [tried[0] ** 2 / tried[1], *tried]
    else:
        tried = [*tried, tried[-1] ** 2 / tried[-2]]
    return f"{contender['name']}={','.join(f'{rate:g}' for rate in tried)}"


def notes(record: ComparisonRecord) -> list[str]:
    """Sentences needed to read the tables, then the failures."""
    shared, environment = record["shared"], record["environment"]
    context = shared["context_length"]
    said = [
        f"Every contender read the same {shared['tokens']:,} tokens in the same order ({shared['steps']:,} steps of "
        f"{shared['tokens_per_step']:,}, context {context:,}; {seeds_text(_planned(record))}). "
        "Losses are on held-out text; ± is the sample standard deviation over seeds. Parameters: blocks + embedding and head.",
    ]
    if shared["positions"]:
        said.append(
            "Nx: the loss on tokens between N/2 and N training contexts from the start of a text, read without a break."
        )
    for contender in record["contenders"]:
        varied, off = contender["matching"]["varied"], contender["matching"]["difference"]
        if varied:
            changes = ", ".join(change(name, each["from"], each["to"]) for name, each in varied.items())
            said.append(f"{contender['name']}: {changes}, which leaves {off:+.2%} parameters outside the embedding.")
        elif off:
            said.append(f"{contender['name']}: unchanged, {off:+.2%} parameters outside the embedding.")
    said += differing({each["name"]: each["config"] for each in record["contenders"]})
    if any(each["learning_rate"]["searched"] for each in record["contenders"]):
        said.append(
            "Learning rates were chosen on held-out text that the final losses are also measured on (part or all of it), the "
            "same for all contenders."
        )
    given = [each["name"] for each in record["contenders"] if not each["learning_rate"]["searched"]]
    if given:
        said.append(f"(given) The learning rate of {', '.join(given)} was not searched.")
    beyond = [each for each in record["contenders"] if each["learning_rate"]["at_edge"]]
    edged = [each["name"] for each in beyond]
    if edged:
        said.append(
            f"(edge) The best learning rate of {', '.join(edged)} is at the edge of the list: a better one may lie beyond it. "
            f"To look further, compare in another folder with --learning-rates {' '.join(map(_extended, beyond))}"
        )
    at_once = max(record["parallel"], default=1)
    if at_once > 1 and not shared["alone_steps"]:
        said.append(f"Tokens per second were measured with up to {at_once} runs at once; --alone-steps measures each alone.")
    where = environment["gpu"] or f"{environment['cpu']}, {record['threads']} thread(s) a run"
    said.append(f"{where}, torch {environment['torch']}, commit {environment['git_commit']}, {environment['date']}.")
    said += [f"NOT DONE: {failure['run']} ({failure['folder']}): {failure['message']}" for failure in record["failures"]]
    return said


def change(name: str, old: float, new: float) -> str:
    """A field changed by size matching, with the factor if it exceeds 2."""
    factor = max(old / new, new / old)
    return f"{name} from {old:g} to {new:g}" + (f" (a factor of {factor:.2f})" if factor > 2 else "")


def differing(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence on how contenders differ apart from model and learning rate, from their configurations as JSON; or none."""
    first = next(iter(configs.values()))
    places = [("optimizer", name) for name in first["optimizer"] if name != "learning_rate"] + [
        ("training", "micro_batch_size")
    ]
    found = []
    for section, name in places:
        values = {contender: config[section][name] for contender, config in configs.items()}
        if any(value != first[section][name] for value in values.values()):
            found.append(f"{section}.{name} ({', '.join(f'{contender} {value}' for contender, value in values.items())})")
    return [f"Contenders differ in {', '.join(found)}."] if found else []


def markdown(record: ComparisonRecord, figure: bool) -> str:
    """The text of `compare.md`; `figure` says whether `compare.png` exists."""
    parts = ["# Comparison", f"`{record['command']}`"]
    losses, models = _losses(record), _models(record)
    # A page is wider than a terminal: losses and models side by side.
    rows = [[name, *loss, *model] for (name, *loss), (_, *model) in zip(losses.rows, models.rows, strict=True)]
    joined = Table(losses.title, [*losses.columns, *models.columns[1:]], rows)
    others = [each for each in tables(record) if each.title not in (losses.title, models.title)]
    for table in (joined, *others):
        lines = [_row(table.columns), _row(["---", *["---:"] * (len(table.columns) - 1)])]
        parts.append("\n".join([f"{table.title}\n", *lines, *(_row(row) for row in table.rows)]))
    parts.append("\n".join(f"- {note}" for note in notes(record)))
    if figure:
        parts.append("![Loss by position](compare.png)")
    return "\n\n".join(parts) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(map(markdown_cell, cells)) + " |"


def _sources(record: ComparisonRecord) -> list[str]:
    found = [source for each in record["contenders"] for source in each["summary"]["context"]]
    return [source for source in dict.fromkeys(found) if source != "all"]


def _columns(record: ComparisonRecord) -> list[tuple[str, tuple[str, ...]]]:
    """Heading and path in a summary of every loss that the tables show."""
    context = record["shared"]["context_length"]
    places: list[tuple[str, tuple[str, ...]]] = []
    for source in _sources(record):
        places.append((f"{source} at {context:,}", ("context", source)))
    for multiple in record["shared"]["positions"]:
        places += [(f"{source} {multiple}x", ("positions", str(multiple), source)) for source in _sources(record)]
    return places


def _at(summary: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    for key in place:
        summary = summary.get(key, {})
    return summary or None


def seeds_text(seeds: Mapping[str, Sequence[int]]) -> str:
    """The seeds of contenders in readable form: "seeds 0, 1", or "seeds 0; best: 0, 1, 2" if they differ."""
    usual = statistics.mode(tuple(each) for each in seeds.values())
    own = [f"{name}: {', '.join(map(str, each))}" for name, each in seeds.items() if tuple(each) != usual]
    return "; ".join([f"seeds {', '.join(map(str, usual))}", *own])


def _planned(record: ComparisonRecord) -> dict[str, list[int]]:
    """The planned seeds of each contender; in older records, the same for all."""
    return {each["name"]: each.get("planned_seeds", record["shared"]["seeds"]) for each in record["contenders"]}


def _counted(record: ComparisonRecord, name: str, n: int, base: str | None = None) -> str:
    """A contender's name in front of means over `n` seeds, or of as many that `base` has too, which are said where they are not
    all, or not as many as another's."""
    planned = _planned(record)
    asked = len(set(planned[name]) & set(planned[base or name]))
    if n < asked:
        return f"{name} ({n} of {asked} seeds)"
    usual = {len(each) for each in planned.values()} == {asked}
    return name if usual else f"{name} ({n} seed{'s' if n > 1 else ''})"


def _losses(record: ComparisonRecord) -> Table:
    return _table(record, "Loss in nats per token", _columns(record))


def _recall(record: ComparisonRecord) -> Table:
    places = [
        (f"{source} {kind}", ("recall", kind, source))
        for source in _sources(record)
        for kind in KINDS
        if any(_at(contender["summary"], ("recall", kind, source)) for contender in record["contenders"])
    ]
    title = (
        "Loss by what came earlier in the window: token and predecessor (repeated), the predecessor followed only by others "
        "(contradicted), neither (new)"
    )
    return _table(record, title, places)


def _distances(record: ComparisonRecord) -> Table:
    places = [
        (f"{source} {name}", ("distance", name, source))
        for source in _sources(record)
        for name in (distance_name(*part) for part in distance_ranges())
        if any(_at(contender["summary"], ("distance", name, source)) for contender in record["contenders"])
    ]
    return _table(record, "Loss of repeated tokens by how many tokens ago they last followed that predecessor", places)


def _tasks(record: ComparisonRecord) -> Table:
    found = [
        (task, source)
        for contender in record["contenders"]
        for task, shares in contender["summary"].get("tasks", {}).items()
        for source in shares
    ]
    places = [(f"{TASKS[task]}, {source}", ("tasks", task, source)) for task, source in dict.fromkeys(found)]
    title = "Share correct in recall tasks, over all sizes: by choice for the first two, token by token for copies"
    return _table(record, title, places, "accuracy")


def _table(record: ComparisonRecord, title: str, places: Sequence[tuple[str, tuple[str, ...]]], unit: str = "loss") -> Table:
    """A row of losses, or of another unit, per contender, from the given paths of its summary and their headings."""
    table = Table(title, ["contender", *(heading for heading, _ in places)])
    for contender in record["contenders"]:
        losses = [_figure(_at(contender["summary"], (*place, unit))) for _, place in places]
        table.rows.append([_counted(record, contender["name"], contender["summary"]["n"]), *losses])
    return table


def _models(record: ComparisonRecord) -> Table:
    sources = _sources(record)
    memory = any(each["summary"]["peak_memory_bytes"] for each in record["contenders"])
    columns = ["contender", "parameters", "learning rate", "tokens/s", *(["peak memory"] if memory else [])]
    table = Table("Models; bits per byte in windows of the training context", [*columns, *(f"{s} bits/byte" for s in sources)])
    for contender in record["contenders"]:
        summary, rate, parameters = contender["summary"], contender["learning_rate"], contender["parameters"]
        mark = " (edge)" if rate["at_edge"] else "" if rate["searched"] else " (given)"
        chosen = "" if rate["chosen"] is None else f"{rate['chosen']:g}{mark}"
        speed = contender["tokens_per_second_alone"] or summary["tokens_per_second"]
        peak = summary["peak_memory_bytes"]
        table.rows.append(
            [
                _counted(record, contender["name"], summary["n"]),
                f"{parameters['non_embedding'] / 1e6:.2f} M + {parameters['embedding'] / 1e6:.2f} M",
                chosen,
                "" if speed is None else f"{speed:,.0f}",
                *([("" if peak is None else f"{peak / 1e9:.2f} GB")] if memory else []),
                *(_figure(_at(summary, ("context", source, "bits_per_byte"))) for source in sources),
            ]
        )
    return table


def _differences(record: ComparisonRecord) -> Table:
    places = _columns(record)
    base = next((each["name"] for each in record["contenders"] if each["seeds"]), "none")
    title = f"Difference to {base} in nats per token, seed by seed; ± is the standard error"
    table = Table(title, ["contender", *(heading for heading, _ in places)])
    for contender in record["contenders"]:
        if contender["difference"] is None or not contender["difference"]["n"]:
            continue
        cells = []
        for _, place in places:
            difference = _at(contender["difference"], (*place, "loss"))
            cells.append("" if difference is None else _signed(difference["mean"], difference["standard_error"]))
        table.rows.append([_counted(record, contender["name"], contender["difference"]["n"], base), *cells])
    return table


def _searches(record: ComparisonRecord) -> Table:
    search = record["shared"]["search"]
    title = f"Learning-rate search: held-out loss after {search['steps']:,} steps, seed {search['seed']}"
    searched = [each for each in record["contenders"] if each["learning_rate"]["searched"]]
    rates = sorted({each["learning_rate"] for contender in searched for each in contender["learning_rate"]["candidates"]})
    table = Table(title, ["contender", *(f"{rate:g}" for rate in rates)])
    for contender in searched:
        candidates = {each["learning_rate"]: each for each in contender["learning_rate"]["candidates"]}
        cells = []
        for rate in rates:
            candidate = candidates.get(rate)
            if candidate is None:
                cells.append("")
            elif candidate["loss"] is None:
                cells.append("diverged" if candidate["diverged"] else "not done")
            else:
                cells.append(f"{candidate['loss']:.4f}")
        table.rows.append([contender["name"], *cells])
    return table


def _figure(figure: MeanAndSpread | None) -> str:
    if figure is None:
        return ""
    return f"{figure['mean']:.4f}" + ("" if figure["spread"] is None else f" ± {figure['spread']:.4f}")


def _signed(mean: float, error: float | None) -> str:
    return f"{mean:+.4f}" + ("" if error is None else f" ± {error:.4f}")
