"""The models of this package that the inference benchmark measures: what they read, remember and restore."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from factorization_memory.benchmarks.inference_models import AttentionModel, PackageModel, RecurrentModel
from factorization_memory.benchmarks.matched_peers import MATCHED_PEERS, matched_peer
from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.config import ConfigError, ModelConfig
from factorization_memory.models.counting import count

CPU = torch.device("cpu")
MODEL = ModelConfig(vocab_size=50, hidden_size=32, num_layers=2, num_states=8, conv_size=3)
BENCHMARK = InferenceBenchmark(
    replace(MODEL, hidden_size=64), peers=MATCHED_PEERS, mamba2_head_size=8, mamba2_state_size=16, prefill_chunk=10
)
MORE = 4
"""Steps that are to follow a text."""


def made(name: str) -> RecurrentModel | AttentionModel:
    if name == "ours":
        return RecurrentModel(name, BENCHMARK.model, BENCHMARK, CPU)
    kind = AttentionModel if name == "transformer" else RecurrentModel
    return kind(name, matched_peer(BENCHMARK, name), BENCHMARK, CPU)


NAMES = ("ours", *MATCHED_PEERS)
NAMED = pytest.mark.parametrize("name", NAMES)


def expected_logits(contender: PackageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of all tokens read at once, in float64."""
    model = copy.deepcopy(contender.model).double()
    with torch.no_grad():
        return model(tokens)[0].float()


@NAMED
def test_steps_go_on_from_what_was_read(name: str) -> None:
    contender = made(name)
    contender.begin(2, MORE)
    tokens = torch.randint(0, 50, (2, 9 + MORE))
    expected = expected_logits(contender, tokens)
    contender.read(tokens[:1, :5])  # fewer sequences, as a warm-up reads
    torch.testing.assert_close(contender.read(tokens[:, :9]), expected[:, 8], rtol=1e-4, atol=1e-5)
    step = contender.modes()["eager"]
    for place in range(9, 9 + MORE):
        torch.testing.assert_close(step(tokens[:, place]), expected[:, place], rtol=1e-4, atol=1e-5)


@NAMED
def test_what_is_kept_is_restored_also_beside_another_text(name: str) -> None:
    contender = made(name)
    contender.begin(2, MORE)
    steps, resumes, expected = [], [], []
    for length in (9, 3):
        tokens = torch.randint(0, 50, (2, length))
        contender.read(tokens)
        steps.append(contender.modes()["eager"])
        resumes.append(contender.keep())
        following = torch.randint(0, 50, (MORE, 2))
        expected.append((following, [steps[-1](token).clone() for token in following]))
    for _ in range(2):
        for step, resume, (following, logits) in zip(steps, resumes, expected, strict=True):
            resume()
            for token, wanted in zip(following, logits, strict=True):
                assert torch.equal(step(token), wanted)


@NAMED
def test_invented_states_have_the_size_of_a_text(name: str) -> None:
    contender = made(name)
    contender.begin(3, MORE)
    for context in (7, 20):
        contender.invent(context)
        costs = count(contender.model.config)
        assert contender.state_bytes() == 3 * (costs.state_bytes + context * costs.state_bytes_per_token)
        assert (costs.state_bytes_per_token > 0) == (name == "transformer")
        step, resume = contender.modes()["eager"], contender.keep()
        first = step(torch.tensor([1, 2, 3]))
        resume()
        again = step(torch.tensor([1, 2, 3]))
        assert first.isfinite().all()
        assert torch.equal(first, again) == (name == "transformer")  # the others are invented anew, which costs as much


def test_the_work_of_reading_grows_as_attention_does() -> None:
    for name in NAMES:
        contender = made(name)
        growth = contender.reading_work(1 << 20) / contender.reading_work(1 << 10)
        if name == "transformer":
            assert 1 << 10 < growth < 1 << 20
        else:
            assert growth == 1 << 10


def test_a_cache_that_the_machine_cannot_hold_is_refused() -> None:
    contender = made("transformer")
    contender.begin(2, MORE)
    with pytest.raises(ConfigError, match=r"keys and values of 2 x 1,099,511,627,780 tokens would take .* use fewer"):
        contender.invent(1 << 40)


def test_what_a_step_cannot_but_move() -> None:
    weights, width = count(MODEL).parameters, MODEL.value_size
    tail = 4 * MODEL.num_layers * 2 * width
    memory = 4 * MODEL.num_layers * MODEL.num_states * width
    for top_k, touched in ((None, memory), (2, memory // 4)):
        ours = RecurrentModel("ours", replace(MODEL, top_k=top_k), InferenceBenchmark(MODEL), CPU)
        ours.begin(3, 1)
        assert ours.step_bytes() == 4 * weights + 2 * 3 * (touched + tail)
    untied = ModelConfig(vocab_size=50, hidden_size=32, num_layers=2, num_states=8, tie_word_embeddings=False)
    ours = RecurrentModel("ours", untied, InferenceBenchmark(untied, precision="bfloat16"), CPU)
    ours.begin(3, 1)
    assert ours.step_bytes() == 2 * (count(untied).parameters - 47 * 32) + 2 * 3 * memory


def test_what_a_step_of_attention_cannot_but_move() -> None:
    contender = made("transformer")
    contender.begin(3, MORE)
    contender.invent(20)
    keys_and_values = 4 * 2 * MODEL.num_layers * 64
    assert contender.step_bytes() == 4 * count(contender.model.config).parameters + 3 * (20 + 1) * keys_and_values
