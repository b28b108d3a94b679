from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from factorization_memory.config import ModelConfig, RunConfig, to_dict
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation import inspect_text, loss_by_position, recall_demo
from factorization_memory.evaluation.position import beyond_context
from factorization_memory.models import LanguageModel
from factorization_memory.models.routing import RoutingHealth
from factorization_memory.reports import ReportError, figures, plotting, write_report
from factorization_memory.reports.position_figures import position_curves

SECTIONS = [
    "Held-out text",
    "Learning",
    "Loss by position",
    "Recall",
    "Learning to recall",
    "Use of the memory",
    "The memory at work",
    "Samples",
    "Configuration",
]


@pytest.fixture(scope="module")
def records() -> dict[str, Any]:
    """The records of a small run, by file name."""
    tokenizer = Tokenizer.bytes_level()
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=258, hidden_size=16, num_layers=2, num_states=8, top_k=2, num_heads=2))
    tokens = torch.randint(97, 120, (300,))
    health = RoutingHealth(model)
    with torch.no_grad(), health.observe():
        model(tokens[None, :250])
    position = loss_by_position(model, [tokens.numpy()], tokenizer, context_length=16, max_position=256)
    position["beyond"] = {"16": beyond_context(position, 16)}
    loss = {"loss": 1.5, "perplexity": 4.48, "bits_per_byte": 2.164, "tokens": 1000, "bytes": 1000}
    metrics = [
        {"kind": "train", "step": s, "tokens": 100 * s, "loss": 5 / s, "bits_per_byte": 7 / s, "seconds": 1.0 * s}
        for s in range(1, 40)
    ]
    metrics += [
        {"kind": "evaluation", "step": s, "sources": {"en": loss, "ja": loss}, "bits_per_byte": 2.164} for s in (0, 20, 39)
    ]
    metrics += [{"kind": "routing", "step": 39, "layers": health.summary()}]
    metrics += [{"kind": "sample", "step": 39, "samples": [{"prompt": "It was ", "text": "the <end> of samples"}]}]
    return {
        "config.json": to_dict(RunConfig(name="small & quick", model=model.config)),
        "environment.json": {"date": "2026-01-02T03:04:05+00:00", "cpu": "Some CPU", "gpu": None, "command": ["fmem", "demo"]},
        "result.json": {"parameters": 1_234_567, "seconds": 3725.0, "tokens_per_second": 4321.0},
        "evaluation.json": {
            "context_length": 16,
            "sources": {"en": loss, "ja": loss},
            "total": loss,
            "ngram": {
                "orders": [3, 5],
                "training_bytes": 500_000,
                "sources": {"en": {"3": 2.5, "5": 2.0}, "ja": {"3": 2.6, "5": 2.1}},
                "total": {"3": 2.55, "5": 2.05},
            },
            "recall": {"en": {"repeated": loss, "new": {**loss, "loss": 2.5, "tokens": 3000}}},
            "position": {"en": position},
            "routing": health.summary(),
        },
        "inspection.json": inspect_text(model, tokenizer, "A cat. 猫。"),
        "recall_demo.json": recall_demo(2, pairs=2, every=1),
        "metrics.jsonl": metrics,
        "samples.json": [{"prompt": "それは", "text": "猫である。<script>", "tokens": 12, "tokens_per_second": 99.4}],
    }


def write(folder: Path, records: dict[str, Any], names: set[str]) -> Path:
    for name in names:
        values = records[name]
        text = "".join(json.dumps(v) + "\n" for v in values) if name.endswith("l") else json.dumps(values, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


class Balanced(HTMLParser):
    """Fails on elements that close in another order than they opened."""

    VOID = frozenset({"meta", "br", "use", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_whole_report(tmp_path: Path, records: dict[str, Any]) -> None:
    path = write_report(write(tmp_path, records, set(records)))
    html = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.html"
    assert headings(html) == SECTIONS
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    # Nothing is loaded from elsewhere: addresses are names of XML formats or stand inside the page.
    assert set(re.findall(r"(?:xlink:)?href=\"(.)", html)) <= {"#"}
    assert not re.search(r"<(?:link|img|iframe)|src=|@import|url\((?!#)", html)
    assert set(re.findall(r"https?://[^/\"]+", html)) <= {"http://www.w3.org"}
    assert "<h1>small &amp; quick</h1>" in html
    assert "猫である。&lt;script&gt;" in html
    assert "1 h 02 min" in html
    assert "1.23 M" in html
    assert "4,321" in html
    assert "2.500 <span class='better'>-13%</span>" in html
    assert "2.000 <span class='worse'>+8%</span>" in html
    assert "<td>1.500 (25%)</td><td></td><td>2.500 (75%)</td>" in html
    assert "12 tokens, 99 tokens per second" in html
    told = html.split("<h2>Learning to recall")[1].split("<h2>")[0]
    assert "the associative form (<code>update_lag=1</code>) and the paper's form (<code>update_lag=0</code>)" in told
    assert told.count("<figcaption>") == 2
    plots = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert plots == ["loss.png", "memory.png", "position.png", "recall-learning.png", "recall-reads.png"]
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in plots)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (set(), ["Configuration"]),
        ({"metrics.jsonl"}, ["Learning", "Use of the memory", "Samples", "Configuration"]),
        ({"evaluation.json"}, ["Held-out text", "Loss by position", "Recall", "Use of the memory", "Configuration"]),
        ({"recall_demo.json"}, ["Learning to recall", "Configuration"]),
        ({"inspection.json"}, ["The memory at work", "Configuration"]),
        ({"samples.json", "environment.json"}, ["Samples", "Configuration"]),
    ],
)
def test_sections_without_record_are_left_out(
    tmp_path: Path, records: dict[str, Any], names: set[str], expected: list[str]
) -> None:
    html = write_report(write(tmp_path, records, names | {"config.json"})).read_text(encoding="utf-8")
    assert headings(html) == expected


