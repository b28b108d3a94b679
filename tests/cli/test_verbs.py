"""`fmem` as a user meets it: a small corpus to a model to text, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from factorization_memory.cli import VERBS, dispatch
from factorization_memory.cli import demo as demo_verb
from factorization_memory.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from factorization_memory.data.shards import PackedCorpus
from factorization_memory.experiments import session as session_module
from factorization_memory.experiments.demo import VOCABULARY
from factorization_memory.models import counting
from factorization_memory.presets import PRESETS
from factorization_memory.reports import ReportError, write_report

TINY = [
    "--model.hidden-size", "16", "--model.num-layers", "1", "--model.num-states", "8", "--data.context-length", "32",
    "--training.tokens-per-step", "128", "--training.steps", "8", "--training.evaluate-every", "4",
    "--training.evaluation-tokens", "256", "--training.checkpoint-every", "4", "--training.device", "cpu",
]  # fmt: skip


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `fmem` in this process."""
    try:
        status = dispatch([str(a) for a in arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed corpus and a trained run."""
    folder = tmp_path_factory.mktemp("fmem")
    lines = [f"The {i}th wise man said that {i} times {i} is {i * i}. それは{i}である。\n" for i in range(700)]
    (folder / "texts").mkdir()
    for part in range(5):
        (folder / "texts" / f"{part}.txt").write_text("".join(lines[part * 140 : part * 140 + 140]), encoding="utf-8")
    packed = str(folder / "packed")
    assert dispatch(["data", "pack", f"all={folder / 'texts'}", "--output", packed, "--holdout", "tail"]) == 0
    assert dispatch(["train", "demo", *TINY, "--data.corpus", packed, "--run-dir", str(folder / "run")]) == 0
    return folder


def test_help_is_fast_and_lists_every_verb() -> None:
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "factorization_memory.cli", "--help"], capture_output=True, text=True, check=True
        )
        best = min(best, time.perf_counter() - start)
    assert all(verb in done.stdout for verb in VERBS)
    assert best < 0.3


@pytest.mark.parametrize("verb", ["demo", "doctor", "evaluate", "generate", "inspect", "plan", "train"])
def test_help_of_verbs(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    status, out, _ = call(capsys, verb, "--help")
    assert status == 0
    assert f"fmem {verb}" in out


def test_train_leaves_a_run_folder(workplace: Path) -> None:
    run = workplace / "run"
    names = ("config.json", "environment.json", "tokenizer.json", "metrics.jsonl", "result.json", "report.html")
    assert all((run / name).exists() for name in names)
    assert json.loads((run / "result.json").read_text())["stopped"] == "finished"


def test_evaluate(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "evaluate", workplace / "run", "--json", "--device", "cpu", "--max-position", 512)
    assert status == 0
    result = json.loads(out)
    assert result["sources"]["all"]["bits_per_byte"] > 0
    assert {"3", "5"} <= result["ngram"]["sources"]["all"].keys()
    assert result["position"]["all"]["bins"]
    assert "bits per byte" in err
    assert json.loads((workplace / "run" / "evaluation.json").read_text()) == result
    evaluated = result["evaluated"]
    assert evaluated.pop("checkpoint").startswith("step-0000000")
    assert evaluated.pop("corpus_fingerprint") == PackedCorpus.open(workplace / "packed").fingerprint
    assert evaluated == {"max_position": 512, "max_tokens": None, "stretches": 8}
    assert sum(part["tokens"] for part in result["recall"]["all"].values()) == result["total"]["tokens"]
    part = ["--device", "cpu", "--max-position", 0, "--max-tokens", 20]
    status, out, err = call(capsys, "evaluate", workplace / "run", "--json", *part)
    assert status == 0
    assert json.loads(out)["total"]["tokens"] < result["total"]["tokens"]
    assert "unchanged, since it already has more" in err
    assert "repeated" in err
    assert json.loads((workplace / "run" / "evaluation.json").read_text())["total"] == result["total"]


def test_evaluation_on_another_corpus_is_not_kept(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = workplace / "run" / "evaluation.json"
    before = kept.read_bytes() if kept.exists() else None
    other = tmp_path / "other"
    assert dispatch(["data", "pack", str(workplace / "texts" / "0.txt"), "--output", str(other), "--holdout", "tail"]) == 0
    arguments = ["evaluate", workplace / "run", "--corpus", other, "--max-position", 0, "--json", "--device", "cpu"]
    capsys.readouterr()
    status, out, err = call(capsys, *arguments)
    assert status == 0
    assert json.loads(out)["evaluated"]["corpus_fingerprint"] == PackedCorpus.open(other).fingerprint
    assert "--json" in err
    assert (kept.read_bytes() if kept.exists() else None) == before


@pytest.mark.parametrize(
    ("mixers", "options"),
    [
        (("attention",), []),
        (("memory", "attention"), ["--model.attention.sliding-window", "16", "--training.carry-state"]),
        (("mamba2",), ["--training.carry-state"]),
        (("gated_deltanet",), ["--training.carry-state"]),
    ],
    ids=["transformer", "hybrid", "mamba2", "gated-deltanet"],
)
def test_models_of_other_mixers(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mixers: tuple[str, ...], options: list[str]
) -> None:
    """Trained (with a carried state where it ends), evaluated past the context, sampled, looked into, planned, reported on."""
    fields = [
        *TINY, "--model.mixers", *mixers, "--model.num-layers", str(len(mixers)), "--model.attention.num-heads", "2",
        "--model.mamba2.head-size", "16", "--model.mamba2.state-size", "8", "--model.gated-deltanet.head-size", "8", *options,
    ]  # fmt: skip
    run = tmp_path / "run"
    train = ["train", "demo", *fields, "--data.corpus", workplace / "packed", "--run-dir", run]
    assert call(capsys, *train, "--training.steps", 4)[0] == 0
    status, out, _ = call(capsys, "evaluate", run, "--json", "--device", "cpu", "--max-position", 96, "--max-tokens", 200)
    result = json.loads(out)
    assert status == 0
    assert result["position"]["all"]["bins"][-1]["gain"] is not None
    assert [layer["layer"] for layer in result["routing"]] == [i for i, mixer in enumerate(mixers) if mixer == "memory"]
    status, out, _ = call(
        capsys, "generate", run, "--prompt", "The 3rd", "--num-samples", 3, "--max-tokens", 20, "--json", "--device", "cpu"
    )
    assert status == 0
    assert len(json.loads(out)) == 3
    status, _, err = call(capsys, "inspect", run, "--text", "wise man", "--output", tmp_path / "page.html", "--device", "cpu")
    if "memory" in mixers:
        assert status == 0
    else:
        assert status == 1
        assert "no memory layer to inspect" in err
    status, out, err = call(capsys, "plan", "demo", *fields, "--json")
    assert status == 0
    assert bool(json.loads(out)["state_bytes_per_token"]) == (mixers == ("attention",))
    assert ("per token read" in err) == (mixers == ("attention",))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert ("A Factorization Memory language model" in page) is False


def test_generate_streams_to_stdout(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", workplace / "run", "--prompt", "それは", "--max-tokens", 12, "--device", "cpu", "--seed", 3]
    status, out, _ = call(capsys, *arguments)
    assert status == 0
    assert out.startswith("それは")
    status, second, err = call(capsys, *arguments, "--json", "--num-samples", 2)
    results = json.loads(second)
    assert len(results) == 2
    assert results[0]["prompt"] + results[0]["text"] == out.removesuffix("\n")
    assert err.startswith(out.removesuffix("\n"))


@pytest.mark.parametrize(("seconds", "said"), [(0.0, False), (1.5, True)])
def test_generate_says_when_the_step_became_a_graph(
    seconds: float, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from factorization_memory import generation
    from factorization_memory.cli.generate import stream
    from factorization_memory.experiments import samples

    one = generation.Generation(" yes", [5, 6], "length", 3, prefill_seconds=0.5, seconds=0.1, capture_seconds=seconds)
    monkeypatch.setattr(samples, "generate_batch", lambda *rest, **named: [one])
    stream(None, None, "Well?", to=io.StringIO())
    told = capsys.readouterr().err
    assert "3 prompt tokens in 0.50 s (6 tokens/s)" in told
    assert "2 tokens in 0.10 s, 20 tokens/s" in told
    assert ("captured as a CUDA graph in 1.50 s" in told) is said


def test_generate_from_several_prompts(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-tokens", 8, "--device", "cpu", "--seed", 3, "--json"]
    prompts = ["The 3rd", "それは", "The wise man said"]
    arguments = [word for prompt in prompts for word in ("--prompt", prompt)]
    status, out, err = call(capsys, "generate", *arguments, workplace / "run", *options)
    assert status == 0
    results = json.loads(out)
    assert [result["prompt"] for result in results] == prompts
    assert err.count("--- 2 ---") == err.count("--- 3 ---") == 1
    assert "tokens/s" in err
    for prompt, result in zip(prompts, results, strict=True):
        alone = json.loads(call(capsys, "generate", workplace / "run", "--prompt", prompt, *options)[1])
        assert alone[0]["text"] == result["text"]
    first = results[0]
    read = sum(result["prompt_tokens"] for result in results)
    assert first["prefill_tokens_per_second"] == pytest.approx(read / first["prefill_seconds"])
    assert first["total_tokens_per_second"] > 0


def test_generate_in_bfloat16(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "The wise", "--max-tokens", 5, "--device", "cpu", "--precision", "bfloat16"]
    status, out, _ = call(capsys, "generate", workplace / "run", *arguments)
    assert status == 0
    assert out.startswith("The wise")


def test_generate_from_a_file(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("\ufeffThe wise", encoding="utf-8")  # as some editors write it
    file = tmp_path / "prompt.txt"
    status, out, _ = call(capsys, "generate", workplace / "run", "--prompt-file", file, "--max-tokens", 5, "--device", "cpu")
    assert status == 0
    assert out.startswith("The wise")


def test_inspect(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    text = "The wise man said それは"
    status, out, _ = call(capsys, "inspect", workplace / "run", "--text", text, "--output", page, "--json", "--device", "cpu")
    assert status == 0
    record = json.loads(out)
    assert "".join(piece["text"] for piece in record["pieces"]) == text
    html = page.read_text(encoding="utf-8")
    assert "<html" in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "plan", "paper", "--model.top-k", 8, "--json")
    assert status == 0
    result = json.loads(out)
    assert result["steps"] * result["tokens_per_step"] == result["tokens"]
    assert "parameters" in err
    assert "precision=auto" not in call(capsys, "plan", "demo", "--training.precision", "float32")[2]
    note = " ".join(call(capsys, "plan", "demo", "--training.precision", "auto")[2].split())
    assert "estimate for float32; on a GPU precision=auto takes bfloat16 activations" in note
    _, dense, _ = call(capsys, "plan", "paper", "--json")
    assert json.loads(dense)["flops_per_token"]["of_which_recurrence"] == 8 * result["flops_per_token"]["of_which_recurrence"]


def test_plan_knows_the_corpus(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its vocabulary is that of the run, so that parameters are those that will be trained; and how often it is read."""
    command = ["plan", "demo", *TINY, "--data.corpus", workplace / "packed"]
    status, out, err = call(capsys, *command, "--json")
    plan, trained = json.loads(out), json.loads((workplace / "run" / "result.json").read_text())
    assert (status, plan["parameters"]["total"], plan["vocabulary_assumed"]) == (0, trained["parameters"], False)
    corpus = PackedCorpus.open(workplace / "packed")
    training_tokens = len(corpus.sources["all"].splits["train"].tokens)
    assert plan["epochs"] == {"total": 8 * 128 / training_tokens, "training_tokens": training_tokens, "sources": {}}
    assert f"read {8 * 128 / training_tokens:.2f} times" in " ".join(err.split())
    _, out, _ = call(capsys, *command, "--data.weights", "all", 2, "--json")
    assert json.loads(out)["epochs"]["sources"] == {"all": 8 * 128 / training_tokens}
    status, _, err = call(capsys, *command, "--model.vocab-size", 1000)
    assert (status, "model.vocab_size=1000: the corpus's tokenizer has" in err) == (2, True)
    # Without a corpus the demo's is that of `fmem demo`.
    _, out, _ = call(capsys, "plan", "demo", "--json")
    assert json.loads(out)["vocab_size"] == VOCABULARY


def test_plan_tells_the_time_by_a_benchmark_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = ["plan", "demo", "--training.device", "cpu", "--training.precision", "float32", "--json"]
    _, out, err = call(capsys, *plan)
    assert json.loads(out)["time"] is None
    assert "run `fmem bench training` once" in " ".join(err.split())
    benchmark = ["bench", "training", "--device", "cpu", "--lengths", 16, "--batch", 1, "--repeats", 1, "--peers"]
    small = ["--model.hidden-size", 16, "--model.num-layers", 1, "--model.vocab-size", 300]
    status, out, err = call(capsys, *benchmark, *small, "--json")
    assert status == 0, err
    rate = json.loads(out)["records"][0]["tokens_per_second"]
    _, out, err = call(capsys, *plan)
    planned = json.loads(out)
    of_model = counting.count(ModelConfig(hidden_size=16, num_layers=1, vocab_size=300), 16).train_flops
    assert planned["time"]["flops_per_second"] == pytest.approx(of_model * rate)
    assert planned["time"]["seconds"] == pytest.approx(planned["train_flops"] / (of_model * rate))
    assert "on this machine" in " ".join(err.split())
    (note,) = tmp_path.rglob("training-cpu-float32.json")
    note.write_text("{")
    assert json.loads(call(capsys, *plan)[1])["time"] is None


def test_tokenizer_and_pack(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tmp_path / "new" / "folder" / "tokenizer.json"
    status, out, _ = call(
        capsys, "data", "tokenizer", workplace / "texts", "--vocab-size", 300, "--output", tokenizer, "--json"
    )
    assert (status, json.loads(out)["vocab_size"]) == (0, 300)
    arguments = ["data", "pack", workplace / "texts", "--tokenizer", tokenizer, "--output", tmp_path / "packed"]
    status, out, _ = call(capsys, *arguments, "--holdout", "tail", "--json")
    assert status == 0
    sizes = json.loads(out)["sources"]
    assert sum(s["train"]["tokens"] for s in sizes.values()) < sum(s["train"]["bytes"] for s in sizes.values())
    status, _, err = call(capsys, *arguments)
    assert status == 1
    assert "overwrite" in err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "usage: fmem VERB"),
        (["trian"], 2, "'trian' is not a verb of fmem; did you mean 'train'?"),
        (["train"], 2, "usage: fmem train PRESET"),
        (["train", "dmo"], 2, "unknown preset 'dmo'; did you mean 'demo'?"),
        (["train", "demo"], 2, "data.corpus=''"),
        (["train", "demo", "--model.topk", "3"], 2, "--model.top-k"),
        (["train", "demo", "--model.top-k", "65"], 2, "model.top_k=65: use 1 to num_states=64"),
        (["train", "demo", "--model.top-k", "0"], 2, "model.top_k=0"),
        (["train", "demo", "--model.num-heads", "7"], 2, "model.num_heads=7: must divide"),
        (["train", "demo", "--data.corpus", "nowhere"], 1, "nowhere"),
        (["evaluate", "nowhere"], 1, "nowhere: no such folder"),
        (["generate", "nowhere", "--prompt", "x"], 1, "nowhere: no such folder"),
        (["generate", "nowhere"], 2, "exactly one of --prompt TEXT (once or several times) and --prompt-file FILE"),
        (["generate", "nowhere", "--prompt", "x", "--prompt-file", "x"], 2, "exactly one of --prompt TEXT"),
        (["generate", "nowhere", "--prompt", "x", "--prefill-chunk", "-1"], 2, "--prefill-chunk=-1"),
        (["generate", "nowhere", "--prompt", ""], 2, "prompt: empty"),
        (["generate", "nowhere", "--prompt-file", "missing.txt"], 1, "missing.txt"),
        (["inspect", "nowhere"], 2, "exactly one of --text TEXT and --file FILE"),
        (["inspect", "nowhere", "--text", ""], 2, "text: empty"),
        (["generate", "nowhere", "--prompt", "x", "--top-k", "0"], 2, "--top-k=0: use 1 or more"),
        (["generate", "nowhere", "--prompt", "x", "--max-tokens", "0"], 2, "--max-tokens=0: use 1 or more"),
        (["generate", "nowhere", "--prompt", "x", "--num-samples", "-1"], 2, "--num-samples=-1: use 1 or more"),
        (["generate", "nowhere", "--prompt-file", "."], 2, ".: cannot be read"),
        (["evaluate", "nowhere", "--max-tokens", "0"], 2, "--max-tokens=0: use 1 or more"),
        (["evaluate", "nowhere", "--stretches", "0"], 2, "--stretches=0: use 1 or more"),
        (["evaluate", "nowhere", "--max-position", "-1"], 2, "--max-position=-1: use 0 or more"),
        (["demo", "--resume"], 2, "no demo to resume"),
        (["data", "pack", "--output", "p"], 2, "name at least one file"),
        (["data", "pack", "x", "--output", "p", "--holdout-fraction", "1.5"], 2, "--holdout-fraction=1.5"),
        (["data", "tokenizer"], 2, "name at least one file"),
        (["data", "tokenizer", "x", "--vocab-size", "3"], 2, "--vocab-size=3: use 258"),
        (["plan", "demo", "--model.expand", "inf"], 2, "model.expand=inf: use a finite number"),
        (["plan", "demo", "--model.num-layers", "1000000000"], 2, "model.num_layers=1000000000: use 1,000,000 or fewer"),
        (["generate", "--prompt", "x", "--seed", str(2**70)], 2, "--seed=1180591620717411303424: use a number from 0 to"),
        (["generate", "--prompt", "x", "--num-samples", str(10**9)], 2, "ask for fewer"),
        (["bench", "step", "--top-k", "100000"], 2, "--top-k=(100000,): exceeds every"),
        (["bench", "op", "--batch", str(10**9)], 1, "out of memory"),
        (["data"], 2, "usage: fmem data VERB"),
        (["data", "pakc"], 2, "did you mean 'pack'?"),
        (["data", "pack", "missing.txt", "--output", "p"], 1, "missing.txt"),
    ],
)
def test_bad_usage(
    arguments: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    got, _, err = call(capsys, *arguments)
    assert got == status
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there(workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = call(capsys, "generate", workplace / "run", "--prompt", "x", "--device", "cuda")
    assert status == 2
    assert "--device='cuda'" in err


def test_bad_text_names_the_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    status, _, err = call(capsys, "data", "pack", tmp_path / "bad.txt", "--output", tmp_path / "p", "--holdout", "tail")
    assert status == 1
    assert "bad.txt" in err
    assert "byte 0xff at offset 5" in err
    assert not (tmp_path / "p").exists()


def test_context_longer_than_the_corpus(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data.context-length", 1 << 20, "--training.tokens-per-step", 1 << 20, "--data.corpus", workplace / "packed"]
    status, _, err = call(capsys, "train", "demo", *arguments, "--run-dir", tmp_path / "run", "--training.device", "cpu")
    assert status == 2
    assert "context_length=1048576" in err


def test_a_second_run_in_one_folder(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "demo", *TINY, "--data.corpus", workplace / "packed", "--run-dir", workplace / "run"]
    status, _, err = call(capsys, *arguments)
    assert status == 1
    assert "--resume" in err
    status, _, err = call(capsys, *arguments, "--resume", "--optimizer.learning-rate", 1e-4)
    assert status == 1
    assert "optimizer.learning_rate" in err


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_demo_stopped_and_resumed_by_the_command_it_prints(
    stop: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    books = tmp_path / "books"
    for language in ("en", "ja"):
        (books / language).mkdir(parents=True)
    (books / "en" / "book.txt").write_text("".join(f"The {i}th wise man said {i * i}.\n" for i in range(400)), encoding="utf-8")
    (books / "ja" / "book.txt").write_text("".join(f"{i}は猫である。\n" for i in range(600)), encoding="utf-8")
    tiny = RunConfig(
        model=ModelConfig(hidden_size=16, num_layers=1, num_states=8),
        data=DataConfig(context_length=32),
        training=TrainingConfig(tokens_per_step=128, evaluate_every=2, evaluation_tokens=256),
    )
    monkeypatch.setattr("factorization_memory.data.corpora.builtin_corpus", lambda: books)
    monkeypatch.setattr(demo_verb, "demo", lambda: tiny)
    monkeypatch.setattr(demo_verb, "RECALL_STEPS", 4)
    with monkeypatch.context() as patch:
        evaluator = session_module.evaluator

        def stopping(*arguments: Any) -> Any:
            evaluate = evaluator(*arguments)

            def stop_and_evaluate(*told: Any) -> Any:
                os.kill(os.getpid(), stop)
                return evaluate(*told)

            return stop_and_evaluate

        patch.setattr(session_module, "evaluator", stopping)
        run = tmp_path / "a demo"
        status, _, err = call(capsys, "demo", "--run-dir", run, "--steps", 6, "--device", "cpu")
    assert status == 128 + stop
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    command = next(line for line in err.splitlines() if line.startswith(f"stopped by {stop.name}"))
    status, _, _ = call(capsys, *shlex.split(command.partition("to resume: fmem ")[2]))
    assert status == 0
    assert json.loads((run / "result.json").read_text())["stopped"] == "finished"
    assert (run / "evaluation.json").exists()
    assert len(json.loads((run / "samples.json").read_text())) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda config: config.pop("model"), r"config\.json: fields missing: model"),
        (lambda config: config.pop("data"), r"config\.json: fields missing: data"),
        (lambda config: config.update(colour="red"), r"config\.json: .*colour: no such field"),
    ],
)
def test_report_of_a_damaged_configuration(damage: Any, message: str, workplace: Path, tmp_path: Path) -> None:
    config = json.loads((workplace / "run" / "config.json").read_text())
    damage(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ReportError, match=message):
        write_report(tmp_path)


def test_sigterm_checkpoints_and_resume_continues_the_same_curve(workplace: Path, tmp_path: Path) -> None:
    """Stopped by a real signal and resumed, a run has the losses of one that was never stopped."""

    def train(folder: Path, *more: str) -> list[str]:
        steps = ["--training.steps", "60", "--training.log-every", "1"]
        corpus = ["--data.corpus", str(workplace / "packed"), "--run-dir", str(folder)]
        return [sys.executable, "-m", "factorization_memory.cli", "train", "demo", *TINY, *steps, *corpus, *more]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(train(tmp_path / "a"), env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"train"') >= 5):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert "--resume" in err
    interrupted = json.loads((tmp_path / "a" / "result.json").read_text())
    assert 5 <= interrupted["steps"] < 60
    subprocess.run(train(tmp_path / "a", "--resume"), env=environment, check=True, capture_output=True)
    subprocess.run(train(tmp_path / "b"), env=environment, check=True, capture_output=True)

    def losses(folder: Path) -> list[tuple[Any, ...]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines if line["kind"] == "train"]

    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert len(losses(tmp_path / "b")) == 60


def test_a_run_is_resumed_by_its_folder_alone_and_lengthened(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "demo", *TINY, "--data.corpus", workplace / "packed", "--optimizer.schedule", "constant"]
    assert call(capsys, *command, "--run-dir", tmp_path / "whole", "--training.steps", 12)[0] == 0
    folder = tmp_path / "parts"
    assert call(capsys, *command, "--run-dir", folder)[0] == 0
    status, _, err = call(capsys, "train", "--resume", folder, "--training.steps", 7)
    assert (status, "training.steps=8, not 7; resume with the same value or a larger one" in err) == (1, True)
    # By its folder in every spelling; without more steps there is nothing to do but to keep fewer checkpoints.
    assert call(capsys, "train", f"--resume={folder}", "--training.keep-checkpoints", 1)[0] == 0
    assert len(list((folder / "checkpoints").iterdir())) <= 2
    assert call(capsys, "train", "--run-dir", folder, "--resume")[0] == 0
    status, out, _ = call(capsys, "train", "--training.steps", 12, "--resume", folder, "--json")
    assert (status, json.loads(out)["steps"]) == (0, 12)

    def losses(run: Path) -> list[float]:
        read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["gradient_norm"] for line in read if line["kind"] == "train" and line["step"] in (10, 12)]

    # The line of step 10 is a mean over the steps since the last line, which the shorter run wrote at its end.
    assert losses(folder)[-1] == losses(tmp_path / "whole")[-1]
    status, _, err = call(capsys, "train", "--resume", tmp_path / "nothing")
    assert (status, "no run here" in err) == (1, True)
    status, _, err = call(capsys, "train", "--resume", folder, "--run-dir", tmp_path)
    assert (status, "drop one of them" in err) == (2, True)


def test_a_run_starts_from_a_trained_model(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights before the first step are that model's, whichever way it is named; the first step is a small one."""
    from factorization_memory.runs import load_model

    run = workplace / "run"
    assert call(capsys, "export", run, tmp_path / "exported")[0] == 0
    settings = ["--data.corpus", workplace / "packed", "--training.steps", 1, "--training.evaluate-every", 0]
    settings += ["--training.evaluation-tokens", 256, "--training.device", "cpu", "--optimizer.learning-rate", 1e-9]
    settings += ["--data.context-length", 32, "--training.tokens-per-step", 128]
    expected = dict(load_model(run)[0].named_parameters())
    for number, (source, preset) in enumerate([(run, ["books"]), (tmp_path / "exported", ["demo"]), (run, [])]):
        folder = tmp_path / f"tuned-{number}"
        status, _, err = call(capsys, "train", *preset, "--init-from", source, *settings, "--run-dir", folder)
        assert status == 0, err
        tuned, _, config = load_model(folder)
        assert config.training.init_from == str(source)
        for name, weight in tuned.named_parameters():
            assert (weight - expected[name]).abs().max() < 1e-7, name
    status, _, err = call(capsys, "train", "demo", "--init-from", "builtin", *settings, "--run-dir", tmp_path / "other")
    assert (status, "its tokenizer" in err, "--tokenizer" in err) == (2, True, True)
    assert not (tmp_path / "other").exists()
    status, _, err = call(
        capsys, "train", "demo", f"--init-from={run}", *settings, "--model.num-states", 16, "--run-dir", tmp_path / "other"
    )
    assert (status, "model.num_states=16" in err) == (2, True)
    status, _, err = call(capsys, "train", "demo", "--init-from", tmp_path / "nothing", *settings)
    assert (status, "no such folder" in err) == (1, True)


def test_the_shipped_model_is_trained_further(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from factorization_memory.models.pretrained import builtin_model

    packed = tmp_path / "packed"
    tokenizer = builtin_model() / "tokenizer.json"
    arguments = ["data", "pack", workplace / "texts", "--tokenizer", tokenizer, "--output", packed, "--holdout", "tail"]
    assert call(capsys, *arguments)[0] == 0
    settings = ["--training.steps", 1, "--training.evaluation-tokens", 256, "--training.device", "cpu"]
    settings += ["--data.context-length", 32, "--training.tokens-per-step", 64, "--data.corpus", packed]
    status, out, err = call(
        capsys, "train", "books", "--init-from", "builtin", *settings, "--run-dir", tmp_path / "run", "--json"
    )
    assert status == 0, err
    assert json.loads(out)["train"]["loss"] < 6  # 8.3 from random weights


def test_none_is_spelled_as_people_do(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--model.top-k", "none"], ["--model.top-k=none"], ["--model.top_k", "None"]):
        status, out, err = call(capsys, "plan", "demo", *words, "--json")
        assert status == 0, err
        assert json.loads(out)["flops_per_token"]["of_which_recurrence"] == 5 * 64 * 320 * 3
    # Where it is text, it is text.
    _, _, err = call(capsys, "generate", "none", "--prompt", "x")
    assert "none: no such folder" in err


def test_presets_and_verbs_fit_a_terminal_and_say_their_size(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "train", "--help")
    assert max(map(len, out.splitlines())) <= 80
    for name, make in PRESETS.items():
        model = dataclasses.replace(make().model, vocab_size=1)
        counts = counting.count(model)
        size = counts.non_embedding_parameters / 1e6
        said = re.search(r"([\d.]+) M parameters outside the embedding", " ".join((make.__doc__ or "").split()))
        assert said is not None, name
        assert float(said[1]) == pytest.approx(size, rel=0.05), name
    _, out, _ = call(capsys, "--help")
    assert max(map(len, out.splitlines())) <= 80


def test_the_last_line_of_training_says_what_came_of_it(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a run"
    assert call(capsys, "train", "demo", *TINY, "--data.corpus", workplace / "packed", "--run-dir", folder)[0] == 0
    status, _, err = call(capsys, "train", "--resume", folder)
    bits = json.loads((folder / "result.json").read_text())["evaluation"]["bits_per_byte"]
    assert status == 0
    last = err.splitlines()[-1]
    said = rf"held-out {bits:.3f} bits/byte after 8 steps in 0:\d\d; next: fmem generate '{folder}' --prompt TEXT"
    assert re.match(said, last)


def test_layers_are_counted_from_one(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = call(capsys, "evaluate", workplace / "run", "--json")
    assert [layer["layer"] for layer in json.loads(out)["routing"]] == [0]
    rows = [line.split() for line in err[err.index("dead states") :].splitlines()]
    assert any(row[1:2] == ["1"] for row in rows)


def test_doctor_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as for users
    _, _, err = call(capsys, "doctor")
    table = [line for line in err.splitlines() if "float32" in line or "bfloat16" in line]
    assert table
    assert not any("…" in line for line in table)
    assert all("pass" in line for line in table)
