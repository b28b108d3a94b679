"""`fmem compare`: one real comparison; the rest with processes that only write what a training leaves."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from factorization_memory.cli import dispatch
from factorization_memory.cli.common import console
from factorization_memory.config import RunConfig, from_dict
from factorization_memory.data.shards import PackedCorpus, pack
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation import recall_suite
from factorization_memory.experiments import comparison, planning
from factorization_memory.experiments.display import Display
from factorization_memory.experiments.processes import Job
from factorization_memory.experiments.reading_order import same_order
from factorization_memory.reports.comparison_table import tables
from factorization_memory.runs import RunLock

TINY = [
    "--model.hidden-size", "16", "--model.num-layers", "1", "--model.num-states", "8", "--model.num-heads", "1",
    "--data.context-length", "32", "--training.tokens-per-step", "128", "--training.steps", "8", "--training.log-every", "1",
    "--training.evaluate-every", "4", "--training.evaluation-tokens", "256", "--training.device", "cpu",
    "--optimizer.warmup-steps", "4", "--model.top-k", "4", "--model.update-lag", "0", "--model.rates", "state",
    "--model.no-value-skip",
]  # fmt: skip
CONTENDERS = ["demo", "wide=demo:model.num-states=16,model.top-k=none"]

# A loss that depends on the contender, the learning rate (best at 0.002) and the seed. The model "breaks" at --seeds 7, that of
# one called "broken" always; at --seeds 8 the loss far into a text is not finite, and at --seeds 9 no loss is.
WORKER = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1]).parent
job = json.loads((folder / "job.json").read_text())
config = job["config"]
training, rate = config["training"], config["optimizer"]["learning_rate"]
if training["seed"] == 7 or config["name"] == "broken":
    sys.exit("out of memory")
if rate > 0.1:
    (folder / "failure.json").write_text(json.dumps({"message": "the loss is nan", "diverged": True, "stopped": False}))
    sys.exit(1)
loss = 2 + 100 * abs(rate - 0.002) + training["seed"] / 100 + (0.5 if config["name"] == "wide" else 0) * (1 + training["seed"])
if training["seed"] == 9:
    loss = None
def figures(loss):
    if loss is None:
        return {"tokens": 1000, "bytes": 3000, "loss": None, "bits_per_byte": None, "perplexity": None}
    return {"tokens": 1000, "bytes": 3000, "loss": loss, "bits_per_byte": loss / 2, "perplexity": 1.0}
def a_bin(start, end):
    more = {"restarted_loss": 1.0, "restarted_bits_per_byte": 1.0, "gain": 0.0, "gain_error": 0.0, "loss_error": 0.1}
    far = None if loss is None or training["seed"] == 8 else loss + 0.1
    return {"start": start, "end": end, **figures(far), **more}
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(training["steps"]):
        line = {"kind": "train", "step": step + 1, "loss": loss, "tokens_per_second": 1.0 if step == 0 else 50.0 + step}
        file.write(json.dumps(line) + "\\n")
if job["evaluation"] is not None:
    length = config["data"]["context_length"]
    bins = [a_bin(length // 2, length), a_bin(length, 2 * length), a_bin(2 * length, 4 * length)]
    position = {"context_length": length, "max_position": 4 * length, "bins": bins}
    evaluation = {"sources": {"en": figures(loss)}, "total": figures(loss), "position": {"en": position}}
    evaluation["recall"] = {"en": {"repeated": figures(loss - 1), "new": figures(loss + 1)}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
evaluation = {"step": 1, "sources": {"en": figures(loss)}, "bits_per_byte": figures(loss)["bits_per_byte"]}
(folder / "result.json").write_text(json.dumps({"stopped": "finished", "seconds": 1.0, "evaluation": evaluation}))
"""


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `fmem compare` in this process."""
    try:
        status = dispatch(["compare", *(str(a) for a in arguments)])
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    for language, line in (("en", "The {0}th wise man said {1}.\n"), ("ja", "{0}は{1}である。\n")):
        (folder / f"{language}.txt").write_text("".join(line.format(i, i * i) for i in range(600)), encoding="utf-8")
    sources = [(language, folder / f"{language}.txt") for language in ("en", "ja")]
    pack(sources, Tokenizer.bytes_level(), folder / "packed", holdout="tail", holdout_fraction=0.2)
    return folder / "packed"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Trainings that write their figures at once; the job files of those that were started."""
    started: list[Path] = []

    def command(job_file: Path) -> list[str]:
        started.append(job_file)
        return [sys.executable, "-S", "-c", WORKER, str(job_file)]

    monkeypatch.setattr(comparison, "command", command)
    return started


