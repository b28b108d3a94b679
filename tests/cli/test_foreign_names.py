"""Names of sources are data: whatever stands in them is shown as it is, and does nothing on the way from texts to reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from factorization_memory.cli import dispatch
from factorization_memory.data.corpora import CorpusError, read_documents
from factorization_memory.runs import export_run

NAMES = ("[/red] [bold]a|b", "$x_{", "e\x1b[31mc\u202ed", "en-us", "長い" * 60, "<b>&amp;</b>", ":cat: `c` *d*")
TINY = [
    "--model.hidden-size", "16", "--model.num-layers", "1", "--model.num-states", "8", "--data.context-length", "32",
    "--training.tokens-per-step", "128", "--training.steps", "2", "--training.evaluate-every", "1",
    "--training.evaluation-tokens", "256", "--training.checkpoint-every", "2", "--training.device", "cpu",
]  # fmt: skip


def test_from_texts_to_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "some words of a text, and more\n" * 40, "language": name} for name in NAMES]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed, run = tmp_path / "packed", tmp_path / "run"
    assert dispatch(["data", "pack", str(tmp_path / "texts.jsonl"), "--output", str(packed), "--holdout", "tail"]) == 0
    assert dispatch(["train", "demo", *TINY, "--data.corpus", str(packed), "--run-dir", str(run)]) == 0
    assert dispatch(["evaluate", str(run), "--device", "cpu", "--max-position", "64"]) == 0
    said = capsys.readouterr().err
    assert "e\\x1b[31mc\\u202ed" in said
    for name in (NAMES[0], NAMES[1], NAMES[3]):
        assert said.count(name) >= 3
    assert not re.search("[\x1b\u202e]", said)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x1b\u202e]", page)
    assert "&lt;b&gt;&amp;amp;&lt;/b&gt;" in page
    assert "<b>&amp;</b>" not in page
    assert "$x_{: loss" in page
    export_run(run, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert 'language:\n- "en"\n' in head
    assert head.count('- "') == 1
    assert r"| \[/red\] \[bold\]a\|b | " in body
    assert r"| e\\x1b\[31mc\\u202ed |" in body


def test_language_that_is_no_text(tmp_path: Path) -> None:
    for value, shown in (({"code": "en"}, "{'code': 'en'}"), (["en", "ja"], "['en', 'ja']")):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words", "language": value}))
        with pytest.raises(CorpusError, match=r"a\.jsonl, line 1: 'language' = .*; write it as a string") as caught:
            list(read_documents(tmp_path / "a.jsonl"))
        assert shown in str(caught.value)


def test_source_with_a_dash_is_named_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 40)
    text = f"en-us={tmp_path / 'a.txt'}"
    assert dispatch(["data", "pack", text, "--output", str(tmp_path / "packed"), "--holdout", "tail", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["sources"]) == ["en-us"]


def test_errors_show_names_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["data", "pack", str(tmp_path / "a\x1b[31m\u202e.txt"), "--output", str(tmp_path / "packed")]) == 1
    said = capsys.readouterr().err
    assert "a\\x1b[31m\\u202e.txt" in said
    assert not re.search("[\x1b\u202e]", said)
