"""The models behind the interface of `transformers`: the same numbers by every way that its users have."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel._functions import Gather
from torch.nn.parallel.scatter_gather import gather
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationConfig,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from factorization_memory.config import AttentionConfig, ConfigError, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.models import LanguageModel
from factorization_memory.models.huggingface import (
    CACHE_NAME,
    FactorizationMemoryCache,
    FactorizationMemoryConfig,
    FactorizationMemoryForCausalLM,
    FactorizationMemoryForSequenceClassification,
    FactorizationMemoryModel,
    fast_tokenizer,
)
from factorization_memory.models.huggingface.cache import fingerprint
from factorization_memory.models.pretrained.format import FormatError, config_fields, config_from_fields, load_pretrained
from factorization_memory.models.pretrained.shim import AUTO_MAP

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),  # transformers about its own names
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]

VOCABULARY, END, PADDING = 60, 0, 1
PURE = ModelConfig(vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_states=8, top_k=3, embedding_multiplier=10.0)
CONVOLVED = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_states=8, num_heads=2, conv_size=4, output_gate=True,
    tie_word_embeddings=False,
)  # fmt: skip
ASSOCIATIVE = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_states=8, top_k=3, update_lag=1, rates="head", conv_size=4,
    value_skip=True, output_gate=True, embedding_multiplier=10.0,
)  # fmt: skip
MIXED = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=16, num_layers=4, num_states=8, top_k=2, update_lag=1,
    mixers=("memory", "attention", "mamba2", "gated_deltanet"),
    attention=AttentionConfig(num_heads=4, num_key_value_heads=2, sliding_window=6),
    mamba2=Mamba2Config(state_size=8, head_size=8, chunk_size=4), gated_deltanet=GatedDeltaNetConfig(num_heads=2, head_size=8),
)  # fmt: skip
MODELS = pytest.mark.parametrize(
    "config", [PURE, CONVOLVED, ASSOCIATIVE, MIXED], ids=["pure", "convolved", "associative", "mixed"]
)


def make(config: ModelConfig) -> tuple[LanguageModel, FactorizationMemoryForCausalLM]:
    """A model of random weights large enough that what it says depends on what it has read."""
    ours = LanguageModel(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std(correction=0).clamp(min=0.1))
    return ours, FactorizationMemoryForCausalLM.from_language_model(ours, eos_token_id=END, pad_token_id=PADDING)


def text(*shape: int) -> Tensor:
    """Tokens that are neither padding nor an end."""
    return torch.randint(2, VOCABULARY, shape)


def generated(model: FactorizationMemoryForCausalLM, tokens: Tensor, **options: Any) -> list[list[int]]:
    """What the model continues `tokens` with."""
    options = {"max_new_tokens": 7, "do_sample": False, "suppress_tokens": [END, PADDING], **options}
    result = model.generate(tokens, **options)
    assert isinstance(result, Tensor)
    return result[:, tokens.shape[1] :].tolist()


# -- the same numbers --------------------------------------------------------------------------------------------------------


@MODELS
@torch.no_grad()
def test_logits_are_those_of_the_language_model(config: ModelConfig) -> None:
    ours, theirs = make(config)
    tokens = text(3, 11)
    expected, _ = ours(tokens)
    outputs = theirs(tokens, output_hidden_states=True)
    assert torch.equal(outputs.logits, expected)
    assert torch.equal(theirs(tokens, logits_to_keep=2).logits, expected[:, -2:])
    assert len(outputs.hidden_states) == config.num_layers + 1
    torch.testing.assert_close(theirs.lm_head(outputs.hidden_states[-1]), expected)
    assert torch.equal(theirs(inputs_embeds=theirs.get_input_embeddings()(tokens)).logits, expected)
    assert torch.equal(theirs(tokens, return_dict=False)[0], expected)
    again = theirs.language_model()
    assert torch.equal(again(tokens)[0], expected)
    assert again.embedding.weight is ours.embedding.weight


@MODELS
@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_reading_in_any_pieces(config: ModelConfig, data: st.DataObject) -> None:
    """Pieces, single tokens among them, read with a cache are the whole text."""
    torch.manual_seed(0)
    ours, theirs = make(config)
    tokens = text(2, 12)
    expected, _ = ours(tokens)
    cache, parts, done = None, [], 0
    while done < 12:
        size = data.draw(st.integers(1, 12 - done))
        outputs = theirs(tokens[:, done : done + size], past_key_values=cache, use_cache=True)
        cache, done = outputs[CACHE_NAME], done + size
        parts.append(outputs.logits)
        assert cache.get_seq_length() == done
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


@MODELS
def test_generate_is_the_same_with_and_without_a_cache(config: ModelConfig) -> None:
    _, model = make(config)
    tokens = text(2, 9)
    greedy = generated(model, tokens)
    assert len({tuple(row) for row in greedy}) == 2
    assert generated(model, tokens, use_cache=False) == greedy
    assert generated(model, tokens, prefill_chunk_size=4) == greedy
    assert generated(model, tokens[:1]) == greedy[:1]
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ):
        assert generated(model, tokens, **options) == generated(model, tokens, use_cache=False, **options)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(generated(model, tokens, do_sample=True, num_return_sequences=3, temperature=0.7, use_cache=use_cache))
    assert drawn[0] == drawn[1]
    assert len({tuple(row) for row in drawn[0]}) > 2


@MODELS
def test_generate_with_padding_anywhere(config: ModelConfig) -> None:
    """A text is continued as it is alone, whatever padding stands before, behind or within it; by beams too."""
    ours, model = make(config)
    lengths = (9, 4, 6)
    texts = [text(n) for n in lengths]
    left = torch.full((3, 9), PADDING)
    for row, tokens in zip(left, texts, strict=True):
        row[9 - len(tokens) :] = tokens
    mask = (left != PADDING).long()
    for options in ({}, {"num_beams": 3}):
        together = generated(model, left, attention_mask=mask, **options)
        for row, tokens in zip(together, texts, strict=True):
            assert generated(model, tokens[None], **options) == [row]
    with torch.no_grad():
        holes = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0]])
        shown = torch.full((1, 9), PADDING)
        shown[holes == 1] = texts[2][:5]
        alone, state = ours(texts[2][None, :5])
        outputs = model(shown, attention_mask=holes, use_cache=True)
        torch.testing.assert_close(outputs.logits[holes == 1], alone[0], rtol=1e-4, atol=1e-4)
        if "attention" not in config.layer_mixers:  # whose places hold padding too, unseen
            for mine, expected in zip(outputs[CACHE_NAME].state().tensors(), state.tensors(), strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        # One more token, padding in one of two rows: that row's memory stays.
        cache = model(texts[0][None].expand(2, -1), use_cache=True)[CACHE_NAME]
        more = torch.tensor([[5], [PADDING]])
        model(more, attention_mask=torch.cat((torch.ones(2, 9), (more != PADDING)), dim=1).long(), past_key_values=cache)
        follow = model(torch.tensor([[7], [7]]), past_key_values=cache).logits
        torch.testing.assert_close(
            follow[1], ours(torch.cat((texts[0], torch.tensor([7])))[None])[0][0, -1:], rtol=1e-4, atol=1e-4
        )


@MODELS
def test_packed_sequences_do_not_see_each_other(config: ModelConfig) -> None:
    ours, model = make(config)
    texts = [text(5), text(1), text(7)]
    expected = torch.cat([ours(tokens[None])[0] for tokens in texts], dim=1)
    packed, borders = torch.cat(texts)[None], torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(tokens)) for tokens in texts])[None]
    numbers = torch.tensor([0] * 5 + [1] + [2] * 7)[None]
    given = ({"cu_seqlens": borders}, {"cu_seq_lens_q": borders}, {"position_ids": positions}, {"seq_idx": numbers})
    for options in given:
        torch.testing.assert_close(model(packed, **options).logits, expected, rtol=1e-4, atol=1e-4)
    # Two rows, the second one sequence and padding.
    rows = torch.cat((packed, torch.nn.functional.pad(texts[2], (0, 6), value=PADDING)[None]))
    places = torch.cat((positions, torch.arange(13)[None]))
    mask = torch.tensor([[1] * 13, [1] * 7 + [0] * 6])
    logits = model(rows, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(logits[:1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, :7], expected[0, 6:], rtol=1e-4, atol=1e-4)
    both, numbers = torch.cat((packed, packed)), torch.cat((numbers, torch.zeros_like(numbers)))
    logits = model(both, seq_idx=numbers).logits
    torch.testing.assert_close(logits, torch.cat((expected, ours(packed)[0])), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"seq_idx: got shape \(2, 12\), takes \[2, 13\]"):
        model(both, seq_idx=numbers[:, 1:])
    # Padding within a sequence is as if it were not there, whatever its position.
    mask[0, 3] = mask[1, 3] = mask[1, 4] = 0
    for padding in (0, 3, 99):
        logits = model(rows, attention_mask=mask, position_ids=places.masked_fill(mask == 0, padding)).logits
        left = texts[0][[0, 1, 2, 4]], texts[2][[0, 1, 2, 5, 6]]
        torch.testing.assert_close(logits[0, [0, 1, 2, 4]], ours(left[0][None])[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[:1, 5:], expected[:, 5:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[1, [0, 1, 2, 5, 6]], ours(left[1][None])[0][0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"position_ids: got shape \(3, 13\), takes \[2, 13\]"):
        model(rows, position_ids=places[[0, 0, 1]])


@MODELS
@torch.no_grad()
def test_positions_made_from_a_mask(config: ModelConfig) -> None:
    """As `transformers` makes them, which then tell nothing new: also of padding within a text, and all of a row."""
    _, model = make(config)
    tokens = text(4, 7)
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 1], [0, 0, 1, 0, 1, 1, 0], [0] * 7])
    expected = model(tokens, attention_mask=mask).logits
    positions = mask.cumsum(-1) - 1
    for made in (positions.clamp(min=0), positions.masked_fill(mask == 0, 1), positions.masked_fill(mask == 0, 0)):
        outputs = model(tokens, attention_mask=mask, position_ids=made, use_cache=True)
        assert torch.equal(outputs.logits[mask.bool()], expected[mask.bool()])
        assert outputs[CACHE_NAME].get_seq_length() == 7
    assert torch.equal(model(tokens, position_ids=torch.arange(7)[None]).logits, model(tokens).logits)


@MODELS
def test_hidden_states_that_are_returned_get_gradients(config: ModelConfig) -> None:
    _, model = make(config)
    tokens, mask = text(2, 7), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0, 0]])
    for options in ({}, {"attention_mask": mask}, {"position_ids": packed}, {"position_ids": packed, "attention_mask": mask}):
        outputs = model(tokens, output_hidden_states=True, **options)
        for hidden in outputs.hidden_states:
            assert hidden.shape == (2, 7, config.hidden_size)
            hidden.retain_grad()
        outputs.logits[:, 4].sum().backward()
        for hidden in outputs.hidden_states:
            assert hidden.grad[:, 4].abs().sum(-1).min() > 0
            assert not hidden.grad[:, 5:].any()  # nothing comes back from what follows
        inner = outputs.hidden_states[1]
        assert inner.grad[0, :3].any() == ("position_ids" not in options)


def test_hidden_states_asked_for_in_the_configuration(tmp_path: Path) -> None:
    tokens = text(2, 5)
    config = FactorizationMemoryConfig.from_model_config(PURE, pad_token_id=PADDING, output_hidden_states=True)
    for kind in (FactorizationMemoryModel, FactorizationMemoryForCausalLM, FactorizationMemoryForSequenceClassification):
        model = kind(config).eval()
        assert len(model(tokens).hidden_states) == 3
        assert model(tokens, output_hidden_states=False).hidden_states is None
        model.save_pretrained(tmp_path / kind.__name__)
        assert len(kind.from_pretrained(tmp_path / kind.__name__)(tokens).hidden_states) == 3
        asked = kind.from_pretrained(tmp_path / kind.__name__, output_hidden_states=False)
        assert asked(tokens).hidden_states is None
        assert len(asked(tokens, output_hidden_states=True).hidden_states) == 3


@MODELS
def test_going_on_from_a_kept_state(config: ModelConfig) -> None:
    _, model = make(config)
    prompt, more = text(2, 6), text(2, 3)
    whole = torch.cat((prompt, more), dim=1)
    expected = generated(model, whole)
    with torch.no_grad():
        kept = model(prompt, use_cache=True)[CACHE_NAME]
    for fork in (kept.clone(), copy.deepcopy(kept), kept.detach().clone()):
        assert generated(model, whole, **{CACHE_NAME: fork}) == expected
        assert fork.get_seq_length() == 9 + 6  # all but the last token drawn
    assert generated(model, more, **{CACHE_NAME: kept.clone()}, attention_mask=torch.ones(2, 9).long()) == expected
    beams = kept.clone()
    beams.batch_repeat_interleave(3)
    assert generated(model, whole, **{CACHE_NAME: beams}, num_beams=3) == generated(model, whole, num_beams=3)
    one = kept.clone()
    one.batch_select_indices(torch.tensor([1]))
    assert generated(model, whole[1:], **{CACHE_NAME: one}) == expected[1:]
    assert generated(model, whole, **{CACHE_NAME: kept.clone()}, prefill_chunk_size=2) == expected
    kept.reset()
    assert generated(model, whole, **{CACHE_NAME: kept}) == expected


@MODELS
@torch.no_grad()
def test_a_kept_state_is_continued_only_by_the_text_that_it_has_read(config: ModelConfig) -> None:
    _, model = make(config)
    prompt, more = text(2, 6), text(2, 30)
    whole = torch.cat((prompt, more), dim=1)
    kept = model(prompt, use_cache=True)[CACHE_NAME]
    for other in (prompt, prompt[:, :4], more[:, :6]):
        with pytest.raises(
            ValueError, match=f"{CACHE_NAME}: has read 6 tokens, but the prompt has only {other.shape[1]}; .* clone"
        ):
            generated(model, other, **{CACHE_NAME: kept.clone()})
    for other in (more, torch.cat((prompt[:, [0, 1, 2, 4, 3, 5]], more), dim=1), torch.cat((prompt.flip(0), more), dim=1)):
        with pytest.raises(ValueError, match=f"{CACHE_NAME}: has read 6 tokens, but not the first ones"):
            generated(model, other, **{CACHE_NAME: kept.clone()})
    embeddings = model.get_input_embeddings()
    with pytest.raises(ValueError, match="has read 6 tokens, but the prompt has only 6"):
        model.generate(inputs_embeds=embeddings(prompt), **{CACHE_NAME: kept.clone()}, max_new_tokens=2)
    # Read on with by a first generate(): by its own text it goes on, by another one it does not.
    used = kept.clone()
    answer = torch.tensor(generated(model, whole[:, :9], **{CACHE_NAME: used}))
    with pytest.raises(ValueError, match=f"{CACHE_NAME}: has read 15 tokens, but not the first ones"):
        generated(model, whole, **{CACHE_NAME: used})
    second = torch.cat((whole[:, :9], answer, more[:, :4]), dim=1)
    for options in ({}, {"prefill_chunk_size": 3}):
        assert generated(model, second, **{CACHE_NAME: used.clone()}, **options) == generated(model, second)
    # Memories that change places, as those of beams do.
    kept.reorder_cache(torch.tensor([1, 1, 0]))
    rows = whole[[1, 1, 0]]
    assert generated(model, rows, **{CACHE_NAME: kept.clone()}) == generated(model, rows)
    with pytest.raises(ValueError, match="has read 6 tokens, but not the first ones"):
        generated(model, whole[[0, 1, 1]], **{CACHE_NAME: kept})


@torch.no_grad()
def test_a_kept_state_of_padded_texts() -> None:
    """Padding does not count, whatever id it has; but where it stands does, if the state has read it as text."""
    _, model = make(PURE)
    prompt, more = text(2, 6), text(2, 3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    kept = model(prompt, attention_mask=mask, use_cache=True)[CACHE_NAME]
    whole, wider = torch.cat((prompt, more), dim=1), torch.cat((mask, torch.ones_like(more)), dim=1)
    expected = generated(model, whole, attention_mask=wider)
    whole[0, :2] = PADDING
    assert generated(model, whole, attention_mask=wider, **{CACHE_NAME: kept.clone()}) == expected
    assert generated(model, more, attention_mask=wider, **{CACHE_NAME: kept.clone()}) == expected
    with pytest.raises(ValueError, match="or with other padding"):
        generated(model, whole, attention_mask=torch.ones_like(wider), **{CACHE_NAME: kept.clone()})


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_fingerprints_do_not_depend_on_the_pieces(data: st.DataObject) -> None:
    tokens = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 5), min_size=9, max_size=9), min_size=2, max_size=2)))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=2, max_size=2)))
    for chosen in (None, mask):
        whole, done, found = fingerprint(tokens, chosen, None), 0, None
        while done < 9:
            piece = slice(done, done + data.draw(st.integers(1, 9 - done)))
            found, done = fingerprint(tokens[:, piece], None if chosen is None else chosen[:, piece], found), piece.stop
        assert torch.equal(found, whole)
    for row, kept in zip(tokens, mask, strict=True):
        assert torch.equal(fingerprint(row[None], kept[None], None), fingerprint(row[kept][None], None, None))
    assert (whole[0] == whole[1]) == torch.equal(tokens[0][mask[0]], tokens[1][mask[1]])


@MODELS
@torch.no_grad()
def test_outputs_of_replicas_are_gathered(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.nn.DataParallel` puts together what its replicas return: also the caches, which then can be read on from."""
    _, model = make(config)
    tokens, more = text(4, 7), text(4, 2)
    monkeypatch.setattr(Gather, "apply", lambda _device, dim, *parts: torch.cat(parts, dim))  # on a CPU
    together = gather([model(part, use_cache=True) for part in tokens.split(2)], "cpu")
    expected = model(tokens, use_cache=True)
    torch.testing.assert_close(together.logits, expected.logits)
    cache = together[CACHE_NAME]
    assert cache.get_seq_length() == 7
    torch.testing.assert_close(
        model(more, **{CACHE_NAME: cache}).logits, model(more, **{CACHE_NAME: expected[CACHE_NAME]}).logits
    )
    empty = [FactorizationMemoryCache(config.num_layers) for _ in range(2)]
    assert gather(empty, "cpu").state() is None