def test_two_models_from_text_to_table(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--seeds",
        0,
        "--learning-rates",
        "1e-3",
        "--positions",
        4,
        "--stretches",
        2,
        "--parallel",
        2,
        "--max-tokens",
        512,
    ]
    arguments = [*CONTENDERS, *TINY, *options, "--corpus", corpus, "--out", tmp_path / "out"]
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 0, err
    record = json.loads(out)
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == record
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    first, wide = record["contenders"]
    assert first["matching"] == {"varied": {}, "target": first["parameters"]["non_embedding"], "difference": 0.0}
    assert set(wide["matching"]["varied"]) == {"model.intermediate_size"}
    assert abs(wide["parameters"]["non_embedding"] / first["parameters"]["non_embedding"] - 1) <= 0.005
    for contender in record["contenders"]:
        run = tmp_path / "out" / contender["seeds"][0]["folder"]
        result = json.loads((run / "result.json").read_text())
        assert result["parameters"] == contender["parameters"]["total"]
        evaluation = json.loads((run / "evaluation.json").read_text())
        assert contender["summary"]["context"]["ja"]["loss"] == {"mean": evaluation["sources"]["ja"]["loss"], "spread": None}
        repeated = evaluation["recall"]["ja"]["repeated"]["loss"]
        assert contender["summary"]["recall"]["repeated"]["ja"]["loss"] == {"mean": repeated, "spread": None}
        near = evaluation["recall"]["ja"]["repeated"]["by_distance"][0]
        assert contender["summary"]["distance"]["1-15"]["ja"]["loss"] == {"mean": near["loss"], "spread": None}
        beyond = evaluation["position"]["en"]["beyond"]["4"]
        assert contender["summary"]["positions"]["4"]["en"]["loss"]["mean"] == beyond["loss"]
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000008"]
        assert from_dict(RunConfig, json.loads((run / "config.json").read_text())).training.seed == 0
    assert wide["difference"]["context"]["en"]["loss"]["mean"] == pytest.approx(
        wide["summary"]["context"]["en"]["loss"]["mean"] - first["summary"]["context"]["en"]["loss"]["mean"]
    )
    # The same command again only shows it.
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    status, again, _ = call(capsys, *arguments, "--json")
    assert (status, json.loads(again)) == (0, record)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == times


def test_recall_tasks_are_asked_for(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "ITEMS", 1)
    options = ["--seeds", 0, "--learning-rates", "1e-3", "--positions", 4, "--stretches", 1, "--max-tokens", 64, "--recall"]
    arguments = [*CONTENDERS, *TINY, *options, "--corpus", corpus, "--out", tmp_path / "out"]
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 0, err
    record = json.loads(out)
    assert record["shared"]["evaluation"]["recall_items"] == 1
    first, wide = record["contenders"]
    evaluation = json.loads((tmp_path / "out" / wide["seeds"][0]["folder"] / "evaluation.json").read_text())
    shares = recall_suite.headline(evaluation["recall_tasks"])
    assert {task: set(each) for task, each in shares.items()} == {
        "associative": {"random"}, "needle": {"en", "ja"}, "copy": {"random", "en", "ja"},
    }  # fmt: skip
    for task, source in (("associative", "random"), ("needle", "ja"), ("copy", "en")):
        share, other = (each["summary"]["tasks"][task][source]["accuracy"]["mean"] for each in (wide, first))
        assert share == shares[task][source]
        assert wide["difference"]["tasks"][task][source]["accuracy"]["mean"] == pytest.approx(share - other)
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "Share correct in recall tasks" in page
    assert "| contender | values, random | needles, en | needles, ja | copies, random | copies, en | copies, ja |" in page
    status, out, err = call(capsys, *arguments, "--json", "--no-train")
    assert status == 0, err
    assert json.loads(out)["contenders"] == record["contenders"]
    # It was not asked for once: the record is as it was before there was a suite.
    del wide["summary"]["tasks"], first["summary"]["tasks"]
    assert not any("recall tasks" in table.title for table in tables(record))


