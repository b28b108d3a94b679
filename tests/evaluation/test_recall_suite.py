"""The recall suite: who recalls all gets 1, who guesses gets chance, and how the model reads makes no difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from factorization_memory.config import AttentionConfig, Mamba2Config, ModelConfig
from factorization_memory.data.shards import pack
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation.recall_figures import standard_error
from factorization_memory.evaluation.recall_needles import LANGUAGES, NUM_CANDIDATES
from factorization_memory.evaluation.recall_suite import evaluate_recall, headline, held_out_texts
from factorization_memory.models import LanguageModel

TOKENIZER = Tokenizer.bytes_level()
ENGLISH = "".join(f"On day {i} of the journey nothing was seen but the grey and empty moor.\n" for i in range(60))
JAPANESE = "".join(f"旅の{i}日目も、見えたのは灰色の荒野ばかりであった。" for i in range(60))
TEXTS = {"books": np.array(TOKENIZER.encode(ENGLISH)), "hon": np.array(TOKENIZER.encode(JAPANESE))}
SMALL: dict[str, Any] = {"items": 4, "lengths": (128, 512), "needles": (1, 4), "pairs": (2, 8), "copies": (8, 32)}


class Read:
    """All that was read, as a state."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.batch_size, self.num_bytes = len(tokens), tokens.numel()

    def select(self, rows: list[int]) -> Read:
        return Read(self.tokens[rows])


class Reader(nn.Module):
    """A model that has no weights: what comes next is a function of all that was read."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig(vocab_size=TOKENIZER.vocab_size)
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, state: Read | None = None, last_only: bool = False) -> tuple[Tensor, Read]:
        before = 0 if state is None else state.tokens.shape[1]
        whole = tokens if state is None else torch.cat((state.tokens, tokens), 1)
        first = whole.shape[1] - 1 if last_only else before
        logits = torch.stack(
            [torch.stack([self.next(row[: end + 1].tolist()) for end in range(first, len(row))]) for row in whole]
        )
        return logits, Read(whole)

    def next(self, text: list[int]) -> Tensor:
        raise NotImplementedError


class Perfect(Reader):
    """Goes on as the text did where it was last like its end, on the longest stretch."""

    def next(self, text: list[int]) -> Tensor:
        read, logits = bytes(text), torch.zeros(self.config.vocab_size)
        for length in range(min(len(read) - 1, 40), 0, -1):
            place = read[:-1].rfind(read[-length:])
            if place >= 0:
                logits[read[place + length]] = 50.0
                break
        return logits


class Guessing(Reader):
    """Knows nothing but the last token, to which it has an opinion at random."""

    def next(self, text: list[int]) -> Tensor:
        seed = (sum(text) * 7919 + len(text)) % (1 << 31)  # of another text, another opinion
        return torch.randn(self.config.vocab_size, generator=torch.Generator().manual_seed(seed))


class Indifferent(Reader):
    """Finds everything equally likely."""

    def next(self, text: list[int]) -> Tensor:
        return torch.zeros(self.config.vocab_size)


def evaluate(model: nn.Module, **changes: Any) -> dict[str, Any]:
    return evaluate_recall(model, TOKENIZER, TEXTS, **(SMALL | changes))  # type: ignore[arg-type]


def test_who_recalls_all_gets_everything_right() -> None:
    record = evaluate(Perfect())
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    for part in (record["associative"], *record["needle"].values()):
        for name in part.keys() - {"language"}:
            for row in part[name]:
                assert row["choice"] == row["exact"] == 1
                # All right is no certainty: as if half a query had failed.
                smoothed = (row["asked"] + 0.5) / (row["asked"] + 1)
                least = (smoothed * (1 - smoothed) / row["asked"]) ** 0.5
                assert row["choice_error"] == (pytest.approx(least) if row["sequences"] > 1 else None)
    copies = record["copy"]["random"]["by_length"]
    assert [row["length"] for row in copies] == [8, 32]
    assert all(row["loss"] < row["first_loss"] and row["tokens"] == 8 * row["length"] for row in copies)
    assert copies[0]["accuracy"] == 1
    assert record["needle"].keys() == {"books", "hon"}
    assert record["copy"].keys() == {"random", "books", "hon"}
    assert [record["needle"][name]["language"] for name in TEXTS] == list(LANGUAGES)
    by_length = record["needle"]["books"]["by_length"]
    assert [(row["length"], row["needles"], row["sequences"], row["asked"]) for row in by_length] == [
        (128, 1, 4, 4), (512, 1, 4, 4), (512, 4, 4, 16),
    ]  # fmt: skip
    assert any("books, haystacks of 128 tokens with 4 needles" in each for each in record["left_out"])
    assert [row["asked"] for row in record["associative"]["by_pairs"]] == [32, 128]
    assert sum(row["asked"] for row in record["associative"]["by_distance"]) == 128
    for name in ("by_needles", "by_depth", "by_distance"):
        assert sum(row["asked"] for row in record["needle"]["books"][name]) == 24
    shares = headline(record)
    assert shares["needle"] == {"books": 1, "hon": 1}
    assert shares["associative"] == {"random": 1}


def test_who_guesses_gets_chance() -> None:
    record = evaluate(Guessing(), items=60, lengths=(128,), needles=(1,), pairs=(4,), copies=(16,))
    pairs, needle = record["associative"]["by_pairs"][0], record["needle"]["books"]["by_length"][0]
    assert pairs["chance"] == 1 / 4
    assert needle["chance"] == 1 / NUM_CANDIDATES
    for row in (pairs, needle):
        error = (row["chance"] * (1 - row["chance"]) / row["asked"]) ** 0.5
        assert abs(row["choice"] - row["chance"]) < 3 * error
        assert row["choice_error"] == pytest.approx(error, rel=0.5)
        assert row["exact"] < 0.05
    assert record["copy"]["random"]["by_length"][0]["accuracy"] < 0.02


def test_answers_of_one_sequence_are_not_independent() -> None:
    """All or none of a sequence's answers right: as uncertain as one answer of each."""
    together, apart = standard_error([8, 0, 8, 0, 8, 0], [8] * 6), standard_error([4, 4, 4, 4, 4, 4], [8] * 6)
    assert together == pytest.approx((6 / 5 * 0.25 / 6) ** 0.5)
    assert apart == pytest.approx((0.25 / 48) ** 0.5)
    assert standard_error([3], [4]) is None


