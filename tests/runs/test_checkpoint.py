from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from factorization_memory._files import errors
from factorization_memory.config import ModelConfig, OptimizerConfig, RunConfig, TrainingConfig, to_dict
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.models import LanguageModel, ModelState
from factorization_memory.runs import checkpoint as checkpoint_module
from factorization_memory.runs import checkpoint_folder
from factorization_memory.runs.checkpoint import first_difference, load_checkpoint, save_checkpoint
from factorization_memory.runs.checkpoint_folder import (
    CheckpointError,
    TrainingState,
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_state,
)
from factorization_memory.runs.loading import load_model
from factorization_memory.training.optimizer import make_optimizer

TOKENIZER = Tokenizer.bytes_level()
CONFIG = RunConfig(
    model=ModelConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_layers=2, num_states=4, conv_size=3),
    training=TrainingConfig(tokens_per_step=1024, micro_batch_size=1, carry_state=True),
)
Trained = tuple[LanguageModel, torch.optim.Optimizer]


def make(seed: int, config: RunConfig = CONFIG) -> Trained:
    torch.manual_seed(seed)
    model = LanguageModel(config.model)
    return model, make_optimizer(model, config.optimizer)


def train(model: LanguageModel, optimizer: torch.optim.Optimizer) -> ModelState:
    tokens = torch.randint(0, 256, (1, 8))
    loss, state = model(tokens, tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return state.detach()


def save(run_dir: Path, trained: Trained, step: int, **values: Any) -> Path:
    model, optimizer = trained
    carried = values.pop("carried", None)
    return save_checkpoint(
        run_dir,
        model=model,
        optimizer=optimizer,
        config=values.pop("config", CONFIG),
        state=TrainingState(step=step, **values),
        tokenizer_fingerprint=TOKENIZER.fingerprint,
        corpus_fingerprint="corpus",
        carried=carried,
    )


@pytest.fixture
def trained() -> Trained:
    model, optimizer = make(0)
    train(model, optimizer)
    return model, optimizer


def test_everything_comes_back_bit_for_bit(tmp_path: Path, trained: Trained) -> None:
    model, optimizer = trained
    carried = [train(model, optimizer), None]
    state = {"tokens": 100, "seconds": 0.1, "best_step": 3, "interval": {"nats": 0.1 + 0.2}, "last_train": {"loss": 1 / 3}}
    path = save(tmp_path, trained, 5, carried=carried, **state)
    expected_random = torch.rand(3)
    other_model, other_optimizer = make(1)
    loaded, memory = load_checkpoint(path, model=other_model, optimizer=other_optimizer, config=CONFIG)
    assert loaded == TrainingState(step=5, **state)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), expected_random)
    assert memory is not None
    assert memory[0] is not None
    assert memory[1] is None
    assert all(torch.equal(a, b) for a, b in zip(memory[0].tensors(), carried[0].tensors(), strict=True))  # type: ignore[union-attr]
    for name, parameter in other_model.named_parameters():
        original = model.get_parameter(name)
        assert torch.equal(parameter, original)
        assert optimizer.state[original].keys() == other_optimizer.state[parameter].keys()
        for key, value in optimizer.state[original].items():
            assert torch.equal(value, other_optimizer.state[parameter][key])
    # The same next step, too.
    torch.manual_seed(3)
    train(model, optimizer)
    torch.manual_seed(3)
    train(other_model, other_optimizer)
    assert torch.equal(model.embedding.weight, other_model.embedding.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_written_once(tmp_path: Path, tied: bool) -> None:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, tie_word_embeddings=tied))
    trained = make(0, config)
    train(*trained)
    names = load_file(save(tmp_path, trained, 1, config=config) / "model.safetensors").keys()
    assert "embedding.weight" in names
    assert ("head.weight" in names) is not tied


def test_a_full_disk_loses_nothing(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path, trained, 1)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", full)
        for step in (1, 2):
            with pytest.raises(CheckpointError, match=rf"step-0000000{step}: .*No space left.*Free space"):
                save(tmp_path, trained, step)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [old.name]
    model, optimizer = make(1)
    load_checkpoint(old, model=model, optimizer=optimizer, config=CONFIG)


def test_writing_a_step_again_replaces_it(tmp_path: Path, trained: Trained) -> None:
    save(tmp_path, trained, 1, tokens=1)
    path = save(tmp_path, trained, 1, tokens=2)
    assert read_state(path)["state"]["tokens"] == 2
    assert list((tmp_path / "checkpoints").iterdir()) == [path]


