"""Checkpoints: folders `checkpoints/step-00000100/` of a run folder, each sufficient to resume the run or use the model.

    model.safetensors       weights by parameter name; tied weights once
    optimizer.safetensors   AdamW's moments, as `<parameter>/<moment>`
    carried.safetensors     the memory that training continues from (only with training.carry_state)
    state.json              format version, configuration, fingerprints, random generators, progress of the run

A checkpoint is written to a folder ending in `.partial` and renamed when complete.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from factorization_memory._files import UnreadableError, atomic_folder, require_readable
from factorization_memory.config import RunConfig, to_dict
from factorization_memory.models.finite import not_finite
from factorization_memory.runs.checkpoint_folder import (
    FORMAT_VERSION,
    CheckpointError,
    DamagedError,
    NotFiniteError,
    TrainingState,
    checkpoint_path,
    present,
    read_run_config,
    read_state,
)
from factorization_memory.runs.names import CARRIED_NAME, OPTIMIZER_NAME, STATE_NAME, WEIGHTS_NAME
from factorization_memory.runs.record import strict_json

if TYPE_CHECKING:
    from factorization_memory.models import LanguageModel, ModelState

MAY_CHANGE = frozenset(
    {
        "data.corpus",
        "data.read_ahead",
        "training.device",
        "training.log_every",
        "training.evaluate_every",
        "training.sample_every",
        "training.sample_prompts",
        "training.checkpoint_every",
        "training.keep_checkpoints",
    }
)
"""Fields that a resumed run may change: none affects the loss curve (a different corpus is detected by its fingerprint).
training.steps may be raised too."""


def save_checkpoint(
    run_dir: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: RunConfig,
    state: TrainingState,
    tokenizer_fingerprint: str,
    corpus_fingerprint: str,
    carried: Sequence[ModelState | None] | None = None,
) -> Path:
    """Writes a checkpoint of `state.step` and returns its folder. Without `optimizer` it can be used, but not resumed.

    `carried` is the memory of each micro-batch (None for the initial state), or None if nothing is carried. Raises
    `CheckpointError` if it cannot be written completely (a full disk), `NotFiniteError` if a weight, a moment or carried memory
    is NaN or infinite; earlier checkpoints are left intact.
    """
    path = checkpoint_path(run_dir, state.step)
    weights = model_tensors(model)
    moments = {} if optimizer is None else _optimizer_tensors(model, optimizer)
    # Cloned: tensors of a state may share storage, which safetensors refuses.
    memories = {
        f"{index}/{number}": tensor.contiguous().clone()
        for index, memory in enumerate(carried or ())
        if memory is not None
        for number, tensor in enumerate(memory.tensors())
    }
    for what, tensors in (("weight", weights), ("optimizer's", moments), ("carried memory", memories)):
        wrong = not_finite(tensors)
        if wrong is not None:
            raise NotFiniteError(path, f"{what} {wrong!r} is NaN or infinite")
    record = {
        "format_version": FORMAT_VERSION,
        "state": dataclasses.asdict(state),
        "config": to_dict(config),
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "corpus_fingerprint": corpus_fingerprint,
        "random": _random_states(model),
        "carried": None if carried is None else [memory is not None for memory in carried],
    }
    try:
        with atomic_folder(path, overwrite=True) as partial:
            save_file(_contiguous(weights), partial / WEIGHTS_NAME)
            if optimizer is not None:
                save_file(_contiguous(moments), partial / OPTIMIZER_NAME)
            if carried is not None:
                save_file(memories, partial / CARRIED_NAME)
            (partial / STATE_NAME).write_text(strict_json(record, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: the checkpoint could not be saved ({error}); earlier checkpoints are intact. "
            "Free space on that disk, then resume the run"
        ) from error
    return path


def load_checkpoint(
    path: Path, *, model: LanguageModel, optimizer: torch.optim.Optimizer, config: RunConfig
) -> tuple[TrainingState, list[ModelState | None] | None]:
    """Loads a checkpoint into `model`, `optimizer` and the random generators, to resume training.

    Returns the progress of the run and the carried memory of each micro-batch (None if nothing is carried). Raises
    `CheckpointError` if the checkpoint is damaged, or of a configuration other than `config`.
    """
    record = read_state(path)
    saved = read_run_config(record, path)
    difference = difference_from(saved, config)
    if difference is not None:
        name, old, new = difference
        raise CheckpointError(
            f"{path}: trained with {name}={old!r}, but this run has {name}={new!r}; use the same value, or a new run folder"
        )
    load_tensors(model, path)
    _load_optimizer(model, optimizer, path)
    state = TrainingState(**record["state"])
    carried = None if record["carried"] is None else _load_carried(model, config.micro_batch_size, record["carried"], path)
    _set_random_states(model, record["random"])
    return state, carried


def difference_from(saved: RunConfig, current: RunConfig) -> tuple[str, object, object] | None:
    """The first difference that prevents resuming a run of configuration `saved` with `current`, as in `first_difference`: any
    field outside `MAY_CHANGE`, or fewer total steps."""
    longer = current.training.steps > saved.training.steps
    return first_difference(saved, current, MAY_CHANGE | {"training.steps"} if longer else MAY_CHANGE)


def first_difference(
    saved: RunConfig, current: RunConfig, except_fields: Iterable[str] = MAY_CHANGE
) -> tuple[str, object, object] | None:
    """Name, saved value and current value of the first field outside `except_fields` in which two configurations differ."""
    allowed = {"name", *except_fields}

    def walk(old: Any, new: Any, prefix: str) -> tuple[str, object, object] | None:
        for item in dataclasses.fields(old):
            name, a, b = prefix + item.name, getattr(old, item.name), getattr(new, item.name)
            if dataclasses.is_dataclass(a):
                found = walk(a, b, f"{name}.")
                if found is not None:
                    return found
            elif name not in allowed and a != b:
                return name, a, b
        return None

    return walk(saved, current, "")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by name: its parameters, shared ones once, and its persistent buffers."""
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors.update((name, value) for name, value in model.state_dict().items() if name not in parameters)
    return tensors


