"""Models that verbs take: the one that comes with the package, exported and imported ones."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from factorization_memory.cli import dispatch
from factorization_memory.cli.evaluate import EvaluateOptions
from factorization_memory.config import TrainingConfig
from factorization_memory.data.corpora import builtin_corpus
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation.recall_suite import ITEMS, LENGTHS
from factorization_memory.experiments.demo import PROMPTS
from factorization_memory.models.pretrained import builtin_model, card, load_pretrained
from factorization_memory.runs import load_model

TRAIN = [
    "--model.hidden-size", "16", "--model.num-layers", "1", "--data.context-length", "32", "--training.tokens-per-step", "64",
    "--training.steps", "2", "--training.evaluation-tokens", "64", "--training.evaluate-every", "0",
    "--training.sample-every", "0", "--training.device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text("It was a dark and stormy night.\n" * 200, encoding="utf-8")
    assert dispatch(["data", "pack", str(folder / "text.txt"), "--output", str(folder / "packed"), "--holdout", "tail"]) == 0
    assert dispatch(["train", "demo", "--data.corpus", str(folder / "packed"), "--run-dir", str(folder / "run"), *TRAIN]) == 0
    return folder / "run"


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """The result of a verb with --json, and what it told people."""
    capsys.readouterr()
    assert dispatch([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_the_model_of_the_package_writes(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert dispatch(["generate", "--prompt", "It was", "--prompt", "それは", "--max-tokens", "40", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "the one that comes with the package" in err
    english, japanese = out.split("\n--- 2 ---\n")
    assert english.startswith("It was")
    assert "ends with a space" not in err
    # It learned what the two languages are made of.
    assert len(re.findall(r"\b(?:the|and|of|to|a|in|was|I|he|it)\b", english[6:])) >= 1
    assert len(re.findall(r"[ぁ-んァ-ヶ一-龥]", japanese)) > 20
    result, err = called(capsys, "generate", "--prompt", "It was ", "--max-tokens", "2", "--device", "cpu")
    assert "note: prompt 'It was ' ends with a space" in err
    assert [one["prompt"] for one in result] == ["It was "]


def test_training_notes_a_sample_prompt_that_ends_in_a_space(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, packed = str(tmp_path / "words.json"), str(tmp_path / "packed")
    Tokenizer.train(["It was a dark and stormy night.\n" * 20], 300).save(Path(words))
    text = str(run_dir.with_name("text.txt"))
    assert dispatch(["data", "pack", text, "--output", packed, "--holdout", "tail", "--tokenizer", words]) == 0
    corpus = ["--data.corpus", packed, "--training.steps", "1"]
    prompts = ["--training.sample-prompts", "It was ", "It was"]
    for every, notes in (("1", 1), ("0", 0)):
        _, err = called(
            capsys, "train", "demo", *TRAIN, *corpus, "--run-dir", str(tmp_path / every), "--training.sample-every", every,
            *prompts,
        )  # fmt: skip
        assert err.count("ends with a space") == err.count("note: prompt 'It was ' ends with a space") == notes


def test_prompts_of_our_own_end_in_no_space() -> None:
    root = Path(__file__).parent.parent.parent
    texts = [(root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/walk.md", "docs/integration.md")]
    texts.append(inspect.getsource(card))
    quoted = [
        prompt for text in texts for prompt in re.findall(r"""(?:--prompt |encode\(|tokenizer\()["']([^"']*)["']""", text)
    ]
    assert len(quoted) > 3
    assert not [one for one in (*quoted, *PROMPTS, *TrainingConfig().sample_prompts) if one.endswith(" ")]


def test_the_model_of_the_package_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = called(
        capsys, "evaluate", "--max-tokens", "2000", "--max-position", "1024", "--stretches", "1", "--device", "cpu"
    )
    assert result["evaluated"]["checkpoint"] == "builtin"
    assert result["sources"].keys() == {"en", "ja"}
    # Of books that it has not read: far below the 8 bits of a guess, and below any n-gram of the demo's.
    for row in result["sources"].values():
        assert row["bits_per_byte"] < 2.0
    inspected, _ = called(
        capsys, "inspect", "--text", "It was dark.", "--output", str(tmp_path / "page.html"), "--device", "cpu"
    )
    assert len(inspected["layers"]) == load_pretrained(builtin_model()).config.num_layers


def test_defaults_are_those_of_the_suite() -> None:
    """The command line names them itself, so that it need not import the suite to say what they are."""
    assert (EvaluateOptions().recall_items, EvaluateOptions().recall_lengths) == (ITEMS, LENGTHS)


def test_the_model_of_the_package_is_asked_what_it_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--max-tokens", "500", "--max-position", "0", "--device", "cpu"]
    recall = ["--recall", "--recall-items", "1", "--recall-lengths", "256", "200000"]
    result, err = called(capsys, "evaluate", *options, *recall)
    tasks = result["recall_tasks"]
    assert tasks["needle"].keys() == {"en", "ja"}
    assert [tasks["needle"][name]["language"] for name in ("en", "ja")] == ["en", "ja"]
    assert result["evaluated"]["recall_items"] == 1
    assert result["evaluated"]["recall_lengths"] == [256, 200000]
    said = " ".join(err.split())
    for words in (
        "en, 4 hidden",
        "chance, among the values shown",
        "tokens of the stretch",
        "skipped: ja, haystacks of 200000 tokens",
    ):
        assert words in said
    capsys.readouterr()
    assert dispatch(["evaluate", *options, "--recall", "--recall-lengths", "200000"]) == 2
    assert "the shortest haystack needs 200000" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recall-items", "3"], "--recall-items: needs the recall suite; add --recall"),
        (["--recall-lengths", "99"], "--recall-lengths: needs the recall suite"),
        (["--recall", "--recall-items", "0"], "--recall-items=0: use 1 or more"),
        (["--recall", "--recall-lengths", "256", "0"], "--recall-lengths=256 0: use one or more"),
        (["--recall", "--harness", "hellaswag"], "--recall: applies to held-out text"),
    ],
)
def test_recall_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    capsys.readouterr()
    assert dispatch(["evaluate", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_model_of_the_package_is_small_and_described() -> None:
    folder = builtin_model()
    assert (folder / "model.safetensors").stat().st_size < 12e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    for words in ('license: "apache-2.0"', '- "en"', '- "ja"', "bits per byte", "## Limits"):
        assert words in card, words
    # Of the card's machine nothing but its processor, and no path of it.
    for path in folder.iterdir():
        for path_of_a_machine in (b"/home/", b"/tmp/", b"/root/", b"/work/"):
            assert path_of_a_machine not in path.read_bytes(), path.name
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    for path in builtin_corpus().rglob("*.txt"):
        text = path.read_text(encoding="utf-8")[:2000]
        assert len(tokenizer.encode(text)) < len(text.encode()) / 2.5


def test_exported_and_imported(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, back = str(tmp_path / "exported"), str(tmp_path / "back")
    result, err = called(capsys, "export", str(run_dir), folder, "--license", "mit")
    assert result["class"] == "FactorizationMemoryForCausalLM"
    assert result["bytes"] == sum(path.stat().st_size for path in Path(folder).iterdir())
    assert "--data" in err
    assert "--license" not in err
    result, _ = called(capsys, "import", folder, back)
    assert result["checkpoint"].endswith("step-00000002")
    texts = []
    for place in (str(run_dir), folder, back):
        written, _ = called(capsys, "generate", place, "--prompt", "It", "--max-tokens", "8", "--seed", "3", "--device", "cpu")
        texts.append(written[0]["text"])
    assert len(set(texts)) == 1
    scores = [
        called(capsys, "evaluate", place, "--corpus", str(run_dir.parent / "packed"), "--max-position", "0", "--device", "cpu")[
            0
        ]["total"]
        for place in (str(run_dir), folder, back)
    ]
    assert scores[0] == scores[1] == scores[2]
    assert not (Path(folder) / "evaluation.json").exists()
    tokens = torch.randint(0, 256, (1, 9))
    assert torch.equal(load_model(folder)[0](tokens)[0], load_model(run_dir)[0](tokens)[0])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["export", "{run}", "{exported}"], 2, "exported: already exists; choose another folder, or pass --overwrite"),
        (["export", "{tmp}/nowhere", "{tmp}/new"], 1, "no such folder; give a run folder"),
        (["import", "{tmp}/nowhere", "{tmp}/new"], 1, "no such folder; give one with config.json"),
        (["import", "{exported}", "{run}"], 2, "exists and is not empty"),
        (["import", "{run}", "{tmp}/new"], 1, "already a run, or part of one; use it as it is"),
        (["export", "{exported}", "{tmp}/new"], 1, "already an exported model; copy it"),
        (["export", "{run}", "{run}", "--overwrite"], 2, "not an exported model, so left unchanged"),
        (["export", "{run}", "{tmp}", "--overwrite"], 2, "not an exported model, so left unchanged"),
        (["export", "{run}", "{tmp}/new", "--max-shard-size", "0"], 2, "--max-shard-size='0': use a number of bytes"),
        (["export", "{run}", "{tmp}/new", "--license", "a | b"], 2, "license='a | b': use the hub's identifier"),
        (["evaluate", "{exported}", "--corpus", "{tmp}/nowhere"], 1, "give its new place with --corpus"),
        (["evaluate", "{exported}"], 1, "does not record its corpus; give one with --corpus"),
    ],
)
def test_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    exported = tmp_path / "exported"
    assert dispatch(["export", str(run_dir), str(exported)]) == 0
    capsys.readouterr()
    places = {"run": run_dir, "exported": exported, "tmp": tmp_path}
    assert dispatch([word.format(**places) for word in arguments]) == status
    err = capsys.readouterr().err
    assert (run_dir / "checkpoints").exists()
    assert message in " ".join(err.split())
    assert not (tmp_path / "new").exists()


HANGING = """
import sys, time
from factorization_memory.models.pretrained import export

def hang(*_):
    print("writing", flush=True)
    time.sleep(100)

export.save_shim = hang
from factorization_memory.cli import main
sys.argv = ["fmem", "export", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_export_leaves_nothing(run_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", HANGING, str(run_dir), str(tmp_path / "model")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "writing\n"
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    running.send_signal(number)
    assert running.wait(timeout=60) == 128 + number
    assert list(tmp_path.iterdir()) == []
    running.stdout.close()