def test_too_little_text_for_recall_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("A short text.\n" * 40)
    pack([("en", tmp_path / "short.txt")], Tokenizer.bytes_level(), tmp_path / "packed", holdout="tail", holdout_fraction=0.2)
    status, _, err = call(capsys, *CONTENDERS, *TINY, "--corpus", tmp_path / "packed", "--out", tmp_path / "out", "--recall")
    assert status == 2
    assert "--recall: the longest held-out text of the corpus has" in err
    assert "the shortest haystack needs 256" in err.replace("\n", " ")


def test_search_seeds_and_figures(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path]
) -> None:
    rates = ["--learning-rates", "1e-3", "2e-3", "4e-3", "wide=4e-3,8e-3,1.0"]
    arguments = [*CONTENDERS, *TINY, "--seeds", 0, 1, 2, *rates, "--positions", 4, "--alone-steps", 3, "--parallel", 3]
    arguments += ["--corpus", corpus, "--out", tmp_path / "out", "--search-steps", 2]
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 0, err
    assert len(pretended) == 2 * 3 + 2 * 3 + 2
    record = json.loads(out)
    first, wide = record["contenders"]
    assert (first["learning_rate"]["chosen"], first["learning_rate"]["at_edge"]) == (0.002, False)
    assert (wide["learning_rate"]["chosen"], wide["learning_rate"]["at_edge"]) == (0.004, True)
    assert [each["diverged"] for each in wide["learning_rate"]["candidates"]] == [False, False, True]
    search = json.loads((tmp_path / "out" / "runs" / "demo" / "search-0.002" / "job.json").read_text())["config"]
    assert (search["training"]["steps"], search["training"]["seed"], search["optimizer"]["warmup_steps"]) == (2, 1000, 1)
    trained = json.loads((tmp_path / "out" / "runs" / "wide" / "seed-2" / "job.json").read_text())["config"]
    assert (trained["training"]["steps"], trained["training"]["seed"], trained["optimizer"]["learning_rate"]) == (8, 2, 0.004)

    # Losses 2, 2.01, 2.02 against 2.7, 3.21, 3.72 (all at distance 0.002 from the best rate, times 100).
    context = first["summary"]["context"]["en"]["loss"]
    assert context == pytest.approx({"mean": 2.01, "spread": 0.01})
    assert first["summary"]["positions"]["4"]["en"]["loss"]["mean"] == pytest.approx(2.11)
    difference = wide["difference"]["context"]["en"]["loss"]
    assert difference == pytest.approx({"mean": 1.2, "standard_error": 0.5 / 3**0.5})
    assert (first["summary"]["n"], wide["difference"]["n"], first["difference"]) == (3, 3, None)
    assert first["summary"]["tokens_per_second"] == 54.0
    assert first["tokens_per_second_alone"] == 51.5
    assert len(first["summary"]["by_position"]["en"]) == 3
    assert set(record["shared"]["order"]) == {"0", "1", "2"}
    assert len(set(record["shared"]["order"].values())) == 3

    table = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith("| wide"))
    assert "3.2100 ± 0.5100" in row
    assert "0.004 (edge)" in row
    assert re.search(r"look further, compare in another folder with --learning-rates wide=.*0\.004,0\.008", table)
    assert "+1.2000 ± 0.2887" in table
    assert "diverged" in table
    repeated = next(line for line in table.split("(repeated)")[1].splitlines() if line.startswith("| wide"))
    assert "2.2100 ± 0.5100" in repeated
    assert "4.2100 ± 0.5100" in repeated
    assert "wide: model.intermediate_size from" in table
    assert "![Loss by position](compare.png)" in table
    assert "Learning rates were chosen on held-out text" in table
    assert "(given)" not in table
    assert record["parallel"] == [3]
    assert "3.2100 ± 0.5100" in err


