from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factorization_memory.generation import SamplingConfig, sample, sample_generators
from factorization_memory.generation.sampling import Uniforms


def draws(logits: list[float], count: int = 2000, history: torch.Tensor | None = None, **fields: float) -> torch.Tensor:
    rows = torch.tensor(logits).expand(count, -1)
    if history is not None:
        history = history.expand(count, -1)
    return sample(rows, SamplingConfig(**fields), sample_generators(0, count), history)


def shares(tokens: torch.Tensor, size: int) -> list[float]:
    return (torch.bincount(tokens, minlength=size) / len(tokens)).tolist()


def test_draws_follow_the_softmax() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    drawn = shares(draws(logits, count=4000, temperature=1.0), 4)
    assert drawn == pytest.approx(torch.tensor(logits).softmax(0).tolist(), abs=0.03)


def test_temperature_sharpens_and_zero_is_greedy() -> None:
    logits = [0.0, 1.0, 0.5]
    drawn = shares(draws(logits, temperature=0.25), 3)
    assert drawn == pytest.approx((torch.tensor(logits) / 0.25).softmax(0).tolist(), abs=0.03)
    assert draws(logits, temperature=0.0).tolist() == [1] * 2000
    # A temperature too small for float32 to divide by is greedy in effect, not NaN.
    assert set(draws([300.0, 301.0, 0.0], temperature=1e-6).tolist()) == {1}


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.45}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"min_p": 0.35}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        # Of the two that top-k leaves the first has 5/8: the order of the filters shows.
        ({"top_k": 2, "top_p": 0.6}, {0}),
    ],
)
def test_filters_keep_exactly(fields: dict[str, float], kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.19, 0.01]).log().tolist()
    assert set(draws(logits, temperature=1.0, **fields).tolist()) == kept


def test_filters_choose_by_probability_not_by_position() -> None:
    logits = torch.tensor([0.01, 0.3, 0.19, 0.5]).log().tolist()
    assert set(draws(logits, temperature=1.0, top_k=2).tolist()) == {1, 3}


def test_repetition_penalty_lowers_seen_tokens_whatever_their_sign() -> None:
    history = torch.tensor([[True, False, False]])
    assert draws([1.0, 0.9, -5.0], 1, history, temperature=0.0, repetition_penalty=1.5).item() == 1
    assert draws([-0.5, -0.6, -5.0], 1, history, temperature=0.0, repetition_penalty=1.5).item() == 1
    assert draws([1.0, 0.9, -5.0], 1, history, temperature=0.0).item() == 0


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-40, 40), min_size=2, max_size=12),
    barred=st.integers(0, 11),
    temperature=st.floats(0.0, 3.0),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(1e-6, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)
def test_a_barred_token_is_never_drawn(
    logits: list[float], barred: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    row = torch.tensor(logits)
    row[barred % len(logits)] = -torch.inf
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = sample(row.expand(32, -1), config, sample_generators(1, 32))
    assert ((drawn >= 0) & (drawn < len(logits))).all()
    assert (drawn != barred % len(logits)).all()


def test_numbers_drawn_in_blocks_are_those_drawn_one_by_one() -> None:
    config, logits = SamplingConfig(temperature=1.0), torch.randn(3, 50)
    generators, uniforms = sample_generators(7, 3), Uniforms(3, torch.device("cpu"))
    for slot, generator in enumerate(sample_generators(7, 3)):
        uniforms.begin(slot, generator)
    for _ in range(2 * Uniforms.block + 3):
        assert torch.equal(sample(logits, config, generators), sample(logits, config, uniforms.peek()))
        uniforms.advance()


def test_numbers_of_a_slot_begin_with_its_generator_and_go_where_it_goes() -> None:
    first, second, third = (torch.rand(200, generator=one, dtype=torch.float64) for one in sample_generators(7, 3))
    generators, uniforms = sample_generators(7, 3), Uniforms(3, torch.device("cpu"))
    uniforms.begin(1, generators[0])
    for t in range(50):
        assert uniforms.peek()[1] == uniforms.peek()[1] == first[t]
        uniforms.advance()
    uniforms.begin(2, generators[1])
    for t in range(70):
        assert uniforms.peek()[1:].tolist() == [first[50 + t], second[t]]
        uniforms.advance()
    uniforms.end(1)
    uniforms.begin(0, generators[2])
    uniforms.select([2, 0])
    for t in range(70):
        assert uniforms.peek().tolist() == [second[70 + t], third[t]]
        uniforms.advance()


def test_a_sample_depends_on_the_seed_and_its_index_only() -> None:
    logits = torch.zeros(1, 1000)
    config = SamplingConfig(temperature=1.0)
    five = sample(logits.expand(5, -1), config, sample_generators(3, 5))
    two = sample(logits.expand(2, -1), config, sample_generators(3, 2))
    assert five[:2].tolist() == two.tolist()
    assert len(set(five.tolist())) == 5
    assert sample(logits.expand(5, -1), config, sample_generators(4, 5)).tolist() != five.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_bad_values_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"sampling\.{field}="):
        SamplingConfig(**{field: value})
