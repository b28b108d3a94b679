"""A run as one library call leaves all that the command leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factorization_memory.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from factorization_memory.data.shards import pack
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.experiments.session import Session, with_absolute_paths
from factorization_memory.runs import names


def test_all_of_a_run_in_one_call(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"The {i}th wise man said {i * i}.\n" for i in range(200)), encoding="utf-8")
    corpus = pack([("en", tmp_path / "text.txt")], Tokenizer.bytes_level(), tmp_path / "packed", holdout="tail")
    config = RunConfig(
        model=ModelConfig(hidden_size=16, num_layers=1, num_states=8),
        data=DataConfig(corpus=str(corpus.folder), context_length=32),
        training=TrainingConfig(steps=4, tokens_per_step=128, evaluation_tokens=128, device="cpu"),
    )
    told = []
    run_dir = tmp_path / "run"
    found = Session(config, run_dir).run(prompts=("The", "said"), progress=lambda what, done, total: told.append(what))
    assert found["training"] == json.loads((run_dir / names.RESULT_NAME).read_text())
    assert found["evaluation"] == json.loads((run_dir / names.EVALUATION_NAME).read_text())
    assert found["evaluation"]["evaluated"]["checkpoint"] == "step-00000004"
    assert found["samples"] == json.loads((run_dir / names.SAMPLES_NAME).read_text())
    assert [sample["prompt"] for sample in found["samples"]] == ["The", "said"]
    assert Path(found["report"]) == run_dir / names.REPORT_NAME
    assert {"loss, en", "loss by position, en"} <= {*told}


def test_a_run_remembers_whole_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for source, kept in (("", ""), ("builtin", "builtin"), ("model", str(tmp_path / "model"))):
        config = RunConfig(data=DataConfig(corpus="packed"), training=TrainingConfig(init_from=source))
        whole = with_absolute_paths(config)
        assert (whole.data.corpus, whole.training.init_from) == (str(tmp_path / "packed"), kept)