def test_a_failing_run_is_named_and_tried_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path]
) -> None:
    arguments = [*CONTENDERS, *TINY, "--seeds", 0, 7, "--learning-rates", "2e-3", "--corpus", corpus, "--out", tmp_path / "out"]
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 1
    record = json.loads(out)
    assert not record["complete"]
    assert [(each["run"], each["message"]) for each in record["failures"]] == [
        ("demo, seed 7", "exit status 1; out of memory"), ("wide, seed 7", "exit status 1; out of memory"),
    ]  # fmt: skip
    assert [len(each["seeds"]) for each in record["contenders"]] == [1, 1]
    assert "NOT DONE: wide, seed 7 (runs/wide/seed-7): exit status 1; out of memory" in err
    assert len(pretended) == 4
    table = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert table.count("| wide (1 of 2 seeds) |") == 3  # losses, differences, recall
    assert "(given) The learning rate of demo, wide was not searched." in table
    assert "Learning rates were chosen" not in table
    assert call(capsys, *arguments)[0] == 1
    assert [path.parent.name for path in pretended[4:]] == ["seed-7", "seed-7"]


def test_figures_that_are_not_finite_are_a_failure(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path]
) -> None:
    arguments = [*CONTENDERS, *TINY, "--seeds", 0, 8, "--learning-rates", "2e-3", "--corpus", corpus, "--out", tmp_path / "out"]
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 1, err
    record = json.loads(out)
    assert [each["message"] for each in record["failures"]] == ["evaluation gave NaN or infinity"] * 2
    assert [[seed["seed"] for seed in each["seeds"]] for each in record["contenders"]] == [[0], [0]]
    # A search without any loss says so, rather than that nothing is missing.
    arguments = [*CONTENDERS, *TINY, "--seeds", 0, "--search-seed", 9, "--learning-rates", "1e-3", "2e-3", "--corpus", corpus]
    status, out, err = call(capsys, *arguments, "--out", tmp_path / "none", "--json")
    assert status == 1, err
    assert "diverged at every learning rate" in json.loads(out)["failures"][0]["message"]
    assert "compare.png" not in (tmp_path / "none" / "compare.md").read_text(encoding="utf-8")


def test_differences_are_to_the_first_that_was_trained(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path]
) -> None:
    arguments = ["broken=demo", *CONTENDERS, *TINY, "--seeds", 0, "--learning-rates", "2e-3", "--parallel", 3]
    arguments += ["--corpus", corpus, "--out", tmp_path / "out"]
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 1, err
    broken, demo, wide = json.loads(out)["contenders"]
    assert (broken["difference"], demo["difference"], wide["difference"]["n"]) == (None, None, 1)
    page = tmp_path / "out" / "compare.md"
    table = page.read_text(encoding="utf-8")
    assert "| broken (0 of 1 seeds) |" in table
    below = table.partition("Difference to demo in nats per token")[2]
    assert [line.split(" |")[0] for line in below.split("\n\n")[1].splitlines()[2:]] == ["| wide"]


def test_pages_that_are_missing_are_written_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path]
) -> None:
    arguments = [*CONTENDERS, *TINY, "--seeds", 0, "--learning-rates", "2e-3", "--corpus", corpus, "--out", tmp_path / "out"]
    assert call(capsys, *arguments)[0] == 0
    page, picture, record = (tmp_path / "out" / name for name in ("compare.md", "compare.png", "compare.json"))
    text, before = page.read_bytes(), record.stat().st_mtime_ns
    page.unlink()
    picture.unlink()
    assert call(capsys, *arguments)[0] == 0
    assert page.read_bytes() == text
    assert picture.exists()
    assert record.stat().st_mtime_ns == before


