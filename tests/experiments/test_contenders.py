from __future__ import annotations

import json
from pathlib import Path

import pytest

from factorization_memory.config import ConfigError, RunConfig, to_dict
from factorization_memory.experiments.contenders import override, read_contender, split_overrides
from factorization_memory.presets import PRESETS


def test_flags_of_a_run_are_told_from_others() -> None:
    rest, overrides = split_overrides(
        [
            "a", "--seeds", "0", "1", "--model.top-k", "none", "--model.mixers", "memory", "attention", "--out", "o",
            "--model.no-output-gate", "--data.document-boundary=continue", "--training.carry-state", "b",
            "--model.attention.sliding-window", "8",
            "--model.update-rate-init", "0.1", "0.9", "--data.weights", "en", "1", "ja", "2",
        ]
    )  # fmt: skip
    assert rest == ["a", "--seeds", "0", "1", "--out", "o", "b"]
    config = override(RunConfig(), overrides)
    assert config.model.top_k is None
    assert config.model.mixers == ("memory", "attention")
    assert not config.model.output_gate
    assert config.training.carry_state
    assert config.model.update_rate_init == (0.1, 0.9)
    assert (config.data.document_boundary, config.data.weights) == ("continue", {"en": 1.0, "ja": 2.0})


def test_contenders(tmp_path: Path) -> None:
    plain = read_contender("paper", {})
    assert (plain.name, plain.config) == ("paper", PRESETS["paper"]())
    text = "mix=paper-sparse:model.top-k=8,model.mixers=memory,memory,attention,optimizer.schedule=wsd"
    mixed = read_contender(text, {"model.top_k": "4", "model.num_heads": "2"})
    assert (mixed.name, mixed.text) == ("mix", text)
    assert (mixed.config.model.top_k, mixed.config.model.num_heads) == (8, 2)
    assert mixed.config.model.mixers == ("memory", "memory", "attention")
    assert mixed.config.optimizer.schedule == "wsd"
    assert read_contender("paper:model.expand=1", {}).name == "paper:model.expand=1"
    # Fields that only fit together are set together.
    assert read_contender("paper:model.top-k=100,model.num-states=128", {}).config.model.top_k == 100
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(to_dict(mixed.config)))
    read = read_contender(f"{tmp_path}/mine/config.json", {})
    assert (read.name, read.config) == ("mine", mixed.config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("papre", "'papre' is not a preset; did you mean 'paper'?"),
        ("paper:model.topk=8", "contender 'paper:model.topk=8': model.topk: no such field; did you mean 'model.top_k'?"),
        ("paper:model.top-k=many", "model.top_k='many': expected int"),
        ("paper:model.top-k=65", "model.top_k=65: use 1 to num_states=64"),
        ("paper:model.output-gate=yes", "model.output_gate='yes': expected bool"),
        ("paper:model.rates=fast", "model.rates='fast': use one of"),
        ("paper:model.update-rate-init=0.5", "model.update_rate_init=[0.5]: expected 2 values"),
        (
            "paper:model.attention=2",
            "model.attention: a section, not a field; set one of its fields, such as model.attention.num_heads",
        ),
        ("paper:top", "'top' is not a setting; write field=value"),
        ("paper:data.context-length=8", "contenders may differ only in model and optimizer"),
        ("paper:training.steps=8", "to change it for all, use --training.steps"),
        ("nowhere/config.json", "nowhere/config.json: cannot be read"),
    ],
)
def test_contenders_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_contender(text, {})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.topk", "8"], "model.topk: no such field; did you mean 'model.top_k'?"),
        (["--model.top-k"], "--model.top-k: value missing"),
        (["--model.no-top-k"], "--model.no-top-k: no such field"),
        (["--training.steps", "--json"], "--training.steps: value missing"),
    ],
)
def test_flags_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        split_overrides(words)
    assert message in str(error.value)