def test_streamer_scores_and_embeddings() -> None:
    _, model = make(PURE)
    tokens = text(1, 6)
    expected = generated(model, tokens)

    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Kept()
    generated(model, tokens, streamer=streamer)
    assert streamer.tokens == [*tokens[0].tolist(), *expected[0], -1]
    outputs = model.generate(
        tokens, max_new_tokens=3, do_sample=False, suppress_tokens=[END, PADDING], return_dict_in_generate=True,
        output_scores=True, output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    assert [score.argmax(-1).item() for score in outputs.scores] == expected[0][:3]
    assert len(outputs.hidden_states) == 3
    assert isinstance(outputs[CACHE_NAME], FactorizationMemoryCache)
    embeddings = model.get_input_embeddings()(tokens)
    result = model.generate(inputs_embeds=embeddings, max_new_tokens=7, do_sample=False, suppress_tokens=[END, PADDING])
    assert result.tolist() == expected


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch, tracing its own functions
def test_compiled() -> None:
    """As one graph; generation goes through it too."""
    ours, model = make(replace(CONVOLVED, num_layers=1))
    tokens = text(2, 8)
    expected = generated(model, tokens)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        mask = torch.ones(2, 8, dtype=torch.int64)
        mask[0, :3] = 0
        logits = compiled(tokens, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits[:1, 3:], ours(tokens[:1, 3:])[0], rtol=1e-4, atol=1e-4)
    model.forward = torch.compile(model.forward, backend="eager")
    assert generated(model, tokens) == expected
    torch.compiler.reset()


# -- on disk -----------------------------------------------------------------------------------------------------------------


@MODELS
def test_saved_and_loaded(config: ModelConfig, tmp_path: Path) -> None:
    ours, model = make(config)
    tokens = text(2, 7)
    expected, _ = ours(tokens)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    for folder in ("one", "many"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(loaded) is FactorizationMemoryForCausalLM
        assert torch.equal(loaded(tokens).logits, expected)
        assert (loaded.lm_head.weight is loaded.model.embedding.weight) == config.tie_word_embeddings
        assert loaded.config.model_config() == config_from_fields(config_fields(config))
        assert generated(loaded, tokens) == generated(model, tokens)
        base = AutoModel.from_pretrained(tmp_path / folder)
        assert type(base) is FactorizationMemoryModel
        torch.testing.assert_close(loaded.lm_head(base(tokens).last_hidden_state), expected)
        assert torch.equal(load_pretrained(tmp_path / folder)(tokens)[0], expected)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "one", device_map={"": "cpu"})
    assert torch.equal(mapped(tokens).logits, expected)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert half(tokens, use_cache=True)[CACHE_NAME].state().tensors()[0].dtype == torch.float32
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert torch.equal(wide(tokens).logits, load_pretrained(tmp_path / "half")(tokens)[0])


def test_missing_weights_get_initial_values_and_the_others_stay(tmp_path: Path) -> None:
    _, model = make(CONVOLVED)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = {
        "model.blocks.0.mixer.update_rate.bias", "model.blocks.1.feed_forward.down.weight", "model.final_norm.weight",
        "model.blocks.1.mixer.convolution.weight",
    }  # fmt: skip
    save_file({k: v for k, v in weights.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == lost
    state = loaded.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(state[name], tensor) == (name not in lost), name
    assert torch.equal(state["model.final_norm.weight"], torch.ones(16))
    low, high = (math.log(rate / (1 - rate)) for rate in CONVOLVED.update_rate_init)
    torch.testing.assert_close(state["model.blocks.0.mixer.update_rate.bias"], torch.linspace(low, high, 8).repeat(2))
    down = state["model.blocks.1.feed_forward.down.weight"]
    assert down.std().item() == pytest.approx((4 * down.shape[1]) ** -0.5, rel=0.15)


@MODELS
def test_initial_weights_are_those_of_the_language_model(config: ModelConfig) -> None:
    made = AutoModelForCausalLM.from_config(FactorizationMemoryConfig.from_model_config(config)).language_model()
    for (name, tensor), expected in zip(made.state_dict().items(), LanguageModel(config).state_dict().values(), strict=True):
        if name.endswith(("log_decay_rate", "step_size_bias")):
            continue  # a few random numbers
        assert tensor.std(correction=0).item() == pytest.approx(expected.std(correction=0).item(), rel=0.5, abs=1e-3), name
        assert tensor.mean().item() == pytest.approx(expected.mean().item(), abs=0.2), name


def test_resized_embeddings(tmp_path: Path) -> None:
    for config in (PURE, CONVOLVED):
        ours, model = make(config)
        tokens = text(1, 5)
        expected, _ = ours(tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
            model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
        assert model.config.vocab_size == VOCABULARY + 4
        assert torch.equal(model(tokens).logits[..., :VOCABULARY], expected)
        assert model.language_model().config.vocab_size == VOCABULARY + 4
        model.save_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits.shape[-1] == VOCABULARY + 4


def test_only_safetensors_is_read(tmp_path: Path) -> None:
    _, model = make(PURE)
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"safetensors"):
        FactorizationMemoryForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only safetensors is read"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(FormatError, match=r"pytorch_model\.bin can run code when loaded"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["shard.bin", "../model.safetensors", ""])
def test_an_index_of_other_files(tmp_path: Path, name: str) -> None:
    _, model = make(PURE)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for read in (load_pretrained, AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(FormatError, match="not a safetensors file of this folder"):
            read(tmp_path)


def test_saving_copies_no_code(tmp_path: Path) -> None:
    """Also after `trust_remote_code=True`, which registers classes whose file would be copied beside each model."""
    _, model = make(PURE)
    model.save_pretrained(tmp_path / "one")
    folder = str(tmp_path / "one")
    for auto in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(folder, trust_remote_code=True)
        type(loaded).register_for_auto_class(auto.__name__)
        type(loaded.config).register_for_auto_class()
        loaded.save_pretrained(tmp_path / "two")
        assert [path.name for path in (tmp_path / "two").glob("*.py")] == ["modeling_factorization_memory.py"]
        assert json.loads((tmp_path / "two" / "config.json").read_text())["auto_map"] == AUTO_MAP
        shutil.rmtree(tmp_path / "two")


def test_damaged_folders(tmp_path: Path) -> None:
    _, model = make(PURE)
    model.save_pretrained(tmp_path / "good")

    def broken(name: str, content: bytes) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(tmp_path / "good", folder)
        (folder / name).write_bytes(content)
        return folder

    weights = (tmp_path / "good" / "model.safetensors").read_bytes()
    fields = json.loads((tmp_path / "good" / "config.json").read_text())
    for folder, message in (
        (broken("model.safetensors", weights[:-100]), r"model\.safetensors: damaged or cut short"),
        (broken("config.json", b"{"), r"config\.json: not JSON"),
        (broken("config.json", b"[]"), "not a JSON object"),
        (broken("config.json", b'{"hidden_size": 3}'), "no field 'model_type'"),
        (broken("config.json", json.dumps(fields | {"model_type": "bert"}).encode()), "model_type='bert' is not supported"),
        (broken("config.json", json.dumps(fields | {"model_type": "llama"}).encode()), "num_attention_heads: missing"),
        (broken("config.json", json.dumps(fields | {"top_k": 99}).encode()), r"config\.json: top_k=99: use 1 to num_states=8"),
        (
            broken("config.json", json.dumps(fields | {"num_states": 16}).encode()),
            r"blocks\.0\.mixer\.affinity\.weight' has shape \(8, 16\), but according to config\.json \(16, 16\)",
        ),
        (broken("config.json", json.dumps(fields | {"conv_size": 4}).encode()), r"convolution\.bias' is missing"),
        (broken("config.json", json.dumps(fields | {"num_hidden_layers": 1}).encode()), "is unexpected"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(FormatError, match=message):
            load_pretrained(folder)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # their report above it names the weights
        AutoModelForCausalLM.from_pretrained(broken("config.json", json.dumps(fields | {"num_states": 16}).encode()))


# -- configuration -----------------------------------------------------------------------------------------------------------


@MODELS
def test_configuration_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    fields = config_fields(config)
    assert json.loads(json.dumps(fields)) == fields
    assert config_fields(config_from_fields(fields)) == fields
    made = FactorizationMemoryConfig.from_model_config(config, eos_token_id=END)
    made.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FactorizationMemoryConfig
    assert loaded.to_json_string() == made.to_json_string()
    assert config_fields(loaded.model_config()) == fields
    assert (loaded.num_hidden_layers, loaded.top_k, loaded.eos_token_id) == (config.num_layers, config.top_k, END)


def test_states_of_a_token_are_not_tokens_to_sample_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`top_k` of the model is no setting of sampling, nor is its temperature, whichever way the model came."""
    config = FactorizationMemoryConfig(vocab_size=VOCABULARY, top_k=3, affinity_temperature=0.5)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    default = GenerationConfig()
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (each.generation_config.top_k, each.generation_config.temperature) == (default.top_k, default.temperature)
        assert each.config.top_k == 3
    model.generation_config.update(do_sample=True, top_k=3)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.top_k == 3
    assert not [record for record in caplog.records if "generation flags" in record.getMessage()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_state": 8}, r"num_state=8: no such field; did you mean 'num_states'\?"),
        ({"num_layers": 8}, r"num_layers=8: no such field; did you mean 'num_hidden_layers'\?"),
        ({"top_k": 80}, "top_k=80: use 1 to num_states=64"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: use 1 or more"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
        ({"update_lag": -1}, "update_lag=-1: use 0"),
        ({"affinity_threshold": 0.1}, r"affinity_threshold=0\.1: this field was removed; load models trained with it in"),
        ({"num_heads": "two"}, "num_heads='two': expected int"),
        ({"mixers": ["mamba"]}, r"mixers\[0\]='mamba': use one of"),
        ({"attention": {"heads": 4}}, r"attention\.heads: no such field"),
    ],
)
def test_configurations_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FactorizationMemoryConfig(**fields)


# -- what cannot be done -----------------------------------------------------------------------------------------------------


def test_refused() -> None:
    _, model = make(PURE)
    tokens = text(2, 5)
    cache = model(tokens, use_cache=True)[CACHE_NAME]
    other = make(MIXED)[1](tokens, use_cache=True)[CACHE_NAME]
    ones = torch.ones(2, 5, dtype=torch.int64)
    for message, options in (
        ("has 2 sequences, but the input 1", {"input_ids": tokens[:1], "past_key_values": cache}),
        ("from another model", {"input_ids": tokens, "past_key_values": other}),
        ("got DynamicCache", {"input_ids": tokens, "past_key_values": DynamicCache()}),
        (r"attention_mask: got shape \(2, 4\), takes \[2, 5\]", {"input_ids": tokens, "attention_mask": ones[:, :4]}),
        (r"takes \[2, 1\] or \[2, 6\]", {"input_ids": tokens[:, :1], "past_key_values": cache, "attention_mask": ones}),
        ("takes exactly one", {}),
        ("takes exactly one", {"input_ids": tokens, "inputs_embeds": torch.zeros(2, 5, 16)}),
        (
            "start from empty memory",
            {"input_ids": tokens[:1], "past_key_values": cache.clone(), "cu_seqlens": torch.tensor([0, 5])},
        ),
        ("logits_to_keep=1: cannot be combined with labels", {"input_ids": tokens, "labels": tokens, "logits_to_keep": 1}),
        (r"labels: got shape \(2, 4\), takes .* \[2, 5\]", {"input_ids": tokens, "labels": tokens[:, :-1]}),
        (r"labels: got shape \(2, 1\)", {"input_ids": tokens, "labels": tokens[:, -1:], "logits_to_keep": 1}),
        (r"labels: got shape \(1, 5\)", {"inputs_embeds": torch.zeros(2, 5, 16), "labels": tokens[:1]}),
        (r"labels: got shape \(10,\)", {"input_ids": tokens, "labels": tokens.flatten()}),
    ):
        if "start from empty" in message:
            options["past_key_values"].batch_select_indices(torch.tensor([0]))
        with pytest.raises(ValueError, match=message):
            model(**options)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generated(model, tokens[:1], prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        generated(model, tokens, cache_implementation="static")
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        cache.crop(2)
    with pytest.raises(ValueError, match=r"call the model's push_to_hub\(\)"):
        model.save_pretrained("somewhere", push_to_hub=True)


# -- training ----------------------------------------------------------------------------------------------------------------


@MODELS
def test_loss_and_gradients(config: ModelConfig) -> None:
    """The loss of our own trainer, its gradients, and the same with activation checkpointing."""
    ours, model = make(config)
    model.train()
    tokens = text(2, 9)
    labels = tokens.clone()
    labels[1, 5:] = -100
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected, _ = ours(tokens, targets)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in ours.named_parameters() if parameter.grad is not None}
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for block in ours.blocks:
        block.mixer_norm.register_forward_hook(count)
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = 0
        ours.zero_grad()
        loss = model(tokens, labels=labels).loss
        loss.backward()
        assert calls == config.num_layers * (2 if checkpointed else 1)
        torch.testing.assert_close(loss, expected)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    summed = model(tokens, labels=labels, num_items_in_batch=26).loss
    torch.testing.assert_close(summed, expected * 12 / 26)


@MODELS
def test_hooks_under_gradient_checkpointing(config: ModelConfig) -> None:
    """A hook runs once, though the block's forward runs twice; the gradients are those without checkpointing."""
    model = FactorizationMemoryForCausalLM(FactorizationMemoryConfig.from_model_config(config)).train()
    tokens, calls = text(2, 9), []
    model.model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls.clear()
        loss = model(tokens, labels=tokens).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        if CACHE_NAME == "cache":  # before transformers 5.24 they run again
            assert len(calls) == 1
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected)


def test_sequence_classification(tmp_path: Path) -> None:
    config = FactorizationMemoryConfig.from_model_config(PURE, pad_token_id=PADDING, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert type(model) is FactorizationMemoryForSequenceClassification
    long, short = text(8), text(5)
    batch = torch.stack((long, torch.nn.functional.pad(short, (0, 3), value=PADDING)))
    for tokens in (batch, torch.stack((long, torch.nn.functional.pad(short, (3, 0), value=PADDING)))):
        logits = model(tokens, attention_mask=(tokens != PADDING).long()).logits
        for row, alone in zip(logits, (long, short), strict=True):
            torch.testing.assert_close(row, model(alone[None]).logits[0], rtol=1e-4, atol=1e-5)
    model.train()
    outputs = model(batch, attention_mask=(batch != PADDING).long(), labels=torch.tensor([0, 2]))
    outputs.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(batch).logits, model.eval()(batch).logits)
    loaded.config.pad_token_id = None
    with pytest.raises(ValueError, match="no padding token"):
        loaded(batch)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)  # the body is the same, and its tied head
    assert torch.equal(causal.model.embedding.weight, loaded.model.embedding.weight)


# -- tokenizer ---------------------------------------------------------------------------------------------------------------

SAMPLES = (
    "It was the best of times; it was the worst of times.\n\n  Don't you think so?",
    "吾輩は猫である。名前はまだ無い。\n　どこで生れたかとんと見当がつかぬ。カタカナのﾃｽﾄ、１２３。",
    "mixed 日本語 and English 😀 e\u0301 \ttabs",
    "a </s> in the text, and <pad>",
)


def test_tokenizer(tmp_path: Path) -> None:
    """The same ids as ours, special tokens in a text included, also after it was saved; and the text back."""
    ours = Tokenizer.train(SAMPLES * 4, vocab_size=400)
    ours.save(tmp_path / "tokenizer.json")
    theirs = fast_tokenizer(tmp_path / "tokenizer.json")
    theirs.save_pretrained(tmp_path / "saved")
    from transformers import AutoTokenizer

    for tokenizer in (theirs, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (ours.document_end, ours.padding)
        assert tokenizer.padding_side == "left"
        assert len(tokenizer) == ours.vocab_size
        for sample in SAMPLES:
            ids = tokenizer(sample)["input_ids"]
            assert ids == ours.encode(sample)
            assert tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        batch = tokenizer(list(SAMPLES), padding=True, return_tensors="pt")
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch["attention_mask"][:, -1].all()


def test_pipeline(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes_level()
    tokenizer.save(tmp_path / "tokenizer.json")
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_states=8, top_k=3)
    _, model = make(config)
    model.save_pretrained(tmp_path / "model")
    fast_tokenizer(tmp_path / "tokenizer.json").save_pretrained(tmp_path / "model")
    write = pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    prompts = ["It was", "それは猫で", "a"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [write(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = [each[0]["generated_text"] for each in write(prompts, batch_size=3, **options)]
    assert together == alone
