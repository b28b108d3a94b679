"""The benchmark of reading and writing with whole models."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from factorization_memory.benchmarks import inference, timing
from factorization_memory.benchmarks.floor import Rates
from factorization_memory.benchmarks.inference_models import RecurrentModel
from factorization_memory.benchmarks.matched_peers import MATCHED_PEERS
from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.config import ConfigError, ModelConfig
from factorization_memory.models.counting import count

CPU = torch.device("cpu")
MODEL = ModelConfig(vocab_size=50, hidden_size=32, num_layers=2, num_states=8, conv_size=3)
SMALL = {"decode_tokens": 4, "repeats": 2, "prefill_chunk": 16}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 1e-9)
    monkeypatch.setattr(inference, "measure_rates", lambda device: Rates(1e9, 1e12, "none"))


def test_every_size_is_measured() -> None:
    benchmark = InferenceBenchmark(MODEL, contexts=(40, 8), batches=(3, 1), top_k=(0, 2), **SMALL)
    shown: list[int] = []
    result = inference.run(benchmark, CPU, show=lambda records: shown.append(len(records)))
    assert json.loads(json.dumps(result)) == result
    assert shown == [4, 4]
    records = result["records"]
    assert [(r["contender"], r["batch"], r["context"]) for r in records] == [
        (name, batch, context) for name in ("ours dense", "ours K=2") for batch in (1, 3) for context in (8, 40)
    ]
    for record in records:
        assert record["error"] is None
        assert record["state"] == "read"
        assert record["parameters"] == count(MODEL).parameters
        assert record["weight_bytes"] == 4 * record["parameters"]
        assert record["state_bytes"] == record["batch"] * count(MODEL).state_bytes
        assert record["floor_seconds"] == record["step_bytes"] / 1e9
        read = record["prefill"]
        assert 1 <= read["repeats"] <= 2
        assert read["tokens_per_second"] == pytest.approx(record["batch"] * record["context"] / read["seconds"]["median"])
        written = record["decode"]["eager"]
        seconds = written["seconds"]
        assert written["tokens"] == 4
        assert seconds["min"] <= seconds["median"] <= seconds["p99"] <= seconds["max"]
        assert written["tokens_per_second"] == pytest.approx(record["batch"] / seconds["median"])
        assert written["ratio_to_floor"] == pytest.approx(seconds["median"] / record["floor_seconds"])
    assert len(result["spread"]) == sum(len(record["decode"]) for record in records) // len({r["context"] for r in records})
    medians = [r["decode"]["eager"]["seconds"]["median"] for r in records[:2]]
    assert result["spread"][0]["slowest_over_fastest"] == pytest.approx(max(medians) / min(medians))


@pytest.mark.parametrize("limit", [0.0, 1e-9])
def test_what_would_take_too_long_to_read_is_not_read(limit: float) -> None:
    benchmark = InferenceBenchmark(MODEL, contexts=(8, 1 << 40), batches=(2,), prefill_seconds=limit, **SMALL)
    for record in inference.run(benchmark, CPU)["records"]:
        assert record["state"] == "random"
        assert record["prefill"] is None
        assert record["decode"]["eager"]["tokens"] == 4


def test_steps_are_fewer_where_they_take_long() -> None:
    benchmark = InferenceBenchmark(MODEL, contexts=(8,), batches=(1,), decode_seconds=0, **SMALL)
    (record,) = inference.run(benchmark, CPU)["records"]
    assert record["decode"]["eager"]["tokens"] == 2  # one in each round


def test_a_size_that_fails_is_told_and_the_others_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    read, begin = RecurrentModel.read, RecurrentModel.begin

    def failing(self: RecurrentModel, tokens: Tensor) -> Tensor:
        if tokens.shape[1] == 20:
            raise RuntimeError("too long")
        return read(self, tokens)

    def crowded(self: RecurrentModel, batch: int, steps: int) -> None:
        if batch == 2:
            raise RuntimeError("too many")
        begin(self, batch, steps)

    monkeypatch.setattr(RecurrentModel, "read", failing)
    monkeypatch.setattr(RecurrentModel, "begin", crowded)
    result = inference.run(InferenceBenchmark(MODEL, contexts=(8, 20, 24), batches=(1, 2), **SMALL), CPU)
    errors = [record["error"] for record in result["records"]]
    assert errors == [None, "RuntimeError: too long", None, *["RuntimeError: too many"] * 3]
    assert [bool(record["decode"]) for record in result["records"]] == [True, False, True, False, False, False]
    assert json.loads(json.dumps(result)) == result


def test_a_peer_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "factorization_memory.benchmarks.inference_peers", None)
    benchmark = InferenceBenchmark(MODEL, contexts=(8,), batches=(1,), peers=("llama",), **SMALL)
    result = inference.run(benchmark, CPU)
    assert "pip install transformers" in result["missing"]["llama"]
    assert len(result["records"]) == 1


def test_peers_of_this_package_stand_beside_ours() -> None:
    model = ModelConfig(vocab_size=50, hidden_size=64, num_layers=2, num_states=8)
    sizes = SMALL | {"mamba2_head_size": 8, "mamba2_state_size": 16, "repeats": 1}
    benchmark = InferenceBenchmark(model, contexts=(8, 40), batches=(2,), peers=MATCHED_PEERS, **sizes)
    result = inference.run(benchmark, CPU)
    assert json.loads(json.dumps(result)) == result
    records = result["records"]
    assert [r["contender"] for r in records[::2]] == ["ours", *MATCHED_PEERS]
    for number, record in enumerate(records):
        assert record["error"] is None
        assert record["state"] == "read"
        assert record["peer"] == (record["contender"] != "ours")
        assert record["parameters"] == pytest.approx(records[0]["parameters"], rel=0.01)
        assert record["peak_bytes"] is None
        assert record["decode"]["eager"]["tokens"] == 4
        first = records[number - number % 2]
        assert (record["state_bytes"] > first["state_bytes"]) == (record["contender"] == "transformer" and number % 2 == 1)


def test_a_peer_that_cannot_be_as_large_is_told_before_anything_is_measured() -> None:
    shown: list[str] = []
    with pytest.raises(ConfigError, match="peers='mamba2'"):
        inference.run(InferenceBenchmark(MODEL, peers=("mamba2",), **SMALL), CPU, shown.append)
    assert shown == []


@pytest.mark.filterwarnings("ignore")  # those of another package's imports
@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied: bool) -> None:
    pytest.importorskip("transformers")
    from factorization_memory.benchmarks.inference_peers import Llama

    model = ModelConfig(vocab_size=50, hidden_size=64, num_layers=2, num_states=8, tie_word_embeddings=tied)
    benchmark = InferenceBenchmark(model, contexts=(8, 40), batches=(1, 3), peers=("llama",), **SMALL)
    result = inference.run(benchmark, CPU)
    ours, llama = result["records"][:4], result["records"][4:]
    assert [record["error"] for record in llama] == [None] * 4
    assert all(record["peer"] for record in llama)
    for mine, record in zip(ours, llama, strict=True):
        assert record["parameters"] == pytest.approx(mine["parameters"], rel=0.01)
        assert record["state_bytes"] == 2 * 2 * 4 * 64 * record["batch"] * record["context"]  # keys and values of two layers
        assert record["decode"]["eager"]["tokens"] == 4

    # The cache gives what reading everything anew gives, also after going back.
    contender = Llama(benchmark, CPU)
    contender.begin(2, 4)
    tokens = torch.randint(0, 50, (2, 12))
    with torch.no_grad():
        expected = [contender.model(input_ids=tokens[:, : t + 1], use_cache=False).logits[:, -1] for t in range(12)]
        torch.testing.assert_close(contender.read(tokens[:, :9]), expected[8], rtol=1e-4, atol=1e-5)
        resume = contender.keep()
        for _ in range(2):
            resume()
            for t in range(9, 12):
                torch.testing.assert_close(contender.modes()["eager"](tokens[:, t]), expected[t], rtol=1e-4, atol=1e-5)
        contender.invent(9)
        assert contender.modes()["eager"](tokens[:, 9]).isfinite().all()


@pytest.mark.gpu
def test_on_a_gpu_peers_are_replayed_and_peaks_are_of_one_context() -> None:
    torch.use_deterministic_algorithms(False)
    model = ModelConfig(vocab_size=50, hidden_size=64, num_layers=2, num_states=8)
    sizes = {"mamba2_head_size": 8, "mamba2_state_size": 16}
    benchmark = InferenceBenchmark(model, contexts=(40, 5000), batches=(2,), peers=MATCHED_PEERS, **sizes, **SMALL)
    for record in inference.run(benchmark, torch.device("cuda"))["records"]:
        assert record["error"] is None
        assert set(record["decode"]) == {"eager", "graph"}
        peak, least = record["peak_bytes"], record["weight_bytes"] + record["state_bytes"]
        assert peak is not None
        assert peak["prefill"] is not None
        assert min(peak["prefill"], peak["decode"]) >= least
        assert peak["decode"] < least + (64 << 20)


@pytest.mark.gpu
def test_on_a_gpu_steps_are_also_replayed() -> None:
    torch.use_deterministic_algorithms(False)
    benchmark = InferenceBenchmark(MODEL, contexts=(40,), batches=(1, 4), top_k=(0, 2), **SMALL)
    result = inference.run(benchmark, torch.device("cuda"))
    assert result["dtype"] == "bfloat16"
    for record in result["records"]:
        assert record["error"] is None
        assert set(record["decode"]) == {"eager", "graph"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contexts": ()}, r"contexts=\(\)"),
        ({"contexts": (8, 0)}, r"contexts=\(8, 0\)"),
        ({"batches": (0,)}, r"batches=\(0,\)"),
        ({"top_k": (9,)}, r"top_k=\(9,\).*num_states=8"),
        ({"top_k": (-1,)}, r"top_k=\(-1,\)"),
        ({"peers": ("gpt",)}, r"peers=\('gpt',\): use some of transformer, mamba2, gated-deltanet, llama"),
        (
            {"peers": ("transformer",), "transformer_heads": 3},
            "transformer_heads=3: must divide model.hidden_size=32 into heads",
        ),
        ({"transformer_heads": -1}, "transformer_heads=-1: use 0"),
        ({"peers": ("mamba2",), "mamba2_head_size": 48}, "mamba2_head_size=48: must divide 64, twice model.hidden_size=32"),
        ({"mamba2_state_size": 0}, "mamba2_state_size=0: use 1 or more"),
        (
            {"peers": ("gated-deltanet",), "gated_deltanet_head_size": 16},
            "gated_deltanet_head_size=16: must divide 24, 3/4 of model.hidden_size=32; use 0",
        ),
        (
            {"peers": ("gated-deltanet",), "model": ModelConfig(vocab_size=9, hidden_size=30)},
            "gated_deltanet_head_size=0: must divide 22.5, .* multiple of 4",
        ),
        ({"model": ModelConfig(vocab_size=9, mixers=("attention",))}, "model.mixers=.* use transformer as a peer"),
        ({"peers": ("llama",), "llama_heads": 3}, "llama_heads=3"),
        ({"precision": "int4"}, "precision='int4'"),
        ({"prefill_chunk": -1}, "prefill_chunk=-1"),
        ({"prefill_seconds": -1.0}, "prefill_seconds=-1"),
        ({"decode_seconds": float("nan")}, "decode_seconds=nan"),
        ({"decode_tokens": 0}, "decode_tokens=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"model": ModelConfig()}, "vocab_size=0"),
        ({"model": ModelConfig(vocab_size=9, top_k=2), "top_k": (4,)}, "model.top_k=2: cannot be combined"),
    ],
)
def test_bad_settings_name_themselves(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InferenceBenchmark(**{"model": MODEL, **settings})
