from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from factorization_memory.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    GatedDeltaNetConfig,
    Mamba2Config,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from factorization_memory.data.shards import PackedCorpus
from factorization_memory.models import LanguageModel
from factorization_memory.runs import CheckpointError, RunLockedError, find_checkpoint, list_checkpoints, load_model
from factorization_memory.runs.record import RunFolderError
from factorization_memory.training import trainer as trainer_module
from factorization_memory.training.guard import TrainingDivergedError
from factorization_memory.training.progress import TrainingObserver
from factorization_memory.training.step import accumulate_gradient
from factorization_memory.training.trainer import Trainer

STEPS = 12


def config(**training: Any) -> RunConfig:
    settings = {
        "steps": STEPS,
        "tokens_per_step": 64,
        "log_every": 3,
        "evaluate_every": 4,
        "checkpoint_every": 5,
        "device": "cpu",
        **training,
    }
    return RunConfig(
        model=ModelConfig(hidden_size=16, num_layers=2, num_states=4),
        data=DataConfig(context_length=16, read_ahead=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        training=TrainingConfig(**settings),
    )


class Watcher(TrainingObserver):
    """Notes every step, and does `action` after step `at`."""

    def __init__(self, at: int | None = None, action: Callable[[], None] | None = None) -> None:
        self.at, self.action = at, action
        self.curve: list[tuple[int, float, float, float]] = []
        self.messages: list[str] = []
        self.started: list[tuple[int, int]] = []
        self.ended = 0

    def on_start(self, total_steps: int, parameters: int, step: int) -> None:
        self.started.append((total_steps, step))

    def on_step(self, metrics: dict[str, Any]) -> None:
        self.curve.append((metrics["step"], metrics["loss"], metrics["gradient_norm"], metrics["bits_per_byte"]))
        if metrics["step"] == self.at and self.action is not None:
            self.action()

    def on_message(self, message: str) -> None:
        self.messages.append(message)

    def on_end(self) -> None:
        self.ended += 1


def kill(number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def evaluate(model: LanguageModel, step: int) -> dict[str, Any]:
    """Held-out loss stood in for by a number that is best at step 8; it uses the generator, as an evaluator may."""
    assert not model.training
    assert not torch.is_grad_enabled()
    torch.rand(5)
    return {"sources": {}, "bits_per_byte": 2.0 + abs(step - 8) / 10}


def sample(model: LanguageModel) -> list[dict[str, Any]]:
    return [{"prompt": "It ", "text": str(float(torch.rand(1)))}]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    def forbid(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=forbid) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of the log without what no two runs share."""
    timing = ("seconds", "tokens_per_second", "data_wait_share")
    return [{key: value for key, value in line.items() if key not in timing} for line in lines(run_dir)]


def weights(run_dir: Path) -> torch.Tensor:
    model, _, _ = load_model(find_checkpoint(run_dir, "last"))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_run_learns_and_leaves_a_whole_folder(corpus: PackedCorpus, run_dir: Path) -> None:
    watcher = Watcher()
    trainer = Trainer(config(sample_every=6), corpus, run_dir, evaluate=evaluate, sample=sample, observer=watcher)
    result = trainer.run()
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoints", "config.json", "environment.json", "metrics.jsonl", "result.json", "tokenizer.json",
    ]  # fmt: skip
    assert [point[0] for point in watcher.curve] == list(range(1, STEPS + 1))
    assert watcher.curve[-1][1] < watcher.curve[0][1] - 0.3
    assert watcher.started == [(STEPS, 0)]
    assert watcher.ended == 1

    log = lines(run_dir)
    assert [(line["kind"], line["step"]) for line in log] == [
        ("train", 3), ("evaluation", 4), ("routing", 4), ("train", 6), ("sample", 6), ("evaluation", 8), ("routing", 8),
        ("train", 9), ("train", 12), ("evaluation", 12), ("routing", 12), ("sample", 12),
    ]  # fmt: skip
    train = [line for line in log if line["kind"] == "train"]
    for line, steps in zip(train, (range(3), range(3, 6), range(6, 9), range(9, 12)), strict=True):
        assert line["loss"] == pytest.approx(sum(watcher.curve[i][1] for i in steps) / 3)
        # Bytes are the tokens here, so that bits per byte are bits per token, but for document ends.
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / 0.693147, rel=0.02)
        assert line["tokens"] == 64 * line["step"]
        assert 0 <= line["data_wait_share"] <= 1
        assert line["tokens_per_second"] > 0
        assert line["gradient_norm"] > 0
    assert train[0]["learning_rate"] == pytest.approx(0.0075)
    routing = next(line for line in log if line["kind"] == "routing")
    assert routing["states"] == 8
    assert len(routing["entropy"]) == len(routing["layers"]) == 2

    assert json.loads((run_dir / "result.json").read_text()) == result
    assert result["stopped"] == "finished"
    assert result["steps"] == STEPS
    assert result["tokens"] == 64 * STEPS
    assert result["evaluation"]["step"] == 12
    assert result["best_evaluation"]["step"] == 8
    assert result["checkpoints"] == {"last": "checkpoints/step-00000012", "best": "checkpoints/step-00000008"}
    assert result["train"]["loss"] == train[-1]["loss"]
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000008", "step-00000010", "step-00000012"]
    _, tokenizer, saved = load_model(run_dir)
    assert saved.model.vocab_size == tokenizer.vocab_size == corpus.tokenizer.vocab_size
    assert json.loads((run_dir / "config.json").read_text())["model"]["vocab_size"] == tokenizer.vocab_size


ASSOCIATIVE = ModelConfig(hidden_size=16, num_layers=2, num_states=4, top_k=2, update_lag=1, rates="head", conv_size=3)
OTHER_MIXERS = ModelConfig(
    hidden_size=16, num_layers=4, num_states=4, mixers=("attention", "memory", "mamba2", "gated_deltanet"),
    attention=AttentionConfig(num_heads=2, sliding_window=12), mamba2=Mamba2Config(state_size=4, head_size=8, chunk_size=8),
    gated_deltanet=GatedDeltaNetConfig(num_heads=2, head_size=4),
)  # fmt: skip


@pytest.mark.parametrize(
    ("stop_at", "carry", "model"),
    [
        (7, False, None),
        (7, True, None),
        (8, False, None),
        (5, True, None),
        (5, True, OTHER_MIXERS),
        (7, False, ASSOCIATIVE),
        (5, True, ASSOCIATIVE),
    ],
)
def test_interrupted_and_resumed_is_the_same_run_bit_for_bit(
    corpus: PackedCorpus, tmp_path: Path, stop_at: int, carry: bool, model: ModelConfig | None
) -> None:
    settings = config(carry_state=carry, micro_batch_size=2, sample_every=4)
    settings = dataclasses.replace(settings, model=model or settings.model)
    whole, parts = Watcher(), Watcher(stop_at, kill())
    Trainer(settings, corpus, tmp_path / "whole", evaluate=evaluate, sample=sample, observer=whole).run()
    first = Trainer(settings, corpus, tmp_path / "parts", evaluate=evaluate, sample=sample, observer=parts).run()
    assert first["stopped"] == "interrupted"
    assert first["signal"] == "SIGTERM"
    assert first["steps"] == stop_at
    assert len(parts.messages) == 1
    assert f"step {stop_at} of {STEPS}" in parts.messages[0]
    assert "--resume" in parts.messages[0]
    again = Trainer(settings, corpus, tmp_path / "parts", evaluate=evaluate, sample=sample, observer=parts).run(resume=True)
    assert again["stopped"] == "finished"
    assert again["signal"] is None
    assert parts.started == [(STEPS, 0), (STEPS, stop_at)]
    assert parts.curve == whole.curve
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_crash_loses_only_the_steps_after_the_last_checkpoint(corpus: PackedCorpus, tmp_path: Path) -> None:
    def crash() -> None:
        raise RuntimeError("power cut")

    whole, parts = Watcher(), Watcher(9, crash)
    Trainer(config(), corpus, tmp_path / "whole", observer=whole).run()
    with pytest.raises(RuntimeError, match="power cut"):
        Trainer(config(), corpus, tmp_path / "parts", observer=parts).run()
    assert parts.ended == 1
    parts.at = None
    Trainer(config(), corpus, tmp_path / "parts", observer=parts).run(resume=True)
    assert parts.started[-1] == (STEPS, 5)
    assert parts.curve == whole.curve[:9] + whole.curve[5:]
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")


def test_a_second_signal_stops_at_once_and_the_run_can_still_resume(corpus: PackedCorpus, run_dir: Path) -> None:
    def twice() -> None:
        kill(signal.SIGINT)()
        kill(signal.SIGINT)()

    watcher = Watcher(7, twice)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config(), corpus, run_dir, observer=watcher).run()
    assert Trainer(config(), corpus, run_dir).run(resume=True)["stopped"] == "finished"


def test_looking_more_often_does_not_change_what_is_trained(corpus: PackedCorpus, tmp_path: Path) -> None:
    seldom, often = Watcher(), Watcher()
    Trainer(config(evaluate_every=0), corpus, tmp_path / "a", observer=seldom).run()
    settings = config(evaluate_every=1, sample_every=1, log_every=1, checkpoint_every=0)
    Trainer(settings, corpus, tmp_path / "b", evaluate=evaluate, sample=sample, observer=often).run()
    assert seldom.curve == often.curve


def test_gradient_accumulation_gives_the_curve_of_the_whole_batch(corpus: PackedCorpus, tmp_path: Path) -> None:
    whole, split = Watcher(), Watcher()
    Trainer(config(), corpus, tmp_path / "a", observer=whole).run()
    Trainer(config(micro_batch_size=1), corpus, tmp_path / "b", observer=split).run()
    torch.testing.assert_close(torch.tensor(split.curve), torch.tensor(whole.curve), rtol=2e-3, atol=1e-4)


def test_bfloat16_trains_close_to_float32(corpus: PackedCorpus, tmp_path: Path) -> None:
    full, half = Watcher(), Watcher()
    Trainer(config(), corpus, tmp_path / "a", observer=full).run()
    Trainer(config(precision="bfloat16"), corpus, tmp_path / "b", observer=half).run()
    assert half.curve != full.curve
    losses = [torch.tensor([point[1] for point in each.curve]) for each in (half, full)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.0)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_is_named_and_not_applied(
    corpus: PackedCorpus, run_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    watcher = Watcher()
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []

    def poisoned(model: LanguageModel, *arguments: Any) -> Any:
        gradient = accumulate_gradient(model, *arguments)
        if len(watcher.curve) == 6:
            if what == "loss":
                gradient.losses[0].fill_(torch.nan)
            assert model.embedding.weight.grad is not None
            model.embedding.weight.grad[0, 0] = torch.inf
            before.extend(parameter.detach().clone() for parameter in model.parameters())
            after.extend(model.parameters())
        return gradient

    monkeypatch.setattr(trainer_module, "accumulate_gradient", poisoned)
    with pytest.raises(TrainingDivergedError, match=rf"step 7: the {what}.*batch rows en:.*step-00000005"):
        Trainer(config(), corpus, run_dir, observer=watcher).run()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert before
    assert find_checkpoint(run_dir, "last").name == "step-00000005"
    assert not (run_dir / "result.json").exists()
    monkeypatch.undo()
    assert Trainer(config(), corpus, run_dir).run(resume=True)["stopped"] == "finished"


@pytest.mark.parametrize("when", ["evaluation", "checkpoint", "stop"])
def test_weights_that_are_not_finite_are_not_kept(corpus: PackedCorpus, run_dir: Path, when: str) -> None:
    """Their step had a finite loss and gradient: it is the step itself that went too far."""
    due = {"evaluation": {"evaluate_every": 3}, "checkpoint": {"checkpoint_every": 1}, "stop": {}}[when]
    quiet = config(**{"evaluate_every": 0, "checkpoint_every": 2, **due})
    rate = {"learning_rate": 1e-2}

    def poison() -> None:
        rate["learning_rate"] = 1e38
        if when == "stop":
            os.kill(os.getpid(), signal.SIGTERM)

    def learning_rate(*_: Any) -> float:
        if len(watcher.curve) == 2:
            poison()
        return rate["learning_rate"]

    watcher = Watcher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "learning_rate", learning_rate)
        with pytest.raises(TrainingDivergedError, match=r"step 3: weight '.*' is NaN or infinite after it.*step-00000002"):
            Trainer(quiet, corpus, run_dir, evaluate=evaluate, observer=watcher).run()
    kept = find_checkpoint(run_dir, "last")
    assert kept.name == "step-00000002"
    assert all(tensor.isfinite().all() for tensor in load_model(kept)[0].parameters())
    assert not any(line["kind"] == "evaluation" for line in lines(run_dir))


def test_a_folder_with_a_run_is_not_overwritten_and_one_without_not_resumed(corpus: PackedCorpus, run_dir: Path) -> None:
    with pytest.raises(RunFolderError, match="no run to resume"):
        Trainer(config(), corpus, run_dir).run(resume=True)
    assert not run_dir.exists()
    Trainer(config(), corpus, run_dir).run()
    before = lines(run_dir)
    with pytest.raises(RunFolderError, match="already contains a run; continue it with --resume, or choose another folder"):
        Trainer(config(), corpus, run_dir).run()
    assert lines(run_dir) == before


def test_a_finished_run_resumed_has_nothing_to_do(corpus: PackedCorpus, run_dir: Path) -> None:
    first = Trainer(config(), corpus, run_dir, evaluate=evaluate).run()
    before = lines(run_dir)
    watcher = Watcher()
    again = Trainer(config(), corpus, run_dir, evaluate=evaluate, observer=watcher).run(resume=True)
    assert watcher.curve == []
    assert lines(run_dir) == before
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_a_run_stopped_before_its_first_checkpoint_starts_over(corpus: PackedCorpus, run_dir: Path) -> None:
    def crash() -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        Trainer(config(), corpus, run_dir, observer=Watcher(3, crash)).run()
    watcher = Watcher()
    assert Trainer(config(), corpus, run_dir, observer=watcher).run(resume=True)["stopped"] == "finished"
    assert watcher.started == [(STEPS, 0)]
    assert [line["step"] for line in lines(run_dir) if line["kind"] == "train"] == [3, 6, 9, 12]


def test_resuming_with_another_configuration_names_the_field(corpus: PackedCorpus, run_dir: Path) -> None:
    Trainer(config(), corpus, run_dir, observer=Watcher(6, kill())).run()
    with pytest.raises(RunFolderError, match=r"training\.seed=0, not 1"):
        Trainer(config(seed=1), corpus, run_dir).run(resume=True)
    other = dataclasses.replace(corpus, fingerprint="another")
    with pytest.raises(RunFolderError, match=r"its corpus \(fingerprint another\) differs from the one"):
        Trainer(config(), other, run_dir).run(resume=True)
    result = Trainer(config(log_every=2, evaluate_every=0), corpus, run_dir).run(resume=True)
    assert result["stopped"] == "finished"
    assert json.loads((run_dir / "config.json").read_text())["training"]["log_every"] == 2


def test_two_runs_cannot_write_one_folder(corpus: PackedCorpus, run_dir: Path) -> None:
    refused = []

    def second() -> None:
        with pytest.raises(RunLockedError, match="is writing this run folder"):
            Trainer(config(), corpus, run_dir).run(resume=True)
        refused.append(True)

    assert Trainer(config(), corpus, run_dir, observer=Watcher(2, second)).run()["stopped"] == "finished"
    assert refused == [True]


def test_a_vocabulary_of_another_size_is_refused(corpus: PackedCorpus, run_dir: Path) -> None:
    other = dataclasses.replace(config(), model=ModelConfig(vocab_size=1000))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=1000: .* has 258 tokens"):
        Trainer(other, corpus, run_dir)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu", "cuda:", "cuda:x", "mps"])
def test_a_device_that_is_not_there_or_unknown_is_refused(
    corpus: PackedCorpus, run_dir: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"training\.device='{device}': .*use 'auto'"):
        Trainer(config(device=device), corpus, run_dir)
    assert not run_dir.exists()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("data", "named"),
    [
        (DataConfig(context_length=65536), r"data\.context_length=65536"),
        (DataConfig(context_length=16, weights={"fr": 1.0}), "fr"),
    ],
)
def test_what_does_not_fit_the_corpus_leaves_nothing_behind(
    corpus: PackedCorpus, run_dir: Path, data: DataConfig, named: str, there: bool
) -> None:
    if there:
        run_dir.mkdir()
    wrong = dataclasses.replace(config(tokens_per_step=data.context_length), data=data)
    with pytest.raises(ConfigError, match=named):
        Trainer(wrong, corpus, run_dir / "deeper").run()
    assert run_dir.exists() is there
    assert not there or list(run_dir.iterdir()) == []
    assert Trainer(config(), corpus, run_dir / "deeper").run()["stopped"] == "finished"


@pytest.mark.parametrize("broken", ["evaluate", "sample"])
def test_a_failing_evaluation_or_sample_loses_no_step(corpus: PackedCorpus, tmp_path: Path, broken: str) -> None:
    settings = config(sample_every=4, checkpoint_every=0)
    whole, parts = Watcher(), Watcher()
    Trainer(settings, corpus, tmp_path / "whole", evaluate=evaluate, sample=sample, observer=whole).run()

    def fail(*_: Any) -> Any:
        torch.rand(3)
        raise RuntimeError("out of memory")

    functions: dict[str, Any] = {"evaluate": evaluate, "sample": sample, broken: fail}
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        Trainer(settings, corpus, tmp_path / "parts", **functions, observer=parts).run()
    assert "step-00000004. Continue" in caught.value.__notes__[0]
    assert parts.messages == caught.value.__notes__
    with pytest.raises(RuntimeError, match="out of memory"):
        Trainer(settings, corpus, tmp_path / "parts", **functions, observer=parts).run(resume=True)
    Trainer(settings, corpus, tmp_path / "parts", evaluate=evaluate, sample=sample, observer=parts).run(resume=True)
    assert parts.started == [(STEPS, 0), (STEPS, 4), (STEPS, 4)]
    assert parts.curve == whole.curve
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")


def test_a_checkpoint_that_cannot_be_written_does_not_hide_the_failing_evaluation(
    corpus: PackedCorpus, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise CheckpointError("disk full")

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer_module, "save_checkpoint", full)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        Trainer(config(), corpus, run_dir, evaluate=fail).run()
    assert caught.value.__notes__ == ["disk full"]


@pytest.mark.parametrize("prompts", [(), ("It ", "")])
def test_samples_without_a_prompt_are_refused(corpus: PackedCorpus, run_dir: Path, prompts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"training\.sample_prompts=.*sample_every=0"):
        Trainer(config(sample_every=4, sample_prompts=prompts), corpus, run_dir)
    Trainer(config(sample_prompts=prompts), corpus, run_dir)


def test_a_damaged_last_checkpoint_is_got_past_as_the_message_says(corpus: PackedCorpus, run_dir: Path) -> None:
    whole = Trainer(config(), corpus, run_dir, evaluate=evaluate).run()
    last = find_checkpoint(run_dir, "last")
    (last / "state.json").write_text((last / "state.json").read_text()[:100])
    with pytest.raises(CheckpointError, match=rf"delete the folder {last} to make --resume continue from step-00000010"):
        Trainer(config(), corpus, run_dir, evaluate=evaluate).run(resume=True)
    shutil.rmtree(last)
    again = Trainer(config(), corpus, run_dir, evaluate=evaluate).run(resume=True)
    assert again["evaluation"] == whole["evaluation"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokens_per_step": 1 << 40, "micro_batch_size": 1}, "training.tokens_per_step=1099511627776: 3 batches"),
        ({"tokens_per_step": 1 << 31, "micro_batch_size": (1 << 27) - 0}, "training.micro_batch_size"),
    ],
)
def test_steps_beyond_this_machine_are_refused_before_anything_is_written(
    corpus: PackedCorpus, run_dir: Path, settings: dict[str, int], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        Trainer(config(**settings), corpus, run_dir)
    assert not run_dir.exists()


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", ".lock"])
def test_a_run_does_not_write_through_a_link(corpus: PackedCorpus, run_dir: Path, tmp_path: Path, name: str) -> None:
    """A folder that somebody else has made may point anywhere."""
    Trainer(config(), corpus, run_dir, observer=Watcher(6, kill())).run()
    elsewhere = tmp_path / "elsewhere"
    if (run_dir / name).exists():
        (run_dir / name).rename(elsewhere)
    (run_dir / name).symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} if elsewhere.is_dir() else None
    with pytest.raises(RunFolderError, match=rf"{name}: a symbolic link, but a run writes only to its own folder"):
        Trainer(config(), corpus, run_dir).run(resume=True)
    if before is not None:
        assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before
    else:
        assert name != ".lock" or not elsewhere.exists()


def test_other_links_are_replaced_and_what_they_point_to_stays(corpus: PackedCorpus, run_dir: Path, tmp_path: Path) -> None:
    Trainer(config(), corpus, run_dir, observer=Watcher(6, kill())).run()
    (tmp_path / "precious").write_text("precious")
    for name in ("config.json.partial", "result.json", "environment.json.partial"):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(tmp_path / "precious")
    step = find_checkpoint(run_dir, "last")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").touch()
    (run_dir / "checkpoints" / "step-00000001").symlink_to(tmp_path / "old")
    assert Trainer(config(keep_checkpoints=1), corpus, run_dir).run(resume=True)["stopped"] == "finished"
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "old" / "kept").exists()
    assert not step.exists()


def test_resuming_a_finished_run_prunes(corpus: PackedCorpus, run_dir: Path) -> None:
    Trainer(config(), corpus, run_dir).run()
    assert len(list_checkpoints(run_dir)) == 2
    (run_dir / "checkpoints" / "step-00000007.0123abcd.partial").mkdir()
    Trainer(config(keep_checkpoints=1), corpus, run_dir).run(resume=True)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000012"]