def test_the_best_get_more_seeds_and_others_join_in(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path]
) -> None:
    options = [*TINY, "--learning-rates", "2e-3", "--corpus", corpus, "--out", tmp_path / "out", "--json"]
    assert call(capsys, *CONTENDERS, *options, "--seeds", 0)[0] == 0
    assert len(pretended) == 2
    # A plan of before contenders had seeds of their own.
    plan_file = tmp_path / "out" / "plan.json"
    plan = json.loads(plan_file.read_text())
    for contender in plan["contenders"].values():
        del contender["seeds"]
    plan_file.write_text(json.dumps(plan | {"schema_version": 1, "seeds": [0]}))

    status, out, err = call(capsys, *CONTENDERS, "late=demo:model.top-k=2", *options, "--seeds", 0, "wide=2,0,1")
    assert status == 0, err
    assert [path.parent.relative_to(tmp_path / "out" / "runs").as_posix() for path in pretended[2:]] == [
        "wide/seed-1", "wide/seed-2", "late/seed-0",
    ]  # fmt: skip
    record = json.loads(out)
    assert [each["planned_seeds"] for each in record["contenders"]] == [[0], [0, 1, 2], [0]]
    assert [each["summary"]["n"] for each in record["contenders"]] == [1, 3, 1]
    assert record["contenders"][1]["difference"]["n"] == 1
    assert record["complete"]
    table = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert "seeds 0; wide: 0, 1, 2)" in table
    assert "| wide (3 seeds) |" in table
    assert "| late (1 seed) |" in table
    assert "| wide (1 seed) | +" in table  # of the differences

    # What is there stays: with fewer of it, or changed, it is another comparison.
    for fewer in (
        [*CONTENDERS, *options, "--seeds", 0, "wide=2,0,1"], [*CONTENDERS, "late=demo:model.top-k=2", *options, "--seeds", 0],
        [*CONTENDERS, "late=demo:model.top-k=1", *options, "--seeds", 0, "wide=2,0,1"],
    ):  # fmt: skip
        status, _, err = call(capsys, *fewer)
        assert status == 2
        assert "contains another comparison" in err
    assert len(pretended) == 5

    # What has no folder any more may be left out, and a record of other runs is not taken for this one's.
    shutil.rmtree(tmp_path / "out" / "runs" / "late")
    shutil.rmtree(tmp_path / "out" / "runs" / "wide" / "seed-2")
    status, out, err = call(capsys, *CONTENDERS, *options, "--seeds", 0, "wide=0,1")
    assert status == 0, err
    record = json.loads(out)
    assert [(each["name"], each["planned_seeds"]) for each in record["contenders"]] == [("demo", [0]), ("wide", [0, 1])]
    (tmp_path / "out" / "compare.json").write_text(json.dumps({**record, "contenders": record["contenders"][:1]}))
    status, out, _ = call(capsys, *CONTENDERS, *options, "--seeds", 0, "wide=0,1")
    assert (status, len(json.loads(out)["contenders"]), len(pretended)) == (0, 2, 5)


def test_an_evaluation_with_other_options_is_made_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path]
) -> None:
    arguments = [*CONTENDERS, *TINY, "--learning-rates", "2e-3", "--corpus", corpus, "--out", tmp_path / "out", "--seeds", 0]
    assert call(capsys, *arguments)[0] == 0
    file = tmp_path / "out" / "runs" / "wide" / "seed-0" / "evaluation.json"
    evaluation = json.loads(file.read_text())
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    file.write_text(json.dumps(evaluation | {"evaluated": plan["evaluation"]}))
    assert call(capsys, *arguments)[0] == 0
    assert len(pretended) == 2
    file.write_text(json.dumps(evaluation | {"evaluated": plan["evaluation"] | {"stretches": 99}}))
    assert call(capsys, *arguments, "--no-train")[0] == 1
    assert call(capsys, *arguments)[0] == 0
    assert [path.parent.parent.name for path in pretended[2:]] == ["wide"]


@pytest.mark.parametrize(
    "damage",
    [
        {"contenders": {"demo": None}},
        {"contenders": []},
        {"order": 3},
        {"schema_version": 1},
        {"contenders": {"demo": {"seeds": 5}}},
    ],
)
def test_a_damaged_plan_is_another_comparison(
    damage: dict[str, Any], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path]
) -> None:
    arguments = [*CONTENDERS, *TINY, "--learning-rates", "2e-3", "--corpus", corpus, "--out", tmp_path / "out", "--seeds", 0]
    assert call(capsys, *arguments)[0] == 0
    file = tmp_path / "out" / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    status, _, err = call(capsys, *arguments)
    assert (status, len(pretended)) == (2, 2)
    assert "contains another comparison" in err


