"""Configurations check themselves, and survive JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from factorization_memory import presets
from factorization_memory.config import (
    RETIRED,
    AttentionConfig,
    ConfigError,
    DataConfig,
    Mamba2Config,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    from_dict,
    to_dict,
)  # fmt: skip
from factorization_memory.models import counting


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = presets.PRESETS[name]()
    assert config.name.replace("_", "-") == name
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ModelConfig, {"top_k": 65}, r"model\.top_k=65: use 1 to num_states=64"),
        (ModelConfig, {"top_k": 0}, r"model\.top_k=0"),
        (ModelConfig, {"num_heads": 3}, r"model\.num_heads=3: must divide the value width .* = 512"),
        (ModelConfig, {"expand": 0.3}, r"value width expand \* hidden_size = 76.8"),
        (ModelConfig, {"update_lag": -1}, r"model\.update_lag=-1: use 0 \(the paper's form\), 1"),
        (ModelConfig, {"update_rate_init": (0.5, 0.1)}, r"model\.update_rate_init=\(0.5, 0.1\)"),
        (ModelConfig, {"update_rate_init": (0.1,)}, r"model\.update_rate_init=\(0.1,\): expected 2 values"),
        (ModelConfig, {"update_rate_init": 0.5}, r"model\.update_rate_init=0.5: expected a list"),
        (ModelConfig, {"top_k": 2.5}, r"model\.top_k=2.5: expected int"),
        (ModelConfig, {"num_states": True}, r"model\.num_states=True: expected int"),
        (ModelConfig, {"value_skip": "x"}, r"model\.value_skip='x': expected bool"),
        (ModelConfig, {"expand": "2"}, r"model\.expand='2': expected float"),
        (Mamba2Config, {"conv_size": 1.5}, r"model\.mamba2\.conv_size=1.5: expected int"),
        (TrainingConfig, {"steps": 1.5}, r"training\.steps=1.5: expected int"),
        (ModelConfig, {"temperature": 0.0}, r"model\.temperature=0.0"),
        (DataConfig, {"context_length": 0}, r"data\.context_length=0"),
        (DataConfig, {"weights": {"en": -1.0}}, r"data\.weights\.en=-1.0"),
        (DataConfig, {"weights": {"en": 0.0}}, r"data\.weights=.*make at least one positive"),
        (OptimizerConfig, {"learning_rate": -1.0}, r"optimizer\.learning_rate=-1.0"),
        (OptimizerConfig, {"beta2": 1.0}, r"optimizer\.beta2=1.0"),
        (ModelConfig, {"expand": float("inf")}, r"model\.expand=inf: use a finite number"),
        (ModelConfig, {"expand": 1e308}, r"must divide the value width .* = inf"),
        (ModelConfig, {"temperature": float("nan")}, r"model\.temperature=nan: use a finite number"),
        (ModelConfig, {"backend": "fast"}, r"model\.backend='fast': use one of 'auto', 'reference', 'chunked'"),
        (DataConfig, {"weights": {"en": float("inf")}}, r"data\.weights=\{'en': inf\}: use a finite number"),
        (OptimizerConfig, {"learning_rate": float("inf")}, r"optimizer\.learning_rate=inf: use a finite number"),
        (OptimizerConfig, {"clip_norm": float("inf")}, r"optimizer\.clip_norm=inf: use a finite number"),
        (TrainingConfig, {"steps": 0}, r"training\.steps=0"),
    ],
)
def test_bad_values_name_field_value_and_remedy(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**values)


def test_tokens_per_step_must_fit_the_context() -> None:
    with pytest.raises(ConfigError, match=r"training\.tokens_per_step=1000: must be a multiple of data\.context_length=512"):
        RunConfig(training=TrainingConfig(tokens_per_step=1000))
    with pytest.raises(ConfigError, match=r"training\.micro_batch_size=3: must divide the 16 sequences"):
        RunConfig(training=TrainingConfig(micro_batch_size=3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"topk": 3}}, r"model\.topk: no such field; did you mean 'top_k'\?"),
        ({"model": {"num_states": "many"}}, r"model\.num_states='many': expected int"),
        ({"model": {"num_states": True}}, r"model\.num_states=True: expected int"),
        ({"model": {"rates": "token"}}, r"model\.rates='token': use one of 'head', 'state'"),
        ({"model": {"norm": "state"}}, r"model\.norm='state': this field was removed; load models trained with it in"),
        ({"model": {"update_lag": 1.0}}, r"model\.update_lag=1\.0: expected int"),
        ([], r"configuration=\[\]: expected an object"),
        ({"model": {"backend": "fast"}}, r"model\.backend='fast': use one of 'auto', 'reference', 'chunked'"),
        ({"model": {"update_rate_init": [0.1]}}, r"model\.update_rate_init=\[0\.1\]: expected 2 values"),
        ({"model": {"update_rate_init": [0.1, "x"]}}, r"model\.update_rate_init\[1\]='x': expected float"),
        ({"data": {"weights": {"en": "x"}}}, r"data\.weights\.en='x': expected float"),
        ({"model": 3}, r"model=3: expected an object"),
        ({"data": {"weights": 3}}, r"data\.weights=3: expected an object"),
        ({"model": {"update_rate_init": 3}}, r"model\.update_rate_init=3: expected a list"),
    ],
)
def test_bad_dictionaries(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, values)


def test_sizes_that_are_derived() -> None:
    assert ModelConfig(hidden_size=256).feed_forward_size == 704
    assert ModelConfig(hidden_size=256, intermediate_size=100).feed_forward_size == 100
    assert RunConfig(training=TrainingConfig(tokens_per_step=2048, micro_batch_size=2)).micro_batch_size == 2
    assert RunConfig(training=TrainingConfig(tokens_per_step=2048)).micro_batch_size == 4


@pytest.mark.parametrize("size", presets.SIZES)
def test_the_forms_of_a_size_are_equally_large(size: str) -> None:
    models = [dataclasses.replace(presets.sized(size, form).model, vocab_size=16384) for form in presets.FORMS]
    pure, *others = (counting.count(model).non_embedding_parameters for model in models)
    assert all(other == pytest.approx(pure, rel=0.005) for other in others)
    assert float(presets.PARAMETERS[size]) == pytest.approx(others[0] / 1e6, rel=0.01)
    assert (models[0].num_heads, models[0].conv_size, models[0].output_gate) == (1, 0, False)
    assert (models[1].num_heads, models[1].conv_size, models[1].output_gate) == (1, 4, True)


@pytest.mark.parametrize("name", RETIRED["ModelConfig"])
def test_retired_fields_load_with_their_neutral_value_alone(name: str) -> None:
    """Saved by version 0.1.0: a configuration that did without loads as it was, any other is refused."""
    neutral, version = RETIRED["ModelConfig"][name]
    assert from_dict(RunConfig, {"model": {name: neutral, "top_k": 4}}).model.top_k == 4
    other = 0.5 if neutral in (None, 0.0) else "both"
    assert version == "0.1.0 (commit 1f9596a)"
    told = f"model.{name}={other!r}: this field was removed; load models trained with it in factorization_memory {version}"
    with pytest.raises(ConfigError, match=re.escape(told)):
        from_dict(RunConfig, {"model": {name: other}})
    assert name not in to_dict(RunConfig())["model"]


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        (ModelConfig, {"num_layers": 10**9}, "model.num_layers=1000000000: use 1,000,000 or fewer"),
        (ModelConfig, {"hidden_size": 10**12}, "model.hidden_size=1000000000000"),
        (ModelConfig, {"vocab_size": 2**31}, "model.vocab_size=2147483648"),
        (
            ModelConfig,
            {"num_states": 2**29, "num_heads": 4},
            "model.num_states=536870912: gives a weight of width 2,147,483,648",
        ),
        (ModelConfig, {"expand": 1e9}, "model.expand=1000000000.0"),
        (ModelConfig, {"conv_size": 2**40}, "model.conv_size"),
        (ModelConfig, {"update_lag": 2**62}, "model.update_lag"),
        (AttentionConfig, {"sliding_window": 2**40}, "model.attention.sliding_window"),
        (Mamba2Config, {"state_size": 2**20, "num_groups": 2**11}, "model.mamba2.state_size"),
        (DataConfig, {"context_length": 2**31}, "data.context_length"),
        (TrainingConfig, {"seed": 2**70}, "training.seed=1180591620717411303424"),
        (TrainingConfig, {"seed": -(2**63) - 1}, "training.seed"),
    ],
)
def test_sizes_that_nothing_can_hold_are_refused_at_once(section: Any, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        section(**values)


def test_a_forward_pass_is_of_as_many_tokens_as_its_borders_can_say() -> None:
    data, training = DataConfig(context_length=1 << 20), TrainingConfig(tokens_per_step=1 << 31)
    with pytest.raises(ConfigError, match=r"training\.micro_batch_size=0: one forward pass would read 2,147,483,648 tokens"):
        RunConfig(data=data, training=training)
    RunConfig(data=data, training=dataclasses.replace(training, micro_batch_size=1))