def test_newest_and_best_are_kept_and_found(tmp_path: Path, trained: Trained) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, trained, step, best_step=2)
    (tmp_path / "checkpoints" / "step-00000009.partial").mkdir()
    assert find_checkpoint(tmp_path, "last").name == "step-00000004"
    prune_checkpoints(tmp_path, 1, best_step=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert find_checkpoint(tmp_path).name == find_checkpoint(tmp_path, "step-2").name == "step-00000002"
    with pytest.raises(CheckpointError, match=r"'step-3'; use 'best', 'last' or one of step-00000002, step-00000004"):
        find_checkpoint(tmp_path, "step-3")
    prune_checkpoints(tmp_path, 1, best_step=None)
    assert find_checkpoint(tmp_path, "best").name == "step-00000004"
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find_checkpoint(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "carried.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "deep"])
def test_a_damaged_file_is_named_and_others_are_listed(tmp_path: Path, trained: Trained, name: str, damage: str) -> None:
    model, optimizer = trained
    memory = train(model, optimizer)
    save(tmp_path, trained, 1)
    path = save(tmp_path, trained, 2, carried=[memory])
    whole = (path / name).read_bytes()
    if damage == "gone":
        (path / name).unlink()
    else:
        (path / name).write_bytes(b"[" * 100_000 if damage == "deep" else whole[: len(whole) - 5 if damage == "cut" else 0])
    model, optimizer = make(1)
    with pytest.raises(CheckpointError, match=rf"{name}.*step-00000001"):
        load_checkpoint(path, model=model, optimizer=optimizer, config=CONFIG)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_file_that_may_not_be_read_is_not_called_missing(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = save(tmp_path, trained, 1)

    def refused(file: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    if name == "state.json":
        monkeypatch.setattr(Path, "read_bytes", refused)
    else:
        # The library says "no such file" of one that it may not open.
        monkeypatch.setattr(errors, "open", refused, raising=False)
    model, optimizer = make(1)
    with pytest.raises(OSError, match=rf"{path / name}: cannot be read \(Permission denied\); grant read access") as caught:
        load_checkpoint(path, model=model, optimizer=optimizer, config=CONFIG)
    assert "delete" not in str(caught.value)


def test_a_carried_memory_that_is_not_whole(tmp_path: Path, trained: Trained) -> None:
    model, optimizer = trained
    memory = train(model, optimizer)
    save(tmp_path, trained, 1)
    path = save(tmp_path, trained, 2, carried=[memory])
    tensors = load_file(path / "carried.safetensors")
    tensors.pop("0/0")
    save_file(tensors, path / "carried.safetensors")
    model, optimizer = make(1)
    with pytest.raises(CheckpointError, match=r"carried.safetensors: expected 0/0 of shape .*found nothing; .*step-00000001"):
        load_checkpoint(path, model=model, optimizer=optimizer, config=CONFIG)


def test_a_newer_format_is_refused(tmp_path: Path, trained: Trained) -> None:
    path = save(tmp_path, trained, 1)
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**record, "format_version": 99}))
    with pytest.raises(CheckpointError, match=r"format version 99 is newer.*upgrade"):
        read_state(path)


def test_another_configuration_is_refused_by_its_first_field(tmp_path: Path, trained: Trained) -> None:
    path = save(tmp_path, trained, 1)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_states=8))
    model, optimizer = make(0, other)
    with pytest.raises(CheckpointError, match=r"model\.num_states=4, but this run has model\.num_states=8"):
        load_checkpoint(path, model=model, optimizer=optimizer, config=other)


def test_weights_that_do_not_fit_are_named_with_both_shapes(tmp_path: Path, trained: Trained) -> None:
    path = save(tmp_path, trained, 1)
    other = make(0, dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_states=8)))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mixer\.affinity\.weight.*\(4, 16\).*\(8, 16\)"):
        load_checkpoint(path, model=other[0], optimizer=other[1], config=CONFIG)
    deeper = make(0, dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=3)))
    with pytest.raises(CheckpointError, match=r"blocks\.2\..* is only in the model"):
        load_checkpoint(path, model=deeper[0], optimizer=deeper[1], config=CONFIG)


