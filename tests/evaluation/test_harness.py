"""Our adapter of lm-evaluation-harness against its own one on the same model, on local data laid out like standard tasks."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance

from factorization_memory.config import ConfigError, ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation import harness_index
from factorization_memory.evaluation.harness import Decoding, FactorizationMemoryLM
from factorization_memory.evaluation.harness_tasks import HarnessDataError, choose_tasks, run_tasks
from factorization_memory.models import LanguageModel

WORDS = [
    "the", "of", "river", "stone", "wind", "moon", "walks", "sings", "over", "under", "bright", "old", "never", "again",
]  # fmt: skip
KANJI = list("猫犬川石風月山空海のはがをにで")
STANDARD = ("hellaswag", "lambada_openai", "ja_leaderboard_jcommonsenseqa")


def sentence(random: np.random.Generator, words: int) -> str:
    return " ".join(random.choice(WORDS, words))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows like those of three standard tasks, and tasks of our own: one of texts, one to generate."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    hellaswag = [
        {
            "activity_label": "Walking", "ctx_a": sentence(random, 9) + ".", "ctx_b": sentence(random, 3),
            "endings": [sentence(random, int(n)) + "." for n in random.integers(2, 9, 4)], "label": str(i % 4),
        }
        for i in range(9)
    ]  # fmt: skip
    write(folder / "hellaswag" / "validation.jsonl", hellaswag)
    lambada = [{"text": sentence(random, int(n))} for n in random.integers(6, 20, 8)]
    write(folder / "lambada_openai" / "test.jsonl", lambada)
    for split, count in (("train", 5), ("validation", 6)):
        rows = [
            {"q_id": i, "question": "".join(random.choice(KANJI, 12)) + "？", "label": i % 5}
            | {f"choice{c}": "".join(random.choice(KANJI, int(random.integers(1, 5)))) for c in range(5)}
            for i in range(count)
        ]
        write(folder / "ja_leaderboard_jcommonsenseqa" / f"{split}.jsonl", rows)
    texts = [{"page": "".join(random.choice([*KANJI, *WORDS, "\n", " "], int(n)))} for n in (1, 30, 55, 90)]
    write(folder / "own_texts" / "test.jsonl", texts)
    questions = [{"question": sentence(random, int(n)) + "\n\nAnswer:", "answer": "wind"} for n in (3, 14, 1, 8, 5, 30)]
    write(folder / "own_questions" / "validation.jsonl", questions)
    return folder


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    texts = {
        "task": "own_texts", "dataset_path": "nobody/texts", "output_type": "loglikelihood_rolling", "test_split": "test",
        "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": m, "aggregation": a, "higher_is_better": False} for m, a in (
            ("word_perplexity", "weighted_perplexity"), ("byte_perplexity", "weighted_perplexity"),
            ("bits_per_byte", "bits_per_byte"),
        )],
    }  # fmt: skip
    questions = {
        "task": "own_questions", "dataset_path": "nobody/questions", "output_type": "generate_until",
        "validation_split": "validation", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    group = {"group": "own_group", "task": ["own_texts", "own_questions"]}
    for name, config in (("texts", texts), ("questions", questions), ("group", group)):
        (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and nothing written outside the tests' own folder, whoever imported the libraries first."""
    import datasets
    import huggingface_hub

    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DISABLE_MULTIPROC"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(cache))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    random = np.random.default_rng(1)
    lines = [sentence(random, 12) + ".\n" + "".join(random.choice(KANJI, 20)) + "。\n" for _ in range(60)]
    return Tokenizer.train(lines, 320)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LanguageModel:
    return make_model(tokenizer)


def make_model(tokenizer: Tokenizer, **fields: Any) -> LanguageModel:
    """A random model whose predictions are far from even, so that greedy texts differ."""
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_layers": 2, "num_states": 16, "top_k": 4} | fields
    made = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **config)).eval()
    with torch.no_grad():
        made.head.weight.mul_(20)
    return made


