"""Requests that come and go between steps are each continued as if it were alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factorization_memory.config import AttentionConfig, Mamba2Config, ModelConfig
from factorization_memory.generation import Engine, LogitsError, Request, SamplingConfig, Steps, pool, steps_for
from factorization_memory.generation.pool import FREE_SLOT_TOKENS, slot_bytes
from factorization_memory.models import LanguageModel

VOCABULARY = 30
FORMS: dict[str, dict[str, Any]] = {
    "memory": {},
    "sparse, associative": {"top_k": 2, "num_heads": 2, "conv_size": 3, "update_lag": 1},
    "window": {"mixers": ("attention",), "attention": AttentionConfig(num_heads=2, sliding_window=4)},
    "mixed": {"mixers": ("memory", "attention"), "attention": AttentionConfig(num_heads=2, sliding_window=4)},
    "growing": {"mixers": ("memory", "attention"), "attention": AttentionConfig(num_heads=2)},
    "mamba2": {"mixers": ("mamba2",), "mamba2": Mamba2Config(head_size=8)},
    "gated_deltanet": {"mixers": ("gated_deltanet",)},
}
GREEDY = SamplingConfig(temperature=0)
BARRED = torch.arange(VOCABULARY) % 3 == 0
REQUESTS = [
    Request([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], GREEDY),
    Request([7], SamplingConfig(temperature=2.0, seed=5)),
    Request([7], SamplingConfig(temperature=2.0, seed=5), sample=1),
    Request([2, 8], SamplingConfig(temperature=3.0, seed=6), barred=BARRED),
    Request([2, 8, 2], SamplingConfig(temperature=1.5, top_p=0.9, repetition_penalty=1.3, seed=1)),
    Request([11] * 6, SamplingConfig(temperature=0, repetition_penalty=1.7), barred=BARRED),
    Request([2, 8, 2], SamplingConfig(temperature=1.5, top_k=9, min_p=0.01, seed=2)),
]


@cache
def build(form: str) -> LanguageModel:
    """In float64, so that rounding, which depends on the size of a batch, decides no draw."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_states=6, **FORMS[form])
    return LanguageModel(config).double().eval()


@cache
def alone(form: str, number: int, tokens: int = 130) -> list[int]:
    """The first tokens of one of REQUESTS."""
    engine = Engine(build(form), 1)
    engine.admit([REQUESTS[number]])
    return [engine.step()[0] for _ in range(tokens)]


def made(monkeypatch: pytest.MonkeyPatch) -> list[Steps]:
    """All `Steps` that engines make from now on."""
    found: list[Steps] = []

    def recorded(model: LanguageModel, batch_size: int) -> Steps:
        found.append(steps_for(model, batch_size))
        return found[-1]

    monkeypatch.setattr(pool, "steps_for", recorded)
    return found


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(list(FORMS)), st.integers(1, 4))
def test_any_schedule_gives_each_request_its_tokens(data: st.DataObject, form: str, slots: int) -> None:
    engine = Engine(build(form), slots, prefill_chunk=data.draw(st.sampled_from([None, 5])))
    read = engine.prefill([request.prompt for request in REQUESTS]) if data.draw(st.booleans()) else None  # type: ignore[misc]
    running: dict[int, tuple[int, list[int]]] = {}
    for action in data.draw(st.lists(st.sampled_from(["admit", "step", "step", "release", "compact"]), max_size=25)):
        if action == "admit":
            numbers = data.draw(st.lists(st.integers(0, len(REQUESTS) - 1), max_size=len(engine.free)))
            requests = [REQUESTS[number] for number in numbers]
            if read is not None:
                requests = [
                    Request(read[number], one.sampling, one.sample, one.barred)
                    for number, one in zip(numbers, requests, strict=True)
                ]
            admitted = engine.admit(requests)
            assert len(admitted) == len(numbers)
            assert not running.keys() & set(admitted)
            running |= {slot: (number, []) for slot, number in zip(admitted, numbers, strict=True)}
        elif action == "step":
            drawn = engine.step()
            assert list(drawn) == sorted(running)
            for slot, token in drawn.items():
                number, tokens = running[slot]
                tokens.append(token)
                assert tokens == alone(form, number)[: len(tokens)]
        elif action == "release" and running:
            slot = data.draw(st.sampled_from(sorted(running)))
            engine.release(slot)
            del running[slot]
        elif action == "compact" and running:
            running = {new: running[old] for new, old in enumerate(engine.compact())}
            assert engine.slots == len(running)
        assert engine.running == sorted(running)
        assert sorted(engine.running + engine.free) == list(range(engine.slots))


@pytest.mark.parametrize("form", list(FORMS))
def test_nothing_is_left_of_the_request_that_had_the_slot(form: str) -> None:
    engine = Engine(build(form), 2)
    engine.admit([REQUESTS[1]])
    for number in (5, 4, 6, 5, 4):
        (slot,) = engine.admit([REQUESTS[number]])
        assert [engine.step()[slot] for _ in range(25)] == alone(form, number)[:25]
        engine.release(slot)


