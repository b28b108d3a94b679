from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from factorization_memory.config import ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.generation import (
    SamplingConfig,
    Steps,
    generate,
    generate_batch,
    graph,
    note_on_prompt,
    pool,
    prefill,
    prefill_batch,
)
from factorization_memory.models import LanguageModel, ModelState

TOKENIZER = Tokenizer.bytes_level()
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size + 6,
        hidden_size=32,
        num_layers=2,
        num_states=8,
        top_k=2,
        num_heads=2,
        conv_size=3,
        update_lag=1,
    )
    return LanguageModel(config)


class Script(LanguageModel):
    """A model that writes given tokens, whatever the prompt, one row after the other where samples differ."""

    def __init__(self, rows: list[list[int]]) -> None:
        super().__init__(ModelConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=8, num_layers=1, num_states=2))
        self.rows = rows
        self.batch_sizes: list[int] = []
        self.written: dict[int, int] = {}

    def _logits(self, counts: list[tuple[int, int]]) -> torch.Tensor:
        logits = torch.full((len(counts), self.config.vocab_size), -50.0)
        for row, (script, position) in enumerate(counts):
            logits[row, self.rows[script][position]] = 50.0
        return logits

    def forward(self, tokens: torch.Tensor, state: Any = None, **_: Any) -> tuple[torch.Tensor, ModelState]:
        state = self.initial_state(1)
        return self._logits([(0, 0)])[:, None], state

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, state: ModelState) -> tuple[torch.Tensor, ModelState]:
        # The first number of each row's memory counts its steps.
        memory = state.layers[0].memory
        memory[:, 0, 0, 0] += 1
        self.batch_sizes.append(len(tokens))
        return self._logits([(0, int(count)) for count in memory[:, 0, 0, 0]]), state


def scripted(text: str, **arguments: Any) -> tuple[list[str], Any]:
    tokens = [*TOKENIZER.encode(text), TOKENIZER.document_end]
    pieces: list[str] = []
    result = generate(
        Script([tokens]), TOKENIZER, "x", sampling=GREEDY, on_text=lambda _, piece: pieces.append(piece), **arguments
    )
    return pieces, result[0]


def test_greedy_matches_rereading_everything(model: LanguageModel) -> None:
    prompt = "It was a dark and stormy night"
    (result,) = generate(model, TOKENIZER, prompt, max_tokens=12, sampling=GREEDY, prefill_chunk=7)
    tokens = TOKENIZER.encode(prompt)
    with torch.no_grad():
        for token in result.tokens:
            logits = model(torch.tensor([tokens]))[0][0, -1]
            logits[TOKENIZER.padding] = -torch.inf
            logits[TOKENIZER.vocab_size :] = -torch.inf
            assert token == logits.argmax().item()
            tokens.append(token)
    assert result.prompt_tokens == len(TOKENIZER.encode(prompt))


@pytest.mark.parametrize("chunk", [1, 5, 29, 30, 1000])
def test_prefill_is_the_same_in_any_chunks(model: LanguageModel, chunk: int) -> None:
    tokens = torch.arange(30)
    with torch.no_grad():
        expected, state = model(tokens[None])
        logits, chunked = prefill(model, tokens, chunk)
    torch.testing.assert_close(logits, expected[:, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chunked.layers[1].memory, state.layers[1].memory, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 9, 12, 25, 26, 1000])
def test_prompts_of_any_lengths_are_read_in_any_chunks(model: LanguageModel, chunk: int) -> None:
    prompts = [torch.randint(0, 256, (length,)) for length in (9, 1, 12, 3, 1)]
    logits, state = prefill_batch(model, prompts, chunk)
    assert logits.shape == (5, model.config.vocab_size)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            expected, alone = model(prompt[None])
        torch.testing.assert_close(logits[row], expected[0, -1], rtol=1e-4, atol=1e-5)
        for mine, one in zip(state.tensors(), alone.tensors(), strict=True):
            torch.testing.assert_close(mine[row], one[0], rtol=1e-4, atol=1e-5)


def test_packed_prompts_take_as_many_forwards_as_their_tokens_fill(model: LanguageModel) -> None:
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].shape[1]))
    try:
        prefill_batch(model, [torch.arange(length) for length in (9, 1, 12, 3)], chunk=10)
    finally:
        hook.remove()
    assert sizes == [10, 10, 5]