@pytest.fixture(scope="module")
def stock(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes the harness's own adapter of a model."""
    from lm_eval.models.huggingface import HFLM

    from factorization_memory.models.huggingface import FactorizationMemoryForCausalLM, fast_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)

    def make(model: LanguageModel, max_length: int = 4096, batch_size: int = 4) -> HFLM:
        theirs = FactorizationMemoryForCausalLM.from_language_model(
            model, eos_token_id=tokenizer.document_end, pad_token_id=tokenizer.padding
        )
        return HFLM(
            pretrained=theirs, tokenizer=fast_tokenizer(path), backend="causal", device="cpu", batch_size=batch_size,
            max_length=max_length,
        )  # fmt: skip

    return make


class TokenCount:
    """Tokens that went through the blocks of a model, padding included."""

    def __init__(self, model: LanguageModel) -> None:
        self.tokens = 0
        self._block = model.blocks[0]

    def __enter__(self) -> TokenCount:
        def count(_: Any, arguments: Any) -> None:
            self.tokens += math.prod(arguments[0].shape[:-1])

        self._hook = self._block.register_forward_pre_hook(count)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def evaluated(lm: Any, chosen: Any) -> dict[str, dict[str, Any]]:
    """Metrics of each task."""
    tasks = list(chosen.names)
    result = simple_evaluate(lm, tasks=tasks, task_manager=chosen.manager, num_fewshot=chosen.shots, bootstrap_iters=0)
    return result["results"]


def agree(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """The metrics of two evaluations, which must agree: accuracies exactly, perplexities to 1e-4."""
    compared = []
    assert ours.keys() == theirs.keys()
    for task, row in theirs.items():
        for metric, value in row.items():
            if "," in metric and "stderr" not in metric:
                tolerance = 1e-4 if "per" in metric else 0
                assert ours[task][metric] == pytest.approx(value, rel=tolerance, abs=0), (task, metric)
                compared.append((task, metric.partition(",")[0]))
    return compared


def loglikelihoods(lm: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)


def rolling(lm: Any, texts: list[str]) -> list[float]:
    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts], disable_tqdm=True)


def written(lm: Any, prompts: list[str], options: dict[str, Any]) -> list[str]:
    return lm.generate_until([Instance("generate_until", {}, (p, dict(options)), 0) for p in prompts], disable_tqdm=True)


