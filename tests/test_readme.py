"""The README's snippets run, its commands work as written, and what it names is there."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from factorization_memory.cli import demo, dispatch
from factorization_memory.models.pretrained import builtin_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = [
    "--model.hidden-size", "16", "--model.num-layers", "1", "--data.context-length", "32", "--training.tokens-per-step", "64",
    "--training.steps", "2", "--training.evaluation-tokens", "64", "--training.evaluate-every", "0",
    "--training.sample-every", "0",
]  # fmt: skip


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_snippets(number: int) -> None:
    names: dict[str, object] = {}
    exec(blocks("python")[number], names)
    shapes = {"y": (2, 1000), "logits": (1, 512), "written": (2,)}
    (found,) = shapes.keys() & names.keys()
    assert tuple(names[found].shape)[: len(shapes[found])] == shapes[found]


def test_the_engine_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "integration.md").read_text(encoding="utf-8")
    (snippet,) = (block for block in blocks("python", page) if "Engine(" in block)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert [len(names["texts"][slot]) for slot in names["slots"]] == [40, 40, 30]
    assert names["engine"].running == []
    assert len(capsys.readouterr().out) > 100


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_fmem_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From files to a model to text, the README's lines one after the other; training is made short by flags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-texts").mkdir()
    for number in range(30):
        text = "".join(f"Line {line} of text {number}. これは{line}行目です。\n" for line in range(40))
        (tmp_path / "my-texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    run = [words[1:] for words in commands() if words[0] == "fmem"]
    assert [words[0] for words in run] == [
        "data",
        "data",
        "plan",
        "train",
        "evaluate",
        "generate",
        "inspect",
        "export",
        "compare",
    ]
    short = {"train": TINY, "compare": ["--dry-run"]}
    for words in run:
        assert dispatch([*words, *short.get(words[0], [])]) == 0, words
    assert capsys.readouterr().out.startswith("It was")
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
    assert (tmp_path / "inspection.html").exists()
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_make_targets() -> None:
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert targets == ["demo", "test"]
    for target in [*targets, "lint", "format"]:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo`, a few steps of it: everything that it leaves is there, and its results are those of the files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "RECALL_STEPS", 8)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert dispatch(["demo", "--steps", "3", "--json", "--device", "cpu"]) == 0
    (tmp_path / "runs" / "demo-2").rename(tmp_path / "run")
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert {"en", "ja"} == result["evaluation"]["sources"].keys() == result["evaluation"]["ngram"]["sources"].keys()
    assert result["evaluation"]["position"]["en"]["max_position"] >= 16 * 256 - 1
    assert [sample["tokens"] for sample in result["samples"]] == [100, 100]
    assert result["samples"][0]["prompt"] in err
    order = ["text to tokens", "training", "evaluation", "generated", "recall", "report"]
    assert re.findall(r"^─+ [1-6]  (text to tokens|\w+)", err, re.MULTILINE) == order
    assert "associative form (update_lag=1)" in err
    last = err.partition("next:")[2]
    commands_of = [line.split() for line in last.strip().splitlines()]
    assert commands_of[0][:2] == ["open", "runs/demo-2/report.html"]
    assert commands_of[1][:4] == ["fmem", "generate", "runs/demo-2", "--prompt"]
    assert commands_of[2][:3] == ["fmem", "data", "pack"]
    assert json.loads((tmp_path / "run" / "recall_demo.json").read_text(encoding="utf-8")) == result["recall"]
    assert result["recall"]["models"][0]["step"] == [4, 8]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8")) == result["evaluation"]
    for name in ("report.html", "plots/loss.png", "plots/position.png", "plots/memory.png", "inspection.json", "samples.json"):
        assert (tmp_path / "run" / name).stat().st_size > 1000 or name == "samples.json", name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_walk_is_true() -> None:
    """Every file that docs/walk.md names is there, and has what the walk says is in it."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.*?) \|", (ROOT / "docs" / "walk.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 20
    for name, what in rows:
        tree = ast.parse((ROOT / "src" / "factorization_memory" / name).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        named = re.findall(r"`([A-Za-z_]+(?:\.\w+)?)`", what)
        assert any(each.rpartition(".")[2] in defined for each in named), f"{name}: none of {named} is defined there"


def test_the_map_is_true() -> None:
    listed = re.findall(r"^  (\w+)/ ", README, re.MULTILINE)
    package = ROOT / "src" / "factorization_memory"
    assert set(listed) == {p.parent.name for p in package.glob("[!_]*/__init__.py")}


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples(script: Path, tmp_path: Path) -> None:
    arguments: list[str] = []
    if script.name == "train_from_python.py":
        (tmp_path / "text.txt").write_text("It was a dark and stormy night.\n" * 100, encoding="utf-8")
        arguments = [str(tmp_path / "text.txt"), "3"]
    if script.name == "fine_tune_with_trl.py":
        (tmp_path / "data.jsonl").write_text('{"prompt": "It was", "completion": " dark."}\n' * 16, encoding="utf-8")
        arguments = [str(builtin_model()), str(tmp_path / "data.jsonl"), "2"]
    if script.name == "associative_recall.py":
        arguments = ["--steps", "2", "associative"]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "False" not in done.stdout
    assert done.stdout.strip()
    assert script.name in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


def test_no_placeholder_is_left() -> None:
    for path in PAGES:
        assert not re.search(r"\b[A-Z]+_NUMBERS\b|TODO|TBD", path.read_text(encoding="utf-8")), path.name


def test_results_are_where_their_table_says() -> None:
    table = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w-]+)/` \|", table, re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "results").iterdir() if path.is_dir()}
    for name in listed:
        assert any((ROOT / "results" / name).iterdir()), name


def test_results_hold_no_code() -> None:
    """A script beside a record goes on changing while the record does not."""
    assert not [*(ROOT / "results").rglob("*.py")]
