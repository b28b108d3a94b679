from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from factorization_memory.config import RunConfig, TrainingConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.runs.record import RunFolderError, RunRecord, describe_environment, strict_json


def test_a_begun_run_is_recorded_whole(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    assert not record.exists
    config = RunConfig(name="x", training=TrainingConfig(steps=7))
    record.begin(config, Tokenizer.bytes_level(), torch.device("cpu"))
    assert record.exists
    assert record.read_config() == config
    assert Tokenizer.load(tmp_path / "tokenizer.json").fingerprint == Tokenizer.bytes_level().fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "environment.json", "tokenizer.json"]


@pytest.mark.parametrize(
    ("started", "named"),
    [("/bin/fmem", "fmem"), ("/src/factorization_memory/cli/__main__.py", "fmem"), ("/x/run.py", "run.py")],
)
def test_environment_names_the_program_as_one_types_it(monkeypatch: pytest.MonkeyPatch, started: str, named: str) -> None:
    monkeypatch.setattr("sys.argv", [started, "train", "demo"])
    assert describe_environment(torch.device("cpu"))["command"] == [named, "train", "demo"]


def test_environment_names_what_a_reader_needs_and_keeps_earlier_parts(tmp_path: Path) -> None:
    environment = describe_environment(torch.device("cpu"))
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["cpu"]
    assert environment["gpu"] is None
    assert environment["command"]
    record = RunRecord(tmp_path)
    record.begin(RunConfig(), Tokenizer.bytes_level(), torch.device("cpu"))
    record.begin(RunConfig(), Tokenizer.bytes_level(), torch.device("cpu"), resumed_at=5)
    record.begin(RunConfig(), Tokenizer.bytes_level(), torch.device("cpu"), resumed_at=9)
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["resumed_at_step"] == 9
    assert [part.get("resumed_at_step") for part in written["earlier"]] == [None, 5]


def test_metrics_past_a_step_are_cut_and_a_torn_line_goes(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step in (1, 2, 3, 4):
        record.append("train", {"step": step, "loss": 0.1 * step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    record.cut_after(2, 2)
    record.append("evaluation", {"step": 3})
    record.cut_after(3, 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("evaluation", 3)]
    assert lines[1]["loss"] == 0.2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "line 2: JSON nested too deeply; remove that line"),
        ('{"kind": "train", "step": 2, "name": "\\ud800"}', r"line 2: contains the lone surrogate U\+D800"),
        ("[1]", "line 2: expected an object, got a list; remove that line"),
        ('{"step": 2}', "line without 'kind' and 'step'.*; remove it"),
        ('{"kind": "train", "step": null}', "line without 'kind' and 'step'"),
    ],
    ids=["deep", "surrogate", "list", "kind", "step"],
)
def test_a_line_that_no_run_writes_is_named(tmp_path: Path, line: str, message: str) -> None:
    record = RunRecord(tmp_path)
    record.append("train", {"step": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(RunFolderError, match=rf"metrics\.jsonl(,|:) {message}"):
        record.cut_after(1, 1)
    assert line in (tmp_path / "metrics.jsonl").read_text()  # nothing was thrown away


def test_a_deep_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(RunFolderError, match=r"config\.json: not a configuration \(JSON nested too deeply"):
        RunRecord(tmp_path).read_config()


def test_json_is_strict() -> None:
    text = strict_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "それは"})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": "それは"}
    assert "それは" in text


def test_no_run_and_a_torn_configuration_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run here"):
        RunRecord(tmp_path).read_config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"config\.json: not a configuration"):
        RunRecord(tmp_path).read_config()


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RunRecord(tmp_path)
    record.write_result({"steps": 1})

    def full(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunFolderError, match=r"result\.json: could not be written \(No space left on the disk\); free space"):
        record.write_result({"steps": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == {"steps": 1}
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: could not be written"):
        record.append("train", {"step": 1})


def test_what_an_unfinished_observation_wrote_is_cut_and_its_step_kept(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for kind in ("train", "evaluation", "routing"):
        record.append(kind, {"step": 4})
    record.cut_after(4, 3)
    assert [values["kind"] for values in record.metrics()] == ["train"]


@pytest.mark.parametrize("text", ['{"date": "20', "[]", '{"earlier": 3}'])
def test_a_torn_environment_is_named_when_resuming(tmp_path: Path, text: str) -> None:
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"environment\.json: damaged or cut short .*remove this file"):
        RunRecord(tmp_path).begin(RunConfig(), Tokenizer.bytes_level(), torch.device("cpu"), resumed_at=5)