def load_tensors(model: nn.Module, path: Path) -> None:
    """Copies the weights of the checkpoint at `path` into `model`. Raises `CheckpointError` if a name or shape differs, or a
    weight is NaN or infinite."""
    saved, own = _read_tensors(path / WEIGHTS_NAME), model_tensors(model)
    for name in sorted(own.keys() | saved.keys()):
        if name not in saved or name not in own:
            where = "the checkpoint" if name in saved else "the model"
            raise CheckpointError(
                f"{path / WEIGHTS_NAME}: tensor {name!r} is only in {where}: their configurations differ; "
                "use the checkpoint's own"
            )
        if saved[name].shape != own[name].shape:
            raise CheckpointError(
                f"{path / WEIGHTS_NAME}: tensor {name!r} has shape {tuple(saved[name].shape)}, but the model's has "
                f"{tuple(own[name].shape)}: their configurations differ; use the checkpoint's own"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        require_readable(path)
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; {present(path.parent)}") from None
    except UnreadableError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); {present(path.parent)}") from None
    wrong = not_finite(tensors)
    if wrong is not None:
        raise CheckpointError(f"{path}: tensor {wrong!r} is NaN or infinite; {present(path.parent)}")
    return tensors


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    if not (path / OPTIMIZER_NAME).exists():
        raise CheckpointError(
            f"{path / OPTIMIZER_NAME}: missing; an imported model cannot be resumed (train a new run from its "
            f"weights with --init-from); {present(path)}"
        )
    tensors = _read_tensors(path / OPTIMIZER_NAME)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # The optimizer numbers its parameters in the order of its groups; loading through it moves each tensor to the right
    # device.
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("/")
        moments.setdefault(name, {})[moment] = tensor
    for name in order:
        if name not in moments:
            raise CheckpointError(f"{path / OPTIMIZER_NAME}: parameter {name!r} is missing; {present(path)}")
    optimizer.load_state_dict(
        {
            "state": {index: moments[name] for index, name in enumerate(order)},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _load_carried(model: LanguageModel, rows: int, begun: list[bool], path: Path) -> list[ModelState | None]:
    tensors = _read_tensors(path / CARRIED_NAME)

    def load(index: int) -> ModelState:
        numbers = itertools.count()

        def fill(empty: Tensor) -> Tensor:
            name = f"{index}/{next(numbers)}"
            if name not in tensors or not _fits(tensors[name], empty):
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise DamagedError(
                    f"{path / CARRIED_NAME}: expected {name} of shape {tuple(empty.shape)}, found {found}; {present(path)}"
                )
            return tensors[name].to(empty)

        return model.initial_state(rows).apply(fill)

    return [load(index) if each else None for index, each in enumerate(begun)]


def _fits(tensor: Tensor, empty: Tensor) -> bool:
    """Whether a carried tensor matches the shape of the initial state, whose dimensions of size 0 may grow."""
    sizes = zip(tensor.shape, empty.shape, strict=False)
    return tensor.dim() == empty.dim() and all(size == expected or expected == 0 for size, expected in sizes)


def _random_states(model: nn.Module) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(value.numpy().tobytes()).decode("ascii") for name, value in states.items()}


def _set_random_states(model: nn.Module, states: dict[str, str]) -> None:
    decoded = {name: torch.frombuffer(bytearray(base64.b64decode(value)), dtype=torch.uint8) for name, value in states.items()}
    torch.set_rng_state(decoded["cpu"])
    device = next(model.parameters()).device
    # A run that moves from a CPU to a GPU has no saved state of the GPU's generator and keeps the seeded one.
    if device.type == "cuda" and "cuda" in decoded:
        torch.cuda.set_rng_state(decoded["cuda"], device)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