def test_a_model_loads_from_its_run_its_checkpoint_and_not_from_elsewhere(tmp_path: Path, trained: Trained) -> None:
    path = save(tmp_path, trained, 1)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json beside it"):
        load_model(tmp_path)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    tokens = torch.randint(0, 256, (1, 5))
    for place in (tmp_path, path, str(path)):
        model, tokenizer, config = load_model(place, "cpu")
        assert not model.training
        assert tokenizer.fingerprint == TOKENIZER.fingerprint
        assert config == CONFIG
        assert torch.equal(model(tokens)[0], trained[0](tokens)[0])
    Tokenizer.train(["a b c " * 100], 260).save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not the tokenizer this model was trained with"):
        load_model(path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"no checkpoint here.*step-00000001"):
        load_model(tmp_path / "checkpoints" / "step-00000007")


def replace(part: str, **values: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda config: dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (replace("model", top_k=2), "model.top_k"),
        (replace("optimizer", beta1=0.5), "optimizer.beta1"),
        (replace("training", steps=2000, seed=1), "training.steps"),
        (replace("data", weights={"en": 1.0}), "data.weights"),
        (replace("training", log_every=1, evaluate_every=7, keep_checkpoints=9, device="cpu"), None),
        (replace("data", read_ahead=0, corpus="moved"), None),
    ],
)
def test_what_a_resumed_run_may_change(change: Callable[[RunConfig], RunConfig], name: str | None) -> None:
    difference = first_difference(CONFIG, change(CONFIG))
    assert (difference and difference[0]) == name


def test_no_tensor_depends_on_the_configuration_alone() -> None:
    model, _ = make(0)
    assert checkpoint_module.model_tensors(model).keys() == dict(model.named_parameters()).keys()
    assert to_dict(CONFIG)["optimizer"] == dataclasses.asdict(OptimizerConfig())


def test_list_ignores_what_is_not_whole(tmp_path: Path) -> None:
    for name in ("step-00000010", "step-00000009", "step-00000011.partial", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ((), "random", ..., "'random' is missing"),
        ((), "state", ..., "'state' is missing"),
        ((), "state", [], "'state' cannot be"),
        ((), "carried", 3, "'carried' cannot be 3"),
        ((), "extra", 1, "'extra' is unknown"),
        (("state",), "best_step", ..., r"'state\.best_step' is missing"),
        (("state",), "step", "five", r"'state\.step' cannot be 'five'"),
        (("state",), "extra", 1, r"'state\.extra' is unknown"),
        (("random",), "cpu", ..., r"'random\.cpu' is missing"),
    ],
)
def test_a_state_file_with_another_set_of_fields_is_refused_by_the_first(
    tmp_path: Path, trained: Trained, where: tuple[str, ...], name: str, value: Any, message: str
) -> None:
    save(tmp_path, trained, 1)
    path = save(tmp_path, trained, 2)
    record = json.loads((path / "state.json").read_text())
    part = record[where[0]] if where else record
    part[name] = value
    if value is ...:
        del part[name]
    (path / "state.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=rf"step-00000002/state\.json: the field {message}.*delete the folder"):
        read_state(path)
    model, optimizer = make(1)
    with pytest.raises(CheckpointError, match="state\\.json: the field"):
        load_checkpoint(path, model=model, optimizer=optimizer, config=CONFIG)


def test_a_configuration_that_cannot_be_read_names_its_file(tmp_path: Path, trained: Trained) -> None:
    path = save(tmp_path, trained, 1)
    record = json.loads((path / "state.json").read_text())
    record["config"]["model"]["colour"] = "red"
    (path / "state.json").write_text(json.dumps(record))
    model, optimizer = make(1)
    with pytest.raises(CheckpointError, match=r"state\.json: unreadable configuration .*colour"):
        load_checkpoint(path, model=model, optimizer=optimizer, config=CONFIG)


def test_every_field_of_the_state_is_checked() -> None:
    fields = [each.name for each in dataclasses.fields(TrainingState)]
    assert list(checkpoint_folder._STATE_FIELDS) == fields


def test_an_intact_best_is_loaded_although_another_checkpoint_is_damaged(tmp_path: Path, trained: Trained) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for step in (1, 2, 3):
        save(tmp_path, trained, step, best_step=1)
    (tmp_path / "checkpoints" / "step-00000003" / "state.json").write_text('{"format_ver')
    with pytest.warns(UserWarning, match=r"step-00000003.*damaged.*Using step-00000001"):
        model, _, _ = load_model(tmp_path)
    assert torch.equal(model.embedding.weight, trained[0].embedding.weight)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-0000000{step}" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-00000003/state\.json: damaged"):
        load_model(tmp_path)