@pytest.mark.parametrize("form", list(FORMS))
def test_greedy_is_reading_everything_again(form: str) -> None:
    tokens = list(REQUESTS[0].prompt)  # type: ignore[arg-type]
    with torch.no_grad():
        for token in alone(form, 0)[:10]:
            assert token == build(form)(torch.tensor([tokens]))[0][0, -1].argmax().item()
            tokens.append(token)


def test_barred_tokens_and_streams_of_numbers() -> None:
    assert not any(BARRED[token] for number in (3, 5) for token in alone("memory", number))
    assert alone("memory", 1) != alone("memory", 2)


@pytest.mark.parametrize("form", ["mixed", "growing"])
def test_a_pool_is_made_once_whatever_comes_and_goes(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a growing state keeps is that of the longest request, not of all that a slot has been fed."""
    expected, pools = alone(form, 1)[:40], made(monkeypatch)
    engine = Engine(build(form), 3)
    (slot,) = engine.admit([REQUESTS[1]])
    for _ in range(12):
        assert [engine.step()[slot] for _ in range(40)] == expected
        (following,) = engine.admit([REQUESTS[1]])
        engine.release(slot)
        slot = following
    assert len(pools) == 1
    if form == "growing":
        assert pools[0].state.layers[1].capacity <= 4 * FREE_SLOT_TOKENS  # type: ignore[attr-defined]


def test_a_growing_pool_is_let_go_when_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for form, times in (("growing", 2), ("mixed", 1)):
        expected, pools = alone(form, 0)[:5], made(monkeypatch)
        engine = Engine(build(form), 1)
        for _ in range(2):
            (slot,) = engine.admit([REQUESTS[0]])
            assert [engine.step()[slot] for _ in range(5)] == expected
            engine.release(slot)
        assert len(pools) == times
        monkeypatch.undo()


def test_a_request_of_one_token_takes_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, pools = alone("memory", 0)[0], made(monkeypatch)
    engine = Engine(build("memory"), 2)
    engine.admit([REQUESTS[0]])
    assert engine.step() == {0: expected}
    engine.release(0)
    assert engine.step() == {}
    assert not pools


def test_the_state_of_a_prompt_goes_when_it_is_copied() -> None:
    engine = Engine(build("memory"), 2)
    engine.admit([REQUESTS[0]])
    engine.step()
    read = engine.prefill([[1, 2, 3]])
    state = weakref.ref(read[0].state)
    engine.admit([Request(read[0])])
    del read
    engine.step()
    assert state() is not None
    engine.step()
    assert state() is None


@pytest.mark.parametrize("form", ["sparse, associative", "growing"])
def test_inside_and_outside_of_inference_mode(form: str) -> None:
    """What is made in one can be changed in the other."""
    model = build(form)
    for first in (True, False):
        with torch.inference_mode(first):
            engine = Engine(model, 3)
            engine.admit([REQUESTS[0], REQUESTS[1], REQUESTS[4]])
        found = []
        for number in range(6):
            with torch.inference_mode((number % 2 == 0) == first):
                found.append(engine.step())
                if number == 2:
                    engine.release(0)
                    assert engine.compact() == [1, 2]
        tokens = [alone(form, number)[:6] for number in (1, 4)]
        assert [[drawn[slot + (t < 3)] for t, drawn in enumerate(found)] for slot in range(2)] == tokens


def test_slots_are_given_up_where_steps_get_cheaper() -> None:
    engine = Engine(build("memory"), 3)
    engine.admit([REQUESTS[0], REQUESTS[1], REQUESTS[4]])
    assert not engine.worth_compacting()
    engine.step()
    engine.release(1)
    assert engine.worth_compacting()
    assert engine.compact() == [0, 2]
    assert engine.step() == {0: alone("memory", 0)[1], 1: alone("memory", 4)[1]}
    engine.release(0)
    engine.release(1)
    assert engine.compact() == [0]
    assert engine.admit([REQUESTS[1]]) == [0]
    assert engine.step() == {0: alone("memory", 1)[0]}


def test_logits_that_are_not_finite_harm_no_other_request() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=VOCABULARY, hidden_size=16, num_layers=1, num_states=4, tie_word_embeddings=False)
    model = LanguageModel(config).double().eval()
    model.embedding.weight.data[7] = torch.nan
    no_seven, only_seven = torch.arange(VOCABULARY) == 7, torch.arange(VOCABULARY) != 7
    sound = Request([1, 2], SamplingConfig(temperature=2.0), barred=no_seven)
    by_itself = Engine(model, 1)
    by_itself.admit([sound])
    expected = [by_itself.step()[0] for _ in range(6)]

    engine = Engine(model, 3)
    engine.admit([sound])
    tokens = [engine.step()[0]]
    engine.admit([Request([7, 3]), Request([1, 2], barred=only_seven)])
    for _ in range(2):  # nothing is drawn, however often it is asked for
        with pytest.raises(LogitsError, match=r"NaN or infinite after 2 tokens; .* torch.float64") as broken:
            engine.step()
        assert broken.value.slots == [1]
    engine.release(1)
    tokens.append(engine.step()[0])
    with pytest.raises(ValueError, match=r"NaN or infinite after 3 tokens") as broken:
        engine.step()
    assert broken.value.slots == [2]  # type: ignore[attr-defined]
    engine.release(2)
    assert engine.compact() == [0]
    tokens += [engine.step()[0] for _ in range(4)]
    assert tokens == expected


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([REQUESTS[0], Request([])], r"requests\[1\].prompt=\[\]: no token to start from; give at least one id"),
        ([Request([1, 30])], r"requests\[0\].prompt: contains the id 30; use ids from 0 to 29"),
        ([Request([-1])], r"requests\[0\].prompt: contains the id -1;"),
        ([Request([1.5])], r"requests\[0\].prompt: got \[1.5\], takes token ids, integers from 0 to 29"),  # type: ignore[list-item]
        ([Request("text")], r"requests\[0\].prompt: got 'text', takes token ids"),  # type: ignore[arg-type]
        ([Request([2**70])], r"requests\[0\].prompt: got \[1180591620717411303424\], takes token ids"),
        ([Request([1], sample=-1)], r"requests\[0\].sample=-1: use a sample number, 0 or more"),
        (
            [Request([1], barred=torch.zeros(4).bool())],
            r"requests\[0\].barred: got torch.bool of shape \(4,\), takes .*\(30,\)",
        ),
        ([Request([1], barred=torch.ones(30).bool())], r"requests\[0\].barred: bars all 30 ids"),
        ([REQUESTS[0]] * 3, r"requests: got 3, and 2 of 3 slots are free; release some, or admit fewer"),
    ],
)
def test_a_request_that_cannot_be_served_changes_nothing(requests: list[Request], message: str) -> None:
    engine = Engine(build("memory"), 3)
    engine.admit([REQUESTS[4]])
    tokens = [engine.step()[0] for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        engine.admit(requests)
    assert (engine.running, engine.free) == ([0], [1, 2])
    tokens += [engine.step()[0] for _ in range(3)]
    assert tokens == alone("memory", 4)[:6]


def test_bad_arguments_name_themselves() -> None:
    model = build("memory")
    for slots, message in ((0, "slots=0: use 1 or more"), (10**12, "slots=1000000000000: .* would take .*; use fewer")):
        with pytest.raises(ValueError, match=message):
            Engine(model, slots)
    with pytest.raises(ValueError, match="prefill_chunk=0: use 1 or more"):
        Engine(model, 1, prefill_chunk=0)
    engine = Engine(model, 2)
    engine.admit([REQUESTS[0]])
    with pytest.raises(ValueError, match=r"slot=1: no request runs in it; the running slots are \[0\]"):
        engine.release(1)
    with pytest.raises(ValueError, match=r"prompts\[1\]=\[\]: no token"):
        engine.prefill([[1], []])
    (read,) = Engine(build("mixed"), 1).prefill([[1]])
    with pytest.raises(ValueError, match=r"requests\[0\].prompt: was prefilled by another model; prefill it with this engine"):
        engine.admit([Request(read)])
    assert engine.prefill([]) == engine.admit([]) == []


@pytest.mark.parametrize("form", list(FORMS))
def test_what_a_slot_takes_is_counted_without_taking_it(form: str) -> None:
    model = build(form)
    assert slot_bytes(model, 9) == model.initial_state(1, 9).num_bytes + 8 * VOCABULARY
    assert (slot_bytes(model, 10**12) > 10**12) == (form == "growing")


@pytest.fixture
def free_order() -> Iterator[None]:
    """Some of PyTorch's kernels on GPUs have no deterministic form that its switch would accept."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
@pytest.mark.usefixtures("free_order")
def test_requests_that_come_and_go_are_served_by_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=VOCABULARY, hidden_size=64, num_layers=2, num_states=16, top_k=2, num_heads=2)
    model = LanguageModel(config).cuda().eval()
    pools = made(monkeypatch)
    requests = [Request([number, 7], SamplingConfig(temperature=2.0, seed=number)) for number in range(12)]
    alone = Engine(model, 3)
    expected = []
    for request in requests:
        (slot,) = alone.admit([request])
        expected.append([alone.step()[slot] for _ in range(9)])
        alone.release(slot)
    engine = Engine(model, 3)
    found: dict[int, list[int]] = {}
    there: dict[int, int] = {}
    while len(found) < len(requests) or there:
        if engine.free and len(found) < len(requests):
            (slot,) = engine.admit([requests[len(found)]])
            there[slot] = len(found)
            found[len(found)] = []
        for slot, token in engine.step().items():
            found[there[slot]].append(token)
            if len(found[there[slot]]) == 9:
                engine.release(slot)
                del there[slot]
    assert list(found.values()) == expected
    assert [steps.captured for steps in pools] == [True, True]
    assert engine.capture_seconds > 0