def test_another_comparison_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path]
) -> None:
    arguments = [*CONTENDERS, *TINY, "--seeds", 0, "--corpus", corpus, "--out", tmp_path / "out"]
    assert call(capsys, *arguments)[0] == 0
    before = len(pretended)
    status, _, err = call(capsys, *arguments, "--optimizer.weight-decay", 0.5)
    assert status == 2
    assert "contains another comparison, with contenders.demo.optimizer.weight_decay = 1.0 instead of 0.5" in err
    # Where the corpus lies and how many run at once decide nothing.
    (tmp_path / "elsewhere").symlink_to(corpus)
    moved = [tmp_path / "elsewhere" if each == corpus else each for each in arguments]
    assert call(capsys, *moved, "--parallel", 2)[0] == 0
    assert len(pretended) == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert "fmem compare" in out


def test_dry_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--corpus", corpus, "--out", tmp_path / "out", "--dry-run", "--json"]
    status, out, err = call(capsys, *CONTENDERS, *TINY, "--match-to", "wide", *options)
    assert status == 0
    plan = json.loads(out)
    assert plan["contenders"]["demo"]["learning_rates"] == [0.003, 0.006, 0.012]
    assert plan["contenders"]["demo"]["model"]["vocab_size"] == PackedCorpus.open(corpus).tokenizer.vocab_size
    assert "intermediate_size" in err
    assert "Contenders differ" not in err
    assert not (tmp_path / "out").exists()
    status, _, err = call(capsys, "demo", "wide=demo:optimizer.warmup-steps=2", *TINY, *options)
    assert "Contenders differ in optimizer.warmup_steps (demo 4, wide 2)." in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "name two or more"),
        (["demo", "demo"], "contender 'demo': this name is used twice"),
        (["demo", "dmo"], "'dmo' is not a preset; did you mean 'demo'?"),
        (["demo", "b=demo", "--learning-rates", "c=1e-3"], "--learning-rates: unknown contender 'c'"),
        (["demo", "b=demo", "--learning-rates", "fast"], "--learning-rates='fast': use positive numbers"),
        (["demo", "b=demo", "--match-to", "c"], "--match-to: unknown contender 'c'"),
        (["demo", "b=demo", "--match-to", "b", "--parameters", "9"], "cannot be combined with --match-to"),
        (["demo", "b=demo", "--seeds", "1", "1"], "--seeds=1,1: has duplicates; give each once"),
        (["demo", "b=demo", "--seeds", "1", "-2"], "--seeds=1,-2: use whole numbers"),
        (["demo", "b=demo", "--seeds", "1", "b=one"], "--seeds=b=one: use whole numbers"),
        (["demo", "b=demo", "--seeds", "1", "c=2"], "--seeds: unknown contender 'c'"),
        (["demo", "b=demo", "--seeds", "b=0,,1"], "--seeds=b=0,,1: use whole numbers"),
        (["demo", "b=demo", "--seeds", str(2**32)], "use whole numbers from 0 to 4294967295"),
        (["demo", "b=demo", "--seeds", "b=2"], "--seeds: no seed for 'demo'; give one or more for all, or demo=0,1"),
        (["demo", "b=demo", "--seeds", "1", "b=3,1000"], "--search-seed=1000: also one of --seeds"),
        (["demo", "b=demo", "--seeds", "1000"], "--search-seed=1000: also one of --seeds"),
        (["demo", "b=demo", "--positions", "3"], "--positions=3: use powers of two"),
        (["demo", "b=demo", "--parallel", "0"], "--parallel=0: use 1 or more"),
        (["demo", "b=demo", "--gpus", "0"], "--gpus=0: use 1 or more"),
        (["demo", "b=demo", "--search-steps", "9"], "--search-steps=9: use at most training.steps=8"),
        (["demo", "b=demo", "--training.seed", "3"], "give the seeds with --seeds"),
        (["demo", "b=demo", "--optimizer.learning-rate", "3"], "give the candidates with --learning-rates"),
        (["demo", "b=demo", "--parameters", "100"], "contender 'demo': model.intermediate_size cannot bring"),
        (["demo", "b=demo:model.top-k=99"], "contender 'b=demo:model.top-k=99': model.top_k=99"),
        (
            ["demo", "b=demo:optimizer.warmup-steps=8"],
            "contender 'b': optimizer.warmup_steps=8: use fewer than training.steps=8",
        ),
        (["demo", "b=demo:optimizer.learning-rate=-1"], "optimizer.learning_rate=-1.0: use a positive number"),
    ],
)
def test_bad_usage(
    arguments: list[str], message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(capsys, *arguments, *TINY, "--corpus", corpus, "--out", tmp_path / "out")
    assert status == 2, err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_contenders_that_cannot_be_matched_are_told_a_size_that_fits_all(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contenders = ["demo", "deep=demo:model.num-layers=8"]
    options = ["--model.hidden-size", "64", *TINY[4:], "--corpus", corpus, "--out", tmp_path / "out", "--dry-run", "--json"]
    status, _, err = call(capsys, *contenders, *options, "--parameters", 10**7)
    assert status == 2
    reached = dict(re.findall(r"(demo|deep) ([\d,]+) to", err))
    assert reached.keys() == {"demo", "deep"}
    found = re.search(r"--parameters (\d+) fits all", err)
    assert found is not None, err
    assert call(capsys, *contenders, *options, "--parameters", found[1])[0] == 0


def test_all_have_one_schedule_unless_told_otherwise(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = TINY.index("--optimizer.warmup-steps")
    small = [*TINY[:at], *TINY[at + 2 :], "--training.steps", "400", "--model.hidden-size", "192"]
    contenders = ["demo", "other=paper", "own=paper:optimizer.warmup-steps=7"]
    options = ["--corpus", corpus, "--out", tmp_path / "out", "--dry-run", "--json"]

    def schedules(*more: str) -> list[tuple[str, int]]:
        status, out, err = call(capsys, *contenders, *small, *options, *more)
        assert status == 0, err
        found = json.loads(out)["contenders"].values()
        return [(each["optimizer"]["schedule"], each["optimizer"]["warmup_steps"]) for each in found]

    assert schedules() == [("wsd", 40), ("wsd", 40), ("wsd", 7)]
    assert schedules("--own-schedules") == [("wsd", 40), ("cosine", 100), ("cosine", 7)]


def test_text_in_another_order_is_refused(corpus: Path) -> None:
    opened = PackedCorpus.open(corpus)
    one = from_dict(RunConfig, {"data": {"context_length": 32}, "training": {"tokens_per_step": 128, "steps": 4}})
    cut = from_dict(
        RunConfig, {"data": {"context_length": 32}, "training": {"tokens_per_step": 128, "steps": 4, "micro_batch_size": 2}}
    )
    other = from_dict(RunConfig, {"data": {"context_length": 32}, "training": {"tokens_per_step": 256, "steps": 4}})
    assert same_order(opened, {"a": one, "b": cut}, 0) == same_order(opened, {"a": one}, 0)
    assert same_order(opened, {"a": one}, 1) != same_order(opened, {"a": one}, 0)
    with pytest.raises(RuntimeError, match="contender 'b': would read the text in another order than 'a'"):
        same_order(opened, {"a": one, "b": other}, 0)


def test_two_at_once_in_one_folder(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(tmp_path / "out"):
        status, _, err = call(capsys, *CONTENDERS, *TINY, "--corpus", corpus, "--out", tmp_path / "out")
    assert status == 1
    assert f"process {os.getpid()}" in err


def test_the_record_is_kept_while_runs_end_and_can_be_made_without_training(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = [*CONTENDERS, *TINY, "--seeds", 0, 1, "--learning-rates", "1e-3", "--corpus", corpus, "--out", out]
    seen = []
    on_end = Display.on_end

    def look(self: Display, *told: Any) -> None:
        on_end(self, *told)
        assert not (out / "compare.md").exists()  # that of fewer runs is gone
        (out / "compare.md").write_text("of fewer runs")
        record = json.loads((out / "compare.json").read_text())
        seen.append((sum(len(each["seeds"]) for each in record["contenders"]), record["complete"]))

    monkeypatch.setattr(Display, "on_end", look)
    assert call(capsys, *arguments)[0] == 0
    assert seen == [(1, False), (2, False), (3, False), (4, True)]
    assert "of fewer runs" not in (out / "compare.md").read_text(encoding="utf-8")

    for name in ("compare.json", "compare.md", "compare.png", "runs/wide/seed-1/evaluation.json"):
        (out / name).unlink()
    where = {"gpu": "A card", "torch": "0.1", "command": ["compare_run.py"], "resumed_at_step": 3, "date": "9999"}
    (out / "runs/demo/seed-0/environment.json").write_text(json.dumps(where))
    order = json.loads((out / "runs/demo/seed-0/job.json").read_text())
    (out / "runs/demo/seed-0/job.json").write_text(json.dumps(order | {"threads": 7}))
    trained = len(pretended)
    status, text, _ = call(capsys, *arguments, "--no-train", "--json")
    assert (status, len(pretended)) == (1, trained)
    record = json.loads(text)
    assert [len(each["seeds"]) for each in record["contenders"]] == [2, 1]
    assert [each["run"] for each in record["failures"]] == ["wide, seed 1"]
    assert (record["environment"]["gpu"], record["environment"]["torch"]) == ("A card", "0.1")
    assert record["threads"] == 7
    assert "resumed_at_step" not in record["environment"]
    assert record["environment"]["command"] != ["compare_run.py"]
    assert "train" not in record["command"].replace("training", "")
    assert (out / "compare.md").exists()
    status, _, err = call(capsys, *arguments[:-1], tmp_path / "other", "--no-train")
    assert (status, (tmp_path / "other").exists()) == (2, False)
    assert "contains no comparison; drop --no-train" in err


def test_a_record_that_cannot_be_kept_ends_no_training(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write = comparison.write_atomic

    def full(path: Path, text: str) -> None:
        written.append(path.name)
        if path.name == "compare.json" and written.count(path.name) < 3:
            raise OSError("no space left")
        write(path, text)

    monkeypatch.setattr(comparison, "write_atomic", full)
    arguments = [*CONTENDERS, *TINY, "--seeds", 0, "--learning-rates", "1e-3", "--corpus", corpus, "--out", tmp_path / "out"]
    status, _, err = call(capsys, *arguments)
    assert (status, len(pretended)) == (0, 2), err
    assert err.count("compare.json: not written yet: no space left") == 2
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["complete"]


def test_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job("a", "seed", "seed 0", tmp_path, RunConfig())
    line: dict[str, Any] = {"step": 20, "loss": 3.25, "tokens_per_second": 1234.5}
    display = Display(console())
    display.PLAIN_SECONDS = 0.0
    with display:
        display.on_start(job)
        display.on_tick()
        display.on_progress(job, line)
        display.on_tick()
        display.on_end(job, {"message": "no memory", "diverged": False, "stopped": False})
        display.on_tick()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "a, seed 0: started"
    assert said[2].split() == ["a,", "seed", "0:", "20/1000", "3.2500", "1,234"]
    assert said[3].startswith("a, seed 0: no memory (see ")


def test_the_time_that_all_runs_still_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the steps done here alone: those of an earlier call took no time of this one."""
    now = [100.0]
    monkeypatch.setattr("factorization_memory.experiments.display.time.monotonic", lambda: now[0])
    config = from_dict(RunConfig, {"training": {"steps": 10}})
    jobs = [Job("a", "seed", f"seed {i}", tmp_path / str(i), config) for i in range(4)]
    display = Display(Console(file=io.StringIO()), total_steps=40)
    assert display.time_left() is None
    display.on_end(jobs[0], None)  # was done before
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "metrics.jsonl").write_text('{"kind": "train", "step": 4}\n')
    display.on_start(jobs[1])  # goes on from step 4
    display.on_start(jobs[2])
    now[0] += 60
    display.on_progress(jobs[1], {"step": 6})
    display.on_progress(jobs[2], {"step": 4})
    assert display.time_left() == "20 of 40 steps left over all runs, about 3:20"