PROMPTS = [
    "It was a dark and stormy night",
    "x",
    "雨が降る",
    "It was",
    "a much longer prompt than the others are, of more words",
]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.5, top_p=0.9, repetition_penalty=1.2, seed=7)])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_batch_of_prompts_is_each_prompt_alone(model: LanguageModel, sampling: SamplingConfig, num_samples: int) -> None:
    # Some end early, so that batches shrink.
    options: dict[str, Any] = {"max_tokens": 24, "sampling": sampling, "num_samples": num_samples, "stop": ["e", "\x00", "q"]}
    pieces = [""] * (num_samples * len(PROMPTS))

    def on_text(index: int, piece: str) -> None:
        pieces[index] += piece

    together = generate_batch(model, TOKENIZER, PROMPTS, prefill_chunk=16, on_text=on_text, **options)
    alone = [one for prompt in PROMPTS for one in generate(model, TOKENIZER, prompt, **options)]
    for field in ("tokens", "text", "stop_reason", "prompt_tokens"):
        assert [getattr(one, field) for one in together] == [getattr(one, field) for one in alone]
    assert pieces == [one.text for one in together]


def test_where_a_new_size_costs_a_capture_the_ended_stay_until_half_are(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingConfig(temperature=5.0)
    options: dict[str, Any] = {"max_tokens": 64, "sampling": sampling, "num_samples": 12, "stop": ["e", "t", "\x00", "q"]}
    expected = generate_batch(model, TOKENIZER, ["a", "bc"], **options)
    made: list[int] = []

    class Costly(Steps):
        captured = True

        def __init__(self, model: LanguageModel, batch_size: int) -> None:
            super().__init__(model, batch_size)
            made.append(batch_size)
            self.logits = torch.empty(batch_size, model.config.vocab_size)

        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            assert len(tokens) == self.batch_size
            return self.logits.copy_(super().step(tokens))

    monkeypatch.setattr(pool, "steps_for", Costly)
    results = generate_batch(model, TOKENIZER, ["a", "bc"], **options)
    assert [one.tokens for one in results] == [one.tokens for one in expected]
    assert made[0] > 12
    assert len(made) >= 2
    assert all(later <= earlier // 2 for earlier, later in pairwise(made))
    assert max(one.capture_seconds for one in results) > 0
    assert all(one.capture_seconds == 0 for one in expected)


def test_only_text_and_the_document_end_are_drawn(model: LanguageModel) -> None:
    hot = SamplingConfig(temperature=50.0)
    drawn = {t for one in generate(model, TOKENIZER, "a", max_tokens=300, sampling=hot, num_samples=8) for t in one.tokens}
    assert len(drawn) > 200
    assert drawn <= set(range(256)) | {TOKENIZER.document_end}


def test_samples_are_reproducible_and_differ(model: LanguageModel) -> None:
    sampling = SamplingConfig(temperature=1.0, seed=5)
    four = generate(model, TOKENIZER, "a", max_tokens=20, sampling=sampling, num_samples=4)
    again = generate(model, TOKENIZER, "a", max_tokens=20, sampling=sampling, num_samples=4)
    assert [one.tokens for one in four] == [one.tokens for one in again]
    assert len({tuple(one.tokens) for one in four}) == 4
    two = generate(model, TOKENIZER, "a", max_tokens=20, sampling=sampling, num_samples=2)
    assert [one.tokens for one in two] == [one.tokens for one in four[:2]]


def test_pieces_join_to_the_text_of_each_sample(model: LanguageModel) -> None:
    streamed = ["", "", ""]

    def on_text(index: int, piece: str) -> None:
        assert piece
        streamed[index] += piece

    results = generate(
        model, TOKENIZER, "a", max_tokens=40, sampling=SamplingConfig(temperature=1), num_samples=3, on_text=on_text
    )
    assert streamed == [one.text for one in results]


def test_streams_whole_characters_only() -> None:
    pieces, result = scripted("雨が降る。ok")
    assert result.text == "雨が降る。ok"
    assert result.stop_reason == "document_end"
    assert pieces == list("雨が降る。ok")


def test_length_ends_in_the_middle_of_a_character() -> None:
    pieces, result = scripted("雨が", max_tokens=4)
    assert result.stop_reason == "length"
    assert len(result.tokens) == 4
    assert result.text == "".join(pieces) == "雨"


@pytest.mark.parametrize("most", range(1, 12))
def test_no_part_of_a_character_at_the_end(most: int) -> None:
    """Wherever a text is cut, also by the model's own end of document, before or behind a stop string."""
    text = "é雨😀が"
    pieces, result = scripted(text, max_tokens=most)
    assert len(result.tokens) == most
    assert result.text == "".join(pieces) == text.encode()[:most].decode(errors="ignore")
    tokens = [*TOKENIZER.encode(text)[:most], TOKENIZER.document_end]
    (ended,) = generate(Script([tokens]), TOKENIZER, "x", sampling=GREEDY, stop=["が!"])
    assert (ended.text, ended.stop_reason) == (result.text, "document_end")


def test_a_prompt_that_ends_in_a_space_is_noted() -> None:
    trained = Tokenizer.train(["it was a dark and stormy night " * 20], 300)
    assert any(piece == b" dark" for piece in trained.token_bytes)
    assert "'it was ' ends with a space" in (note_on_prompt(trained, "it was ") or "")
    for prompt in ("it was", "it was\n", "それは", "それは　"):
        assert note_on_prompt(trained, prompt) is None
    assert note_on_prompt(TOKENIZER, "it was ") is None  # a space is a token of its own anyway


def test_what_the_model_chose_stays() -> None:
    _, result = scripted("a\ufffdb")
    assert result.text == "a\ufffdb"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "reason"),
    [
        ("one END two", ["END"], "one ", "stop_string"),
        ("one EN two", ["END"], "one EN two", "document_end"),
        ("one EN", ["END"], "one EN", "document_end"),
        ("EEND", ["END"], "E", "stop_string"),
        ("aab", ["ab", "aab"], "", "stop_string"),
        ("雨が降る。次", ["。"], "雨が降る", "stop_string"),
    ],
)
def test_stop_strings_are_cut_off_and_never_streamed(text: str, stop: list[str], expected: str, reason: str) -> None:
    pieces, result = scripted(text, stop=stop)
    assert (result.text, result.stop_reason) == (expected, reason)
    assert "".join(pieces) == expected


