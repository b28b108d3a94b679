"""`fmem evaluate RUN --harness TASKS` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from factorization_memory.cli import dispatch
from factorization_memory.cli.evaluate_harness import ended_by_sigterm
from factorization_memory.models.pretrained import builtin_model
from factorization_memory.reports.terminal.harness import metric_text
from factorization_memory.runs import load_model

pytest.importorskip("lm_eval")
from factorization_memory.evaluation.harness_tasks import choose_tasks, run_tasks

TINY = [
    "--model.hidden-size", "16", "--model.num-layers", "1", "--model.num-states", "8", "--data.context-length", "32",
    "--training.tokens-per-step", "128", "--training.steps", "2", "--training.evaluate-every", "2",
    "--training.evaluation-tokens", "256", "--training.device", "cpu",
]  # fmt: skip


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `fmem` in this process."""
    try:
        status = dispatch([str(a) for a in arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    folder = tmp_path_factory.mktemp("fmem")
    (folder / "text.txt").write_text("".join(f"The {i}th wise man said {i * i}.\n" for i in range(900)), encoding="utf-8")
    packed = str(folder / "packed")
    assert dispatch(["data", "pack", str(folder / "text.txt"), "--output", packed, "--holdout", "tail"]) == 0
    assert dispatch(["train", "demo", *TINY, "--data.corpus", packed, "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Local data laid out like those of two tasks."""
    rows: dict[str, list[dict[str, Any]]] = {
        "hellaswag/validation": [
            {"activity_label": "Men", "ctx_a": f"The {i}th man sits.", "ctx_b": "he", "endings": list("abcd"), "label": str(i)}
            for i in range(4)
        ],
        "lambada_openai/test": [{"text": f"The {i}th wise man said {i * i}."} for i in range(3)],
    }
    for name, lines in rows.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setenv("COLUMNS", "200")


def test_tasks_on_local_data(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--harness-data", data, "--harness-limit", 3, "--harness-batch-size", 2, "--device", "cpu", "--json"]
    status, out, err = call(capsys, "evaluate", run, "--harness", "hellaswag", "lambada_openai", *arguments)
    assert status == 0
    result = json.loads(out)  # and nothing else on stdout, whatever the harness prints
    assert result["tasks"].keys() == {"hellaswag", "lambada_openai"}
    assert result["tasks"]["hellaswag"]["examples"] == 3
    assert result["tasks"]["lambada_openai"]["metrics"]["perplexity"]["value"] > 1
    assert result["checkpoint"].startswith("step-")
    assert result["asked"] == {"tasks": ["hellaswag", "lambada_openai"], "shots": None, "limit": 3, "batch_size": 2}
    assert json.loads((run / "harness.json").read_text(encoding="utf-8")) == result
    assert not list(run.glob("*.partial"))
    assert all(word in err for word in ("hellaswag", "acc_norm", "perplexity", "± error", "harness.json"))


def test_a_checkpoint_keeps_nothing(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "harness.json").unlink(missing_ok=True)
    checkpoint = next((run / "checkpoints").iterdir())
    before = sorted(checkpoint.rglob("*"))
    arguments = ["--harness", "hellaswag", "--harness-data", data, "--device", "cpu"]
    status, out, err = call(capsys, "evaluate", checkpoint, *arguments)
    assert (status, out) == (0, "")
    assert "acc_norm" in err
    assert sorted(checkpoint.rglob("*")) == before
    assert not (run / "harness.json").exists()


def test_without_a_hub(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--harness-data", data, "--device", "cpu", "--json"]
    status, out, err = call(capsys, "evaluate", run, "--harness", "hellaswag", "piqa", *arguments)
    assert (status, out) == (1, "")
    assert "task piqa: baber/piqa cannot be loaded from the hub" in err
    assert "DIR/piqa/validation.jsonl (or .json, .parquet), with --harness-data DIR" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--harness", "helaswag"], 2, "unknown task 'helaswag'; did you mean 'hellaswag'"),
        (["--harness", "hellaswag", "--harness-limit", "0"], 2, "--harness-limit=0: use 1 or more"),
        (["--harness", "hellaswag", "--harness-shots", "-1"], 2, "--harness-shots=-1: use 0 or more"),
        (["--harness", "hellaswag", "--harness-batch-size", "0"], 2, "--harness-batch-size=0: use 1 or more"),
        (["--harness", "hellaswag", "--max-tokens", "9"], 2, "--max-tokens: applies to held-out text"),
        (["--harness-data", "data"], 2, "--harness-data: no task given; name one or more with --harness"),
        (["--harness"], 2, "--harness: no task given"),
        (["--harness", "hellaswag", "--harness-data", "nowhere"], 2, "nowhere: no such folder"),
    ],
)
def test_bad_usage(
    arguments: list[str], status: int, message: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("factorization_memory.runs.load_model", lambda *_: pytest.fail("a model was loaded"))
    got, out, err = call(capsys, "evaluate", run, *arguments)
    assert (got, out) == (status, "")
    assert message in err
    assert "Traceback" not in err


def test_arithmetic_is_that_of_the_adapter_in_python(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a model that was trained in bfloat16, as the one of the package was; and the record says so."""
    status, out, _ = call(
        capsys, "evaluate", "--harness", "lambada_openai", "--harness-data", data, "--device", "cpu", "--json"
    )
    assert status == 0
    result = json.loads(out)
    model, tokenizer, config = load_model(builtin_model())
    assert config.training.precision == "bfloat16"
    with choose_tasks(["lambada_openai"], data=data) as chosen:
        expected = run_tasks(chosen, model, tokenizer)
    assert result["tasks"]["lambada_openai"]["metrics"] == expected["tasks"]["lambada_openai"]["metrics"]
    assert (result["checkpoint"], result["device"], result["precision"]) == ("builtin", "cpu", "float32")


def test_the_table_in_a_narrow_terminal(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = call(
        capsys, "evaluate", run, "--harness", "hellaswag", "lambada_openai", "--harness-data", data, "--device", "cpu", "--json"
    )
    assert status == 0
    for name, task in json.loads(out)["tasks"].items():
        assert name in err
        for metric, found in task["metrics"].items():
            assert metric in err
            assert metric_text(found["value"]) in err


def test_sigterm_ends_as_an_exception_does() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(SystemExit) as ended, ended_by_sigterm():
        wait()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_such_run(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "evaluate", "nowhere", "--harness", "hellaswag")
    assert status == 1
    assert "nowhere: no such folder" in err


def test_harness_that_is_not_installed(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("lm_eval", "factorization_memory.evaluation.harness")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = call(capsys, "evaluate", run, "--harness", "hellaswag", "--device", "cpu")
    assert status == 1
    assert "pip install 'factorization_memory[harness]'" in err
    assert "Traceback" not in err
