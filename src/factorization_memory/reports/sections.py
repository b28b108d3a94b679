"""The parts of `report.html`, from a run's records to HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from factorization_memory._text import visible
from factorization_memory.reports.plotting import short
from factorization_memory.reports.recall_text import as_text, distances_as_text
from factorization_memory.runs.recall_names import KINDS

if TYPE_CHECKING:
    from factorization_memory.runs.evaluation_record import EvaluationRecord, KindLoss
    from factorization_memory.runs.recall_record import RecallDemoRecord
    from factorization_memory.runs.training_record import RunResult, SampleRecord

STYLE = """
header .note { font-size: 1.02rem; }
.facts { display: flex; flex-wrap: wrap; gap: .9rem 2.6rem; margin: 1.6rem 0 0; padding: 0; }
.facts div { display: flex; flex-direction: column-reverse; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.3rem; font-weight: 600; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; }
table.wide { width: 100%; }
th { text-align: right; font-weight: 500; font-size: .8rem; color: var(--soft); vertical-align: bottom; line-height: 1.35; }
td { text-align: right; white-space: nowrap; }
th, td { padding: .5rem 1rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
td.strong { font-weight: 700; }
.better { color: var(--good); }
.worse { color: var(--bad); }
figure { margin: 1rem 0 0; overflow-x: auto; }
figure svg { display: block; min-width: 36rem; max-width: 100%; height: auto; }
figcaption { color: var(--soft); max-width: 46rem; margin: .3rem 0 1.6rem; position: sticky; left: 0; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.4rem; margin: 1rem 0; }
.sample p { font: 1.06rem/1.85 var(--serif); white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.sample b { font-weight: 400; color: var(--accent); }
.sample small { display: block; margin-top: .6rem; color: var(--soft); font-size: .8rem; font-variant-numeric: tabular-nums; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: .5rem 3rem; align-items: start; }
.columns h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; }
.columns table { width: 100%; font-size: .84rem; }
.columns td { padding: .28rem 0; white-space: normal; overflow-wrap: anywhere; }
.columns td:first-child { color: var(--soft); white-space: nowrap; padding-right: 1rem; }
.columns td:last-child { font-family: var(--mono); font-size: .95em; }
"""

LEARNING_NOTE = (
    "Bits per byte against training tokens; lower is better. Grey is the training text (thin line: single steps); "
    "colours are held-out text, never seen in training."
)
RECALL_NOTE = (
    "Nats per token, and share of tokens, by what came earlier in the same window: the same token after the same predecessor "
    "(repeated), the predecessor, but only with other tokens after it (contradicted), or neither (new). A model that recalls "
    "what it has read does best on repeated tokens; below, these are split by how many tokens ago the pair last occurred."
)
CAPTIONS = {
    "recall-learning": (
        "Every few steps, both models are asked for the values of keys in sequences that neither was trained on. "
        "They differ in one thing: the associative form writes a value under the key before it, the paper's form under the "
        "value itself."
    ),
    "recall-reads": (
        "Each row is a key asked about again; a cell's colour shows how much of what the question reads from the memory was "
        "written at that token (P[t, s] for question t and token s, as a share of its row). "
        "The outlined cell is the value right after the key: if it is filled, the model can read the answer."
    ),
}
"""Captions of figures, by name."""
MEMORY_NOTE = (
    "Left: each layer's memory states, coloured by their share of all affinity; a red mark is a state that held-out text "
    "hardly ever selects. Right: how many tokens each state remembers (until it has decayed to 1/e); larger dots are states "
    "used more."
)


def _shown(text: str) -> str:
    """Text made safe for a page: it cannot act as HTML or affect how the text around it is displayed."""
    return escape(visible(text, keep="\n"))


def section(title: str, note: str, *content: str | None) -> str:
    """A section of the page; empty if all of `content` is missing."""
    shown = "\n".join(part for part in content if part)
    return f"<section>\n<h2>{_shown(title)}</h2>\n<p class='note'>{note}</p>\n{shown}\n</section>" if shown else ""


def header(
    config: dict[str, Any],
    environment: dict[str, Any],
    result: RunResult | None,
    evaluation: EvaluationRecord,
    metrics: list[dict[str, Any]],
) -> str:
    """The run's name, what was trained on what, and its main figures."""
    model = config["model"]
    last: dict[str, Any] = next((m for m in reversed(metrics) if m["kind"] == "train"), {})
    facts: list[tuple[str, str]] = []
    if evaluation.get("total"):
        facts.append(("held-out bits per byte", f"{evaluation['total']['bits_per_byte']:.3f}"))
    if result and result.get("parameters"):
        facts.append(("parameters", short(result["parameters"])))
    if last:
        facts.append(("training tokens", short(last["tokens"])))
        facts.append(("steps", f"{last['step']:,}"))
        facts.append(("time", _duration((result and result.get("seconds")) or last["seconds"])))
    if result and result.get("tokens_per_second"):
        facts.append(("training tokens per second", f"{result['tokens_per_second']:,.0f}"))
    where = environment.get("gpu") or environment.get("cpu") or ""
    sources = ", ".join(evaluation.get("sources", {}))
    note = (
        f"{_model(model)}, trained on sequences of {config['data']['context_length']:,} tokens"
        + (f" ({sources})" if sources else "")
        + (f" on {where}, {environment['date'][:10]}." if where and environment.get("date") else ".")
    )
    listed = "".join(f"<div><dt>{_shown(name)}</dt><dd>{_shown(value)}</dd></div>" for name, value in facts)
    title = f"<h1>{_shown(config['name'])}</h1>\n<p class='note'>{_shown(note)}</p>"
    return f"<header>\n{title}\n<dl class='facts'>{listed}</dl>\n</header>"


def _model(model: dict[str, Any]) -> str:
    """A model's kind and size, from its configuration."""
    form = f"top {model['top_k']} of {model['num_states']}" if model["top_k"] else f"{model['num_states']}"
    heads = f" in each of {model['num_heads']} heads" if model["num_heads"] > 1 else ""
    window = model["attention"]["sliding_window"]
    mixers = {
        "memory": f"{form} memory states{heads}",
        "attention": "attention" + (f" to the last {window:,} tokens" if window else ""),
        "mamba2": f"Mamba-2 with states of {model['mamba2']['state_size']}",
        "gated_deltanet": "Gated DeltaNet",
    }
    size = f"{model['num_layers']} layers of width {model['hidden_size']}"
    pattern = model["mixers"]
    if set(pattern) == {"memory"}:
        return f"A Factorization Memory language model: {size}, {mixers['memory']}"
    said = {kind: mixers.get(kind, kind) for kind in pattern}
    kinds = "; ".join(f"{pattern.count(kind)} of {len(pattern)} with {text}" for kind, text in said.items())
    return f"A language model: {size}, {said[pattern[0]] if len(said) == 1 else kinds}"


def headline(evaluation: EvaluationRecord) -> str:
    """Bits per byte of held-out text next to those of n-gram models, one row per source; empty without an evaluation."""
    if not evaluation.get("sources"):
        return ""
    ngram = evaluation.get("ngram")
    orders = [str(order) for order in ngram.get("orders", [])] if ngram else []
    names = {"2": "bigram", "3": "trigram"}
    head = ["", "this model", *(names.get(order, f"{order}-gram") for order in orders), "loss<br>nats per token", "perplexity"]
    head += ["held-out text"]
    rows = []
    listed = list(evaluation["sources"].items())
    for name, value in listed + ([("all", evaluation["total"])] if len(listed) > 1 else []):
        yardsticks: dict[str, float] = {}
        if ngram:
            yardsticks = ngram.get("total", {}) if name == "all" else ngram.get("sources", {}).get(name, {})
        cells = [f"<td>{_shown(name)}</td>", f"<td class='strong'>{value['bits_per_byte']:.3f}</td>"]
        for order in orders:
            mark = yardsticks[order]
            kind = "better" if value["bits_per_byte"] < mark else "worse"
            ratio = value["bits_per_byte"] / mark - 1
            cells.append(f"<td>{mark:.3f} <span class='{kind}'>{ratio:+.0%}</span></td>")
        cells += [f"<td>{value['loss']:.3f}</td>", f"<td>{value['perplexity']:,.1f}</td>", f"<td>{_size(value['bytes'])}</td>"]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f"Bits per byte of held-out text, read in windows of {evaluation['context_length']:,} tokens; lower is better."
    if ngram and orders:
        note += (
            f" The n-gram models over bytes (modified Kneser-Ney) are fitted to the same {_size(ngram['training_bytes'])} of "
            "training text; the percentages say how many more or fewer bits this model needs than they do."
        )
    header = "".join(f"<th>{cell}</th>" for cell in head)
    table = (
        f"<div class='table'><table class='wide'><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    return section("Held-out text", note, table)


def position_note(evaluation: EvaluationRecord) -> str:
    """What the figure of loss by position shows."""
    context = f"{evaluation.get('context_length', 0):,}"
    return (
        "Long stretches of held-out text are read from the start with the memory carried on, at constant cost per token. "
        f"The shaded part lies beyond the {context} tokens of a training sequence. Since different positions have different "
        "text, the fair comparison is the lower plot: the difference to reading the same tokens with the memory emptied every "
        f"{context} tokens, as in training; below zero, the carried memory predicts better. Band and bars are two standard "
        "errors, those of the bars over stretches if these vary more than their tokens; the table is in bits per byte."
    )


def position_table(evaluation: EvaluationRecord) -> str | None:
    """The loss far beyond the training context, with memory carried and restarted; None if not measured."""
    rows = []
    for name, result in evaluation.get("position", {}).items():
        for multiple, part in result["beyond"].items():
            difference = part["bits_per_byte"] - part["restarted_bits_per_byte"]
            kind = "better" if difference < 0 else "worse"
            error = part["gain_error"] * part["bits_per_byte"] / part["loss"]
            rows.append(
                f"<tr><td>{_shown(name)}</td><td>{multiple}×</td><td>{part['start']:,} – {part['end'] - 1:,}</td>"
                f"<td class='strong'>{part['bits_per_byte']:.3f}</td><td>{part['restarted_bits_per_byte']:.3f}</td>"
                f"<td><span class='{kind}'>{difference:+.3f}</span> ± {2 * error:.3f}</td><td>{part['tokens']:,}</td></tr>"
            )
    if not rows:
        return None
    head = ["", "times the<br>training context", "positions", "memory<br>carried on", "memory<br>restarted", "difference"]
    header = "".join(f"<th>{cell}</th>" for cell in [*head, "tokens"])
    return (
        f"<div class='table'><table class='wide'><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def recall_table(recall: dict[str, dict[str, KindLoss]]) -> str | None:
    """The loss by what the window contained before, and by distance; None without it."""
    if not recall:
        return None
    made = _rows(KINDS, {name: as_text(parts) for name, parts in recall.items()})
    headings, cells = distances_as_text(recall)
    return made + (_rows(headings, cells) if headings else "")


def recall_demo_note(record: RecallDemoRecord | None) -> str:
    """Description of the two models of the recall demonstration; empty without a record."""
    if not record:
        return ""
    one, other = (f"the {model['name']} (<code>update_lag={model['update_lag']}</code>)" for model in record["models"])
    return (
        f"Two small models of {record['models'][0]['parameters']:,} parameters each learned from scratch, in "
        f"{record['seconds']:.0f} seconds together, to name the value behind a key: a sequence shows {record['pairs']} keys, "
        "each followed by its value, and then asks for the keys again in another order. They are "
        f"{one} and {other}, which differ only in where a token writes: in the first, into the memory states that the previous "
        "token reads, so that a key finds what followed it; in the second, into the states that the token itself reads."
    )


def _rows(headings: Sequence[str], cells: dict[str, list[str]]) -> str:
    """A table with a row for each name."""
    header = "".join(f"<th>{heading}</th>" for heading in ("", *headings))
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in (_shown(name), *row))}</tr>" for name, row in cells.items())
    return f"<div class='table'><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>"


def samples(samples: list[SampleRecord]) -> str:
    """Prompts and the model's continuations."""
    cards = []
    for sample in samples:
        told = []
        if sample.get("tokens"):
            told.append(f"{len(sample['tokens']) if isinstance(sample['tokens'], list) else sample['tokens']:,} tokens")
        if sample.get("tokens_per_second"):
            told.append(f"{sample['tokens_per_second']:,.0f} tokens per second")
        small = f"<small>{', '.join(told)}</small>" if told else ""
        text = f"<b>{_shown(sample.get('prompt', ''))}</b>{_shown(sample.get('text', ''))}"
        cards.append(f"<div class='sample'><p>{text}</p>{small}</div>")
    note = "Text generated by the model, one token at a time, with a memory of constant size; the prompt is in colour."
    return section("Samples", note, *cards)


def configuration(config: dict[str, Any], environment: dict[str, Any]) -> str:
    """Environment and configuration, one table per part."""
    parts = {"Environment": environment} if environment else {}
    parts |= {name: values for name, values in config.items() if isinstance(values, dict)}
    tables = []
    for name, values in parts.items():
        rows = "".join(
            f"<tr><td>{_shown(key)}</td><td>{_shown(_plain(value))}</td></tr>"
            for key, value in values.items()
            if value not in (None, "", {}, []) and key != "earlier"
        )
        tables.append(f"<div><h3>{_shown(name.capitalize())}</h3><table>{rows}</table></div>")
    return section("Configuration", "Everything needed to repeat this run.", f"<div class='columns'>{''.join(tables)}</div>")


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02d} min" if hours else f"{minute} min {second:02d} s"