def test_a_tie_is_no_right_answer() -> None:
    """The right answer must not win because it is listed first."""
    record = evaluate(Indifferent(), items=40, lengths=(128,), needles=(1,), pairs=(4,), copies=(8,))
    assert record["associative"]["by_pairs"][0]["choice"] == 1 / 4
    assert record["needle"]["books"]["by_length"][0]["choice"] < 0.4


MODELS = {
    "memory": ModelConfig(hidden_size=16, num_layers=2, num_states=8, top_k=2, conv_size=4),
    "attention": ModelConfig(hidden_size=16, num_layers=2, mixers=("attention",)),
    "window": ModelConfig(
        hidden_size=16, num_layers=2, mixers=("memory", "attention"), attention=AttentionConfig(num_heads=2, sliding_window=32)
    ),
    "mamba2": ModelConfig(hidden_size=16, num_layers=2, mixers=("mamba2",), mamba2=Mamba2Config(state_size=8, head_size=8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_pieces_and_batches_make_no_difference(name: str) -> None:
    torch.manual_seed(0)
    config = MODELS[name]
    model = LanguageModel(ModelConfig(**{**vars(config), "vocab_size": TOKENIZER.vocab_size})).double()
    whole, parts = (evaluate(model, **how) for how in ({"segment": 4096}, {"segment": 37, "batch_size": 3}))
    assert model.training
    for source in TEXTS:
        assert whole["needle"][source] == parts["needle"][source]
    assert whole["associative"] == parts["associative"]
    for source, copies in whole["copy"].items():
        for row, other in zip(copies["by_length"], parts["copy"][source]["by_length"], strict=True):
            assert row == pytest.approx(other, rel=1e-5)


def test_held_out_texts_hold_no_special_tokens(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 50)
    corpus = pack([("books", tmp_path)], TOKENIZER, tmp_path / "packed", holdout="tail", holdout_fraction=0.5)
    tokens = corpus.sources["books"].splits["validation"].tokens
    text = held_out_texts(corpus)["books"]
    assert TOKENIZER.document_end in tokens.tolist()
    assert text.tolist() == [token for token in tokens.tolist() if token != TOKENIZER.document_end]


def test_what_is_left_out_is_said() -> None:
    said: list[tuple[str, int, int]] = []
    texts = {"long": TEXTS["books"], "short": TEXTS["books"][:70]}
    record = evaluate_recall(
        Indifferent(), TOKENIZER, texts, items=1, lengths=(128, 1 << 20), needles=(1,), pairs=(2, 200), copies=(8, 200),  # type: ignore[arg-type]
        progress=lambda what, done, total: said.append((what, done, total)),
    )  # fmt: skip
    assert record["needle"].keys() == {"long"}
    assert [row["length"] for row in record["needle"]["long"]["by_length"]] == [128]
    assert [row["length"] for row in record["copy"]["short"]["by_length"]] == [8]
    left_out = "\n".join(record["left_out"])
    assert "short, haystacks of 128 tokens: its text has 70 tokens" in left_out
    assert "long, haystacks of 1048576 tokens" in left_out
    assert "200 pairs: need 400 different tokens, but the vocabulary has 256" in left_out
    assert "short, copies: length=200: the text has 70 tokens" in left_out
    assert {what for what, _, _ in said} == {"needles, long", "keys and values", "copies"}
    assert all(done <= total for _, done, total in said)


def test_nothing_to_ask() -> None:
    with pytest.raises(ValueError, match=r"no text fills a haystack of 128, 512 tokens \(available tokens: short 50\)"):
        evaluate_recall(Indifferent(), TOKENIZER, {"short": TEXTS["books"][:50]}, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="items=0: use 1 or more"):
        evaluate(Indifferent(), items=0)
    with pytest.raises(ValueError, match=r"lengths=\(\): use 1 or more"):
        evaluate(Indifferent(), lengths=())