def test_standard_tasks_on_local_data_as_with_the_stock_adapter(
    data: Path, model: LanguageModel, tokenizer: Tokenizer, stock: Any
) -> None:
    with choose_tasks(STANDARD, data=data) as chosen:
        with TokenCount(model) as ours:
            mine = evaluated(FactorizationMemoryLM(model, tokenizer, 4), chosen)
        with TokenCount(model) as theirs:
            compared = agree(mine, evaluated(stock(model), chosen))
    assert compared == [
        ("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("lambada_openai", "perplexity"), ("lambada_openai", "acc"),
        ("ja_leaderboard_jcommonsenseqa", "acc"),
    ]  # fmt: skip
    assert ours.tokens < 0.4 * theirs.tokens


def test_own_tasks_as_with_the_stock_adapter(
    data: Path, own_tasks: Path, model: LanguageModel, tokenizer: Tokenizer, stock: Any
) -> None:
    with choose_tasks(["own_texts", "own_questions"], data=data, own_tasks=own_tasks) as chosen:
        compared = agree(evaluated(FactorizationMemoryLM(model, tokenizer, 3), chosen), evaluated(stock(model), chosen))
    assert compared == [
        ("own_texts", "word_perplexity"), ("own_texts", "byte_perplexity"), ("own_texts", "bits_per_byte"),
        ("own_questions", "exact_match"),
    ]  # fmt: skip


PAIRS = [
    ("", "the river"), ("", " the"), ("the old stone", " sings"), ("the old stone", " walks over the moon"),
    ("the old stone", " the old stone the old stone"), ("the old stone ", "sings"), ("the old stone\n\n", "sings again"),
    ("猫は川の", "石"), ("猫は川の", "石を空に"), ("猫は\u3000", "犬"), ("か", "\u3099か"), ("</s>the", " of</s>"),
    ("a " * 150, "b " * 80), ("the", "\U0001f600"), ("the old stone", " sings"), ("line one\nline two", "\nline three"),
]  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [{}, {"top_k": None, "conv_size": 4, "num_heads": 2}, {"mixers": ("memory", "attention"), "attention": None}],
    ids=["sparse", "dense", "hybrid"],
)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_loglikelihood_of_pairs(
    fields: dict[str, Any], batch_size: int, tokenizer: Tokenizer, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts and continuations that are empty, cut between tokens, in both scripts, and longer than a forward."""
    if "attention" in fields:
        from factorization_memory.config import AttentionConfig

        fields = fields | {"attention": AttentionConfig(num_heads=2)}
    model = make_model(tokenizer, **fields)
    lm = FactorizationMemoryLM(model, tokenizer, batch_size)
    monkeypatch.setattr(lm, "_chunk", 64)
    mine, theirs = loglikelihoods(lm, PAIRS), loglikelihoods(stock(model), PAIRS)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    np.testing.assert_allclose([nats for nats, _ in mine], [nats for nats, _ in theirs], rtol=1e-5, atol=1e-4)


def test_what_greedy_decoding_gives_is_greedy(model: LanguageModel, tokenizer: Tokenizer) -> None:
    lm = FactorizationMemoryLM(model, tokenizer)
    contexts = ["the river", "猫は", "over the"]
    texts = written(lm, contexts, {"max_gen_toks": 4})
    again = [tokenizer.encode(c + t)[len(tokenizer.encode(c)) :] for c, t in zip(contexts, texts, strict=True)]
    with torch.no_grad():
        for context, text, ids in zip(contexts, texts, again, strict=True):
            logits, _ = model(torch.tensor([tokenizer.encode(context) + ids[:-1]]))
            expected = logits[0, -len(ids) :].argmax(-1).tolist() == ids
            assert loglikelihoods(lm, [(context, text)])[0][1] is expected


def test_each_context_is_read_once(model: LanguageModel, tokenizer: Tokenizer) -> None:
    lm = FactorizationMemoryLM(model, tokenizer, 8)
    heads = ["old stones and old songs\n" * 5 + word for word in ("river", "moon")]
    pairs = [(head, f" {choice}") for head in heads for choice in ("walks over", "sings", "never again", "under the moon")]
    encoded = [lm._encode_pair(*pair) for pair in pairs]
    contexts = sorted({tuple(context) for context, _ in encoded})
    shared = next(i for i, (a, b) in enumerate(zip(*contexts, strict=False)) if a != b)
    with TokenCount(model) as count:
        loglikelihoods(lm, pairs)
    # What the contexts begin with once, what is left of each once, and of each continuation all but the last token.
    assert count.tokens == sum(map(len, contexts)) - shared + sum(len(c) - 1 for _, c in encoded)


@pytest.mark.parametrize("texts", [["", "の", "the river " * 30, "\n\nあ\n"], ["the old moon sings. " * 60, "x"]])
def test_rolling_is_exact_without_a_limit(
    texts: list[str], model: LanguageModel, tokenizer: Tokenizer, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = FactorizationMemoryLM(model, tokenizer, 2)
    monkeypatch.setattr(lm, "_chunk", 64)
    mine = rolling(lm, texts)
    plain = []
    for text in texts:
        ids = [tokenizer.document_end, *tokenizer.encode(text)]
        with torch.no_grad():
            log = model(torch.tensor([ids]))[0][0].double().log_softmax(-1)
        plain.append(float(sum(log[i, token] for i, token in enumerate(ids[1:]))))
    np.testing.assert_allclose(mine, plain, rtol=1e-5)
    np.testing.assert_allclose(mine, rolling(stock(model), texts), rtol=1e-5)


def test_rolling_with_a_limit_is_another_number(model: LanguageModel, tokenizer: Tokenizer, stock: Any) -> None:
    """Within its limit the stock adapter begins anew again and again."""
    texts = ["the old moon sings. " * 60]
    exact, limited = rolling(FactorizationMemoryLM(model, tokenizer), texts), rolling(stock(model, max_length=64), texts)
    assert abs(exact[0] - limited[0]) > 1


PROMPTS = ["the river", "", "猫は川の", "over the old stone " * 12, "the", "moon\n\n", "the river"]


@pytest.mark.parametrize(
    "options",
    [
        {"until": ["\n\n"], "max_gen_toks": 20},
        {"until": "e", "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
        {"until": [" ", "th", "の"], "max_new_tokens": 9},
        {},
    ],
)
def test_generated_texts_as_with_the_stock_adapter(
    options: dict[str, Any], model: LanguageModel, tokenizer: Tokenizer, stock: Any
) -> None:
    prompts = [p for p in PROMPTS if p]  # of no tokens the stock adapter cannot go on
    prompts = prompts if options else prompts[:2]
    mine = written(FactorizationMemoryLM(model, tokenizer, 3), prompts, options)
    for one, other in zip(mine, written(stock(model), prompts, options), strict=True):
        # An incomplete last character is U+FFFD there.
        assert one in (other, other.removesuffix("\ufffd"))
    assert len(set(mine)) > 1


@pytest.mark.parametrize("most", range(1, 9))
def test_generated_texts_end_in_a_whole_character(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of an incomplete one is dropped, as `fmem generate` does; a U+FFFD that the model writes stays."""
    letters = Tokenizer.bytes_level()
    lm = FactorizationMemoryLM(make_model(letters), letters)
    script = iter(letters.encode("é\ufffd😀"))
    monkeypatch.setattr(Decoding, "choose", lambda self, logits: torch.full((len(logits),), next(script)))
    expected = "é\ufffd😀".encode()[:most].decode(errors="ignore")
    assert written(lm, ["x"], {"until": [], "max_gen_toks": most}) == [expected]


def test_generation_does_not_depend_on_the_batch(model: LanguageModel, tokenizer: Tokenizer) -> None:
    options = {"until": ["e"], "max_gen_toks": 10}
    alone = [written(FactorizationMemoryLM(model, tokenizer, 1), [prompt], options)[0] for prompt in PROMPTS]
    assert written(FactorizationMemoryLM(model, tokenizer, 5), PROMPTS, options) == alone


def test_sampling(model: LanguageModel, tokenizer: Tokenizer) -> None:
    lm = FactorizationMemoryLM(model, tokenizer)
    options = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 8}
    torch.manual_seed(1)
    first = written(lm, ["the river"] * 6, options)
    assert len(set(first)) > 1
    torch.manual_seed(1)
    assert written(lm, ["the river"] * 6, options) == first
    greedy = written(lm, ["the river"], {"max_gen_toks": 8})
    assert written(lm, ["the river"], options | {"top_k": 1}) == greedy
    assert written(lm, ["the river"], options | {"top_p": 1e-6}) == greedy
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(2000, 4)
    drawn = Decoding({"do_sample": True, "temperature": 1.0, "top_p": 0.8}, 1).choose(logits)
    assert set(drawn.tolist()) == {1, 2}  # 0.64, 0.24: with the second 0.8 is reached


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_beams": 10}, "num_beams"), ({"typical_p": 1}, "typical_p"), ({"top_p": 2.0, "do_sample": True}, "top_p=2.0")],
)
def test_options_that_are_not_here(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(options, 1)


def test_a_limit_of_no_tokens(model: LanguageModel, tokenizer: Tokenizer) -> None:
    assert Decoding({"max_gen_toks": 0}, 256).max_tokens == 0
    assert Decoding({"max_gen_toks": None}, 256).max_tokens == 256
    request = Instance("generate_until", {}, ("The river", {"until": [], "max_gen_toks": 0}), 0)
    assert FactorizationMemoryLM(model, tokenizer).generate_until([request], disable_tqdm=True) == [""]


def test_by_name_and_with_its_cache(
    data: Path, own_tasks: Path, model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with choose_tasks(["own_group"], data=data, own_tasks=own_tasks) as chosen:
        results = []
        for _ in range(2):
            with TokenCount(model) as count:
                found = simple_evaluate(
                    "factorization_memory",
                    model_args={"model": model, "tokenizer": tokenizer},
                    batch_size=8,
                    tasks=["own_group"],
                    task_manager=chosen.manager,
                    bootstrap_iters=0,
                    use_cache=str(tmp_path / "answers"),
                )
            results.append((found["results"], count.tokens))
    assert results[0][1] > 0
    assert results[1][1] == 0
    assert results[0][0]["own_texts"] == results[1][0]["own_texts"]


def test_model_and_tokenizer_of_different_sizes(model: LanguageModel, tokenizer: Tokenizer) -> None:
    small = LanguageModel(ModelConfig(vocab_size=258, hidden_size=16, num_layers=1, num_states=8))
    with pytest.raises(ValueError, match="tokenizer: has 3"):
        FactorizationMemoryLM(small, tokenizer)
    with pytest.raises(ValueError, match="batch_size='auto'"):
        FactorizationMemoryLM(model, tokenizer, "auto")
    with pytest.raises(ValueError, match="adds no token"):
        loglikelihoods(FactorizationMemoryLM(model, tokenizer), [("the", "")])


def test_tokens_of_a_text_with_lines(model: LanguageModel, tokenizer: Tokenizer) -> None:
    lm = FactorizationMemoryLM(model, tokenizer)
    random = np.random.default_rng(3)
    pieces = [
        "\n",
        "\n\n",
        "\r\n",
        " ",
        "  ",
        "\t",
        "\u3000",
        "the",
        " of",
        "猫",
        "ー",
        "1",
        ".",
        "e",
        "\u0301",
        "か",
        "\u3099",
    ]
    for _ in range(300):
        text = "".join(random.choice(pieces, 12))
        assert lm.tok_encode(text) == tokenizer.encode(text), repr(text)


def test_record(data: Path, own_tasks: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    with choose_tasks(["own_group", "hellaswag"], data=data, own_tasks=own_tasks) as chosen:
        record = run_tasks(chosen, model, tokenizer, limit=4)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["asked"] == {"tasks": ["own_group", "hellaswag"], "shots": None, "limit": 4, "batch_size": 64}
    assert set(record["tasks"]) == {"own_texts", "own_questions", "hellaswag"}
    row = record["tasks"]["hellaswag"]
    assert (row["examples"], row["shots"], row["version"], row["local_data"]) == (4, 0, 1.0, True)
    assert row["metrics"]["acc"]["stderr"] is not None
    assert row["metrics"]["acc"]["higher_is_better"] is True
    assert record["tasks"]["own_texts"]["metrics"]["bits_per_byte"]["stderr"] is None
    assert set(record["versions"]) == {"lm_eval", "factorization_memory", "torch"}
    assert record["seconds"] > 0


def test_examples_from_files_and_their_number(data: Path) -> None:
    name = "ja_leaderboard_jcommonsenseqa"
    with choose_tasks([name], data=data) as chosen:
        task = chosen.manager.load([name])["tasks"][name]
        assert task.config.num_fewshot == 3
        assert len(task.dataset["train"]) == 5
    with choose_tasks([name], data=data, shots=1) as chosen:
        assert chosen.shots == 1


@pytest.fixture
def small_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the harness had no more than three folders of tasks: reading all takes seconds."""
    full = harness_index._standard_tasks()
    folder = tmp_path / "standard"
    folder.mkdir()
    for name in ("hellaswag", "lambada", "arc"):
        shutil.copytree(full / name, folder / name)
    group = "group: both\ntask:\n- hellaswag\n- task: arc_challenge\n  num_fewshot: 2\n- lambada\n"
    (folder / "group").mkdir()
    (folder / "group" / "both.yaml").write_text(group, encoding="utf-8")
    monkeypatch.setattr(harness_index, "_standard_tasks", lambda: folder)
    yield
    harness_index._named_files.cache_clear()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("helaswag", "'hellaswag'"), ("openai", "'lambada_openai'"), ("englsh", "'english'"), ("qqqqqqqqqq", "lm_eval ls tasks")],
)
@pytest.mark.usefixtures("small_harness")
def test_no_such_task(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown task '{name}'; .*{nearest}"), choose_tasks([name]):
        pass


@pytest.mark.usefixtures("small_harness")
def test_groups_and_tags_that_hold_tasks_of_other_folders() -> None:
    with choose_tasks(["both"]) as chosen:
        lambada = {"lambada_openai", "lambada_standard"}
        assert {"hellaswag", "arc_challenge"} | lambada <= set(chosen.leaves)
    with choose_tasks(["ai2_arc"]) as chosen:
        assert set(chosen.leaves) == {"arc_easy", "arc_challenge"}


@pytest.mark.usefixtures("small_harness")
def test_a_tag_of_which_some_have_local_data(tmp_path: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    row = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    write(tmp_path / "data" / "arc_easy" / "test.jsonl", [row, row])
    with choose_tasks(["ai2_arc"], data=tmp_path / "data") as chosen:
        assert chosen.manager.task_index["ai2_arc"].tags == {"arc_easy", "arc_challenge"}
        with pytest.raises(HarnessDataError, match="task arc_challenge: allenai/ai2_arc ARC-Challenge cannot be loaded"):
            run_tasks(chosen, model, tokenizer)
    with choose_tasks(["arc_easy"], data=tmp_path / "data") as chosen:
        assert run_tasks(chosen, model, tokenizer)["tasks"]["arc_easy"]["examples"] == 2


def test_groups_of_ours_exist() -> None:
    files = harness_index._named_files(harness_index._standard_tasks())
    assert all(name in files for names in harness_index.GROUPS.values() for name in names)
    assert not set(harness_index.GROUPS) & set(files)
    with choose_tasks([name for name in harness_index.GROUPS["japanese"] if not name.endswith("xlsum")]) as chosen:
        assert len(chosen.leaves) == 7
        # Not all 14,000 files were read for it.
        assert len(chosen.manager.task_index) < 100


def test_a_task_that_is_there_twice(data: Path, own_tasks: Path) -> None:
    with (
        pytest.raises(ConfigError, match="task 'own_texts' is in 'own_texts' and in 'own_group'"),
        choose_tasks(["own_texts", "own_group"], own_tasks=own_tasks),
    ):
        pass


def test_what_to_give_without_a_hub(data: Path, own_tasks: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    names = ["hellaswag", "lambada_openai", "own_questions"]
    with choose_tasks(names, own_tasks=own_tasks) as chosen, pytest.raises(HarnessDataError) as raised:
        run_tasks(chosen, model, tokenizer)
    message = str(raised.value)
    assert message.startswith("task hellaswag: Rowan/hellaswag cannot be loaded from the hub")
    assert "give its files, DIR/hellaswag/validation.jsonl (or .json, .parquet)" in message
    assert "--harness-data DIR; also without files: lambada_openai, own_questions" in message
    with (
        choose_tasks(["ja_leaderboard_jcommonsenseqa"]) as chosen,
        pytest.raises(
            HarnessDataError, match=r"Rakuten/JGLUE JCommonsenseQA cannot .*qa/train\.jsonl and .*qa/validation\.jsonl"
        ),
    ):
        run_tasks(chosen, model, tokenizer)


def test_one_of_a_group_without_data(
    data: Path, own_tasks: Path, model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shutil.copytree(data / "own_texts", tmp_path / "own_texts")
    with (
        choose_tasks(["own_group"], data=tmp_path, own_tasks=own_tasks) as chosen,
        pytest.raises(HarnessDataError, match="task own_questions: nobody/questions cannot be loaded"),
    ):
        run_tasks(chosen, model, tokenizer)


def test_a_task_that_needs_a_package(model: LanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neologdn", None)
    with (
        choose_tasks(["ja_leaderboard_xlsum"]) as chosen,
        pytest.raises(HarnessDataError, match=r"task ja_leaderboard_xlsum: .* install what is missing"),
    ):
        run_tasks(chosen, model, tokenizer)


@pytest.mark.parametrize(
    ("task", "files", "shots", "message"),
    [
        ("hellaswag", ["train.jsonl"], None, r"needs validation\.jsonl .*found train\.jsonl"),
        ("hellaswag", ["validation.jsonl"], 2, r"needs train\.jsonl"),
        ("arc_easy", ["validation.jsonl"], None, r"needs test\.jsonl"),
        ("hellaswag", [], None, "found nothing"),
        ("ja_leaderboard_jcommonsenseqa", ["validation.jsonl"], None, r"needs train\.jsonl"),
        ("hellaswag", ["train.parquet", "validation.jsonl"], None, "several types"),
    ],
)
def test_files_that_are_missing(task: str, files: list[str], shots: int | None, message: str, tmp_path: Path) -> None:
    (tmp_path / task).mkdir()
    for name in files:
        (tmp_path / task / name).touch()
    with pytest.raises(HarnessDataError, match=message), choose_tasks([task], data=tmp_path, shots=shots):
        pass


def test_files_that_do_not_fit(tmp_path: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    write(tmp_path / "hellaswag" / "validation.jsonl", [{"colour": "red"}])
    with (
        choose_tasks(["hellaswag"], data=tmp_path) as chosen,
        pytest.raises(HarnessDataError, match="hellaswag: its data files"),
    ):
        run_tasks(chosen, model, tokenizer)
    with pytest.raises(ConfigError, match="no such folder"), choose_tasks(["hellaswag"], data=tmp_path / "nowhere"):
        pass


@pytest.mark.parametrize(
    ("task", "rows", "shots", "message"),
    [
        ("lambada_openai", [{"text": "a b c"}, {"text": None}], None, "task lambada_openai: cannot make its questions"),
        ("hellaswag", None, 100, "task hellaswag: cannot make its questions.*use fewer examples of 'train'"),
    ],
)
def test_rows_that_do_not_fit(
    task: str,
    rows: list[Any] | None,
    shots: int | None,
    message: str,
    tmp_path: Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
) -> None:
    good = {"activity_label": "Men", "ctx_a": "One sits.", "ctx_b": "he", "endings": list("abcd"), "label": "1"}
    if rows is None:
        write(tmp_path / task / "train.jsonl", [good] * 6)
        write(tmp_path / task / "validation.jsonl", [good])
    else:
        write(tmp_path / task / "test.jsonl", rows)
    with choose_tasks([task], data=tmp_path, shots=shots) as chosen, pytest.raises(HarnessDataError, match=message):
        run_tasks(chosen, model, tokenizer)


def test_files_that_are_two_or_empty(tmp_path: Path) -> None:
    folder = tmp_path / "lambada_openai"

    def refused(message: str) -> None:
        with pytest.raises(HarnessDataError, match=message), choose_tasks(["lambada_openai"], data=tmp_path):
            pass

    write(folder / "test.jsonl", [{"text": "a b"}])
    (folder / "test.json").write_text("[]", encoding="utf-8")
    refused(r"test\.jsonl? and test\.jsonl? are the same split of task lambada_openai; keep one")
    (folder / "test.json").unlink()
    (folder / "test.jsonl").write_text("", encoding="utf-8")
    refused(r"test\.jsonl: the file is empty")
    (folder / "test.jsonl").rename(folder / "test.csv")
    refused(r"needs test\.jsonl .*found test\.csv")


def test_parquet(tmp_path: Path, data: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in (data / "hellaswag" / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "hellaswag").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hellaswag" / "validation.parquet")
    with choose_tasks(["hellaswag"], data=tmp_path) as chosen:
        assert len(chosen.manager.load(["hellaswag"])["tasks"]["hellaswag"].eval_docs) == 9
