"""What `fmem data` says and returns, on small folders of text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from factorization_memory.cli import dispatch


@pytest.fixture
def packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "a.txt").write_text("some words\n" * 100)
    output = tmp_path / "packed"
    assert dispatch(["data", "pack", str(tmp_path / "a.txt"), "--output", str(output), "--holdout", "tail"]) == 0
    capsys.readouterr()
    return output


def test_verify(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["data", "verify", str(packed), "--json"]) == 0
    said = capsys.readouterr()
    assert "intact, 2 documents and 1,102 tokens" in said.err
    assert json.loads(said.out)["tokens"] == 1102
    file = next(packed.glob("*.train.tokens"))
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    assert dispatch(["data", "verify", str(packed)]) == 1
    said = capsys.readouterr()
    assert f"{file}: changed since it was packed" in said.err
    assert "pack the corpus again" in said.err


def test_pack_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    texts.mkdir()
    elsewhere.mkdir()
    (texts / "a.txt").write_text("some words\n" * 100)
    (elsewhere / "b.txt").write_text("other words\n" * 100)
    (texts / "linked").symlink_to(elsewhere)
    (texts / "lost.txt").symlink_to(tmp_path / "nowhere")
    for number in range(7):
        (texts / f"{number}.md").touch()
    command = ["data", "pack", str(texts), "--output", str(tmp_path / "packed"), "--holdout", "tail", "--json"]
    assert dispatch(command) == 0
    said = capsys.readouterr()
    assert f"skipped (a link that leads nowhere): {texts / 'lost.txt'}\n" in said.err
    assert f"{texts / '4.md'} and 2 more\n" in said.err
    result = json.loads(said.out)
    assert list(result["sources"]) == ["linked", "texts"]
    assert len(result["left_out"]["of another kind"]) == 7
    assert dispatch(["data", "tokenizer", str(texts), "--vocab-size", "270", "--output", str(tmp_path / "t.json")]) == 0
    assert capsys.readouterr().err.count("lost.txt") == 1


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some words\n" * 100)
    (tmp_path / "texts" / os.fsdecode(b"\xff.md")).touch()
    command = ["data", "pack", str(tmp_path / "texts"), "--output", str(tmp_path / "packed"), "--json", "--overwrite"]
    assert dispatch(command) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"of another kind": [f"{tmp_path}/texts/\\xff.md"]}
    folder = tmp_path / "texts" / os.fsdecode(b"\xfe")
    folder.mkdir()
    (folder / "b.txt").write_text("other words\n" * 100)
    assert dispatch(command) == 1
    assert "the source name '\\udcfe' is not UTF-8; rename" in capsys.readouterr().err


def test_recipe_of_the_readme_on_a_few_books(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, tokenizer = tmp_path / "my-texts", tmp_path / "tokenizer.json"
    for number in range(21):
        (texts / ("ja" if number < 2 else "en")).mkdir(parents=True, exist_ok=True)
        (texts / ("ja" if number < 2 else "en") / f"{number}.txt").write_text(f"book {number} and its words\n" * 50)
    assert dispatch(["data", "tokenizer", str(texts), "--vocab-size", "300", "--output", str(tokenizer)]) == 0
    packed = ["data", "pack", str(texts), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "packed"), "--json"]
    assert dispatch(packed) == 0
    said = capsys.readouterr()
    assert "holding out the end of every document: source " in said.err
    sources = json.loads(said.out)["sources"]
    assert {name: parts["validation"]["documents"] for name, parts in sources.items()} == {"en": 19, "ja": 2}