def test_text_streams_as_soon_as_no_stop_string_can_begin_in_it() -> None:
    pieces, _ = scripted("ab EN cd", stop=["END"])
    assert pieces == ["a", "b", " ", "EN ", "c", "d"]


def test_a_finished_sample_leaves_the_batch(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MAX_LOOP_SEQUENCES", 0)  # every step calls the model's, which counts
    sizes: list[int] = []
    step = model.step

    def counted(tokens: torch.Tensor, state: ModelState) -> tuple[torch.Tensor, ModelState]:
        sizes.append(len(tokens))
        assert state.batch_size == len(tokens)
        return step(tokens, state)

    model.step = counted  # type: ignore[method-assign]
    try:
        sampling = SamplingConfig(temperature=5.0)
        results = generate(model, TOKENIZER, "a", max_tokens=64, sampling=sampling, num_samples=6, stop=["e", "t", "\x00", "q"])
    finally:
        del model.step
    # A sample of n tokens took part in n - 1 steps: its last token is never read.
    assert sum(sizes) == sum(len(one.tokens) - 1 for one in results)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1


def test_mode_and_gradients_are_as_before(model: LanguageModel) -> None:
    model.train()
    generate(model, TOKENIZER, "a", max_tokens=2)
    assert model.training
    assert torch.is_grad_enabled()
    loss, _ = model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
    loss.backward()
    model.zero_grad()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt=''.*give at least one character"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"stop": [""]}, "stop="),
        ({"stop": "END"}, "stop='END'"),
    ],
)
def test_bad_arguments_name_themselves(model: LanguageModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, TOKENIZER, **{"prompt": "a", **arguments})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], r"prompts=\[\]"), ("abc", "prompts='abc': use a list"), (["a", ""], r"prompts\[1\]='': no token")],
)
def test_bad_lists_of_prompts_name_themselves(model: LanguageModel, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_batch(model, TOKENIZER, prompts)


def test_logits_that_are_not_finite_are_an_error(model: LanguageModel) -> None:
    """Else nothing is written, as if that were the model's choice."""
    damaged = LanguageModel(model.config)
    damaged.load_state_dict(model.state_dict())
    damaged.blocks[1].mixer_norm.weight.data[2] = torch.nan
    for sampling in (GREEDY, SamplingConfig(top_p=0.9, seed=1)):
        with pytest.raises(ValueError, match=r"model: its logits are NaN or infinite after 6 tokens.*earlier checkpoint"):
            generate(damaged, TOKENIZER, "It was", sampling=sampling)


def test_more_samples_than_the_machine_can_hold(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"num_samples=1000000000: .*would take .*ask for fewer"):
        generate(model, TOKENIZER, "It was", num_samples=10**9)


def test_room_for_what_growing_attention_will_keep() -> None:
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=8, num_layers=2, num_states=2, mixers=("memory", "attention")
    )
    growing = LanguageModel(config)
    with pytest.raises(ValueError, match=r"keeps up to 1,000,000,000,006 tokens each, would take .*, or for fewer max_tokens"):
        generate(growing, TOKENIZER, "It was", max_tokens=10**12)
    (one,) = generate(growing, TOKENIZER, "It was", max_tokens=2)
    assert len(one.tokens) <= 2