def test_samples_of_training_stand_in_for_missing_ones(tmp_path: Path, records: dict[str, Any]) -> None:
    html = write_report(write(tmp_path, records, {"config.json", "metrics.jsonl"})).read_text(encoding="utf-8")
    assert "the &lt;end&gt; of samples" in html


def test_a_metrics_line_cut_short_is_passed_over(tmp_path: Path, records: dict[str, Any]) -> None:
    write(tmp_path, records, {"config.json", "metrics.jsonl"})
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "tra')
    assert "Learning" in headings(write_report(tmp_path).read_text(encoding="utf-8"))


def test_an_evaluation_without_yardstick_or_positions(tmp_path: Path, records: dict[str, Any]) -> None:
    kept = {key: records["evaluation.json"][key] for key in ("context_length", "sources", "total")}
    write(tmp_path, {**records, "evaluation.json": kept}, {"config.json", "evaluation.json"})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert headings(html) == ["Held-out text", "Configuration"]
    assert "gram" not in html.split("<h2>Held-out text")[1].split("<h2>")[0]


def test_no_run_and_broken_records(tmp_path: Path, records: dict[str, Any]) -> None:
    with pytest.raises(ReportError, match=r"config\.json is missing"):
        write_report(tmp_path)
    write(tmp_path, records, {"config.json"})
    (tmp_path / "evaluation.json").write_text('{"sources": ', encoding="utf-8")
    with pytest.raises(ReportError, match=r"evaluation\.json: not JSON"):
        write_report(tmp_path)
    (tmp_path / "evaluation.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ReportError, match=r"evaluation\.json: JSON nested too deeply"):
        write_report(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    for line, message in (("[" * 100_000, "line 1: JSON nested too deeply"), ('{"step": 1}', "without 'kind' and 'step'")):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(ReportError, match=rf"metrics\.jsonl(,|:) .*{message}"):
            write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_figures_show_the_largest_of_many_sources(records: dict[str, Any]) -> None:
    (position,) = records["evaluation.json"]["position"].values()
    many = {f"s{i}": {**position, "bins": [{**b, "tokens": b["tokens"] + i} for b in position["bins"]]} for i in range(40)}
    figure = position_curves(many)
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    shown = [title.partition(":")[0] for title in titles if "memory carried on" in title]
    assert shown == [f"s{i}" for i in range(28, 40)]


def test_svg_follows_the_page_and_keeps_ids_apart(records: dict[str, Any]) -> None:
    metrics = records["metrics.jsonl"]
    figure = figures.loss_curve(metrics)
    assert figure is not None
    first, second = plotting.svg(figure, "one"), plotting.svg(figure, "two")
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", first)) <= ids[0]
    assert "var(--ink)" in first or "var(--soft)" in first
    assert "#59616c" not in first
    assert "var(--first)" in first
    assert "held-out" in first  # text stays text


def test_figures_without_data_are_none() -> None:
    assert figures.loss_curve([]) is None
    assert position_curves({}) is None
    assert figures.memory_use([], 16) is None
    assert figures.recall_curves(None) is None
    assert figures.recall_reads(None) is None


def test_the_difference_by_position_is_drawn_with_its_error(records: dict[str, Any]) -> None:
    result = records["evaluation.json"]["position"]["en"]
    bins = [{**b, "tokens": 1000, "bytes": 1000, "gain_stretch_error": 2 * b["gain_error"]} for b in result["bins"]]
    old = [{name: value for name, value in b.items() if name != "gain_stretch_error"} for b in bins]
    half_bars = []
    for each in (bins, old, [{**b, "gain_stretch_error": None} for b in bins]):
        figure = position_curves({"en": {**result, "bins": each}})
        assert figure is not None
        loss, difference = figure.axes
        assert len(loss.lines[0].get_xdata()) == len(bins)
        beyond = [b for b in bins if b["start"] >= result["context_length"]]
        points = next(c for c in difference.containers)
        expected = [b["bits_per_byte"] - b["restarted_bits_per_byte"] for b in beyond]
        assert list(points[0].get_ydata()) == expected
        segments = points[2][0].get_segments()
        half_bars.append([(segment[1][1] - segment[0][1]) / 2 for segment in segments])
    by_tokens = [2 * b["gain_error"] / math.log(2) for b in beyond]
    assert half_bars[0] == pytest.approx([2 * e for e in by_tokens])
    assert half_bars[1] == half_bars[2] == pytest.approx(by_tokens)


def test_each_question_shows_what_it_reads(records: dict[str, Any]) -> None:
    record = records["recall_demo.json"]
    figure = figures.recall_reads(record)
    assert figure is not None
    assert len(figure.axes) == 2
    for axes, model in zip(figure.axes, record["models"], strict=True):
        assert [text.get_text() for text in axes.get_xticklabels()] == record["tokens"]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["A?", "B?"]
        assert [text.get_text()[:9] for text in axes.texts] == [f"answers {answer}" for answer in model["answers"]]


def test_loss_curve_with_a_single_line() -> None:
    metrics = [{"kind": "train", "step": 1, "tokens": 100, "loss": 5.5, "bits_per_byte": 8.0}]
    assert figures.loss_curve(metrics) is not None


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1500, "1.5 k"), (1_234_567, "1.23 M"), (2e9, "2 B")])
def test_short_numbers(number: float, text: str) -> None:
    assert plotting.short(number) == text
