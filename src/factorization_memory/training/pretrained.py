"""Trained models: loaded from a run or from Hugging Face's layout, given away in that layout, and taken back from it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from factorization_memory._files import JSONError, atomic_folder, read_json
from factorization_memory.config import ConfigError, RunConfig, from_dict, to_dict
from factorization_memory.models.pretrained import (
    CardFacts,
    builtin_model,
    is_pretrained,
    load_pretrained,
    model_card,
    save_pretrained,
)
from factorization_memory.models.pretrained.export import (
    TRAINING_NAME,
    digest,
    exported_weights,
    require_free,
)
from factorization_memory.models.pretrained.format import read_config, read_model_config, read_weights
from factorization_memory.training.checkpoint import load_tensors, save_checkpoint
from factorization_memory.training.checkpoint_folder import (
    FOLDER_NAME,
    STATE_NAME,
    CheckpointError,
    TrainingState,
    find_checkpoint,
    list_checkpoints,
    read_run_config,
    read_state,
    wrong_state_field,
)
from factorization_memory.training.device import resolve_device
from factorization_memory.training.record import CONFIG_NAME, ENVIRONMENT_NAME, TOKENIZER_NAME, strict_json, write_json

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel

FORMAT_VERSION = 1
EVALUATION_NAME, SOURCES_NAME = "evaluation.json", "sources.json"
BUILTIN = "builtin"
"""What `training.init_from` calls the model that comes with the package."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[LanguageModel, Tokenizer, RunConfig]:
    """A trained model in evaluation mode on `device`, in float32, with its tokenizer and the configuration of its run.

    `path` is a run folder (its best checkpoint, else its last), one checkpoint's folder inside it, or a folder of Hugging
    Face's layout, as `export_run` writes it, whose configuration has a run's defaults where it does not say how it was trained.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        FormatError: likewise, of Hugging Face's layout.
    """
    path = Path(path)
    device = resolve_device(device, "device") if isinstance(device, str) else device
    if not _is_own(path) and is_pretrained(path):
        model, tokenizer, config = _read_pretrained(path)
        return model.to(device), tokenizer, config
    path = _checkpoint(path)
    record = read_state(path)
    config = read_run_config(record, path)
    tokenizer = _tokenizer(path, record)
    return _model(path, config).to(device), tokenizer, config


def initial_config(source: str) -> RunConfig:
    """The configuration of the model that `training.init_from` names, as `load_model` gives it, its weights unread.

    Raises:
        CheckpointError, FormatError: there is no such model, or it is damaged.
    """
    path = initial_path(source)
    if not _is_own(path) and is_pretrained(path):
        return dataclasses.replace(_pretrained_config(path), model=read_model_config(path))
    path = _checkpoint(path)
    return read_run_config(read_state(path), path)


def initial_path(source: str) -> Path:
    """The folder that `training.init_from` names."""
    return builtin_model() if source == BUILTIN else Path(source)


def load_initial(model: LanguageModel, tokenizer: Tokenizer, source: str) -> None:
    """Copy the weights of the model that `training.init_from` names into `model`, to be trained on text of `tokenizer`.

    Raises:
        CheckpointError, FormatError: there is no such model, or it is damaged.
        ConfigError: it is of other sizes or choices, or reads the ids of another tokenizer.
    """
    weights, own, config = load_model(initial_path(source))
    if own.fingerprint != tokenizer.fingerprint:
        path = initial_path(source)
        file = path / TOKENIZER_NAME if is_pretrained(path) and not _is_own(path) else _tokenizer_file(_checkpoint(path))
        raise ConfigError(
            f"training.init_from={source!r}: its tokenizer (fingerprint {own.fingerprint}) is not that of the corpus "
            f"({tokenizer.fingerprint}); pack the texts with `fmem data pack ... --tokenizer {file}`"
        )
    ours, theirs = to_dict(model.config), to_dict(config.model)
    for name, value in theirs.items():
        if name != "backend" and ours[name] != value and not (name == "intermediate_size" and _same_width(model, config)):
            raise ConfigError(
                f"model.{name}={ours[name]!r}: the model of training.init_from={source!r} has {value!r}; leave it out, or "
                "train from random weights"
            )
    model.load_state_dict(weights.state_dict())


def _same_width(model: LanguageModel, config: RunConfig) -> bool:
    return model.config.feed_forward_size == config.model.feed_forward_size


def export_run(
    run: Path | str,
    folder: Path | str,
    *,
    name: str = "",
    license: str = "",
    data: str = "",
    dtype: str = "float32",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> str:
    """Write the model of a run in Hugging Face's layout (see `models.pretrained.export`), with its card.

    Args:
        run: run folder (its best checkpoint) or one checkpoint's folder inside it.
        folder: appears when it is whole.
        name: of the model, for the card; the folder's by default.
        license: identifier of the licence of the weights.
        data: a sentence on the training data, for the card.
        dtype: of the weights, one of `DTYPES`.
        max_shard_size: of one file of weights, in bytes or as "5GB".
        overwrite: replace a folder that is there.

    Returns:
        The name of the class that `transformers` loads it as.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        FileExistsError: the folder exists.
        ConfigError: no such `dtype`, `license` or `max_shard_size`.
        ValueError: a weight is not finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    if license and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise ConfigError(f"license={license!r}: use an identifier as the hub has it, for example apache-2.0")
    max_shard_size = _bytes(max_shard_size)
    run, folder = Path(run), Path(folder).absolute()
    if not _is_own(run) and is_pretrained(run):
        raise CheckpointError(f"{run}: it is an exported model already; copy it, or make a run of it with `fmem import`")
    require_free(folder, overwrite)
    path = _checkpoint(run)
    record = read_state(path)
    config = read_run_config(record, path)
    tokenizer_file = _tokenizer_file(path)
    _tokenizer(path, record)  # that it is this model's
    model = _model(path, config)
    run_dir = path.resolve().parent.parent
    environment = _published(_read_json(run_dir / ENVIRONMENT_NAME))
    sources, languages = _sources(config, record, _read_json(run_dir / SOURCES_NAME))
    # A path on this machine is nobody else's business, and of no use to them.
    published = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, corpus=""),
        training=dataclasses.replace(config.training, init_from=Path(config.training.init_from).name),
    )
    training = {
        "format_version": FORMAT_VERSION,
        "config": to_dict(published),
        "state": record["state"],
        "corpus_fingerprint": record["corpus_fingerprint"],
        "tokenizer_fingerprint": record["tokenizer_fingerprint"],
        "environment": environment,
        "sources": {"sizes": sources, "languages": list(languages)},
    }
    held_out, note = _evaluation(run_dir, path, record)
    context = config.data.context_length
    facts = CardFacts(
        name=" ".join((name or folder.name).split()),
        config=config.model,
        parameters=sum(tensor.numel() for tensor in exported_weights(model).values()),
        license=license,
        data=" ".join(data.split()).rstrip("."),
        languages=languages,
        sources=sources,
        context_length=context,
        tokens=record["state"]["tokens"],
        steps=record["state"]["step"],
        held_out=held_out,
        held_out_note=f"{note}, in windows of {context:,} tokens, the memory empty where each begins." if note else "",
        environment=environment,
        seconds=record["state"]["seconds"],
        precision=config.training.precision.replace("auto", ""),
    )
    return save_pretrained(
        model, folder, tokenizer_file,
        card=model_card(facts), dtype=DTYPES[dtype], context_length=config.data.context_length,
        training=json.loads(strict_json(training)), max_shard_size=max_shard_size, overwrite=overwrite,
    )  # fmt: skip


def import_model(folder: Path | str, run_dir: Path | str) -> Path:
    """Make a run folder of a model in Hugging Face's layout, to be used like any other; training cannot go on from it.

    Of models that `export_run` did not write, or that were trained further since, the run's configuration has the fields of the
    model as they are now, and of data and training what is known.

    Returns:
        The checkpoint's folder.

    Raises:
        FormatError: there is no such model, or it is damaged.
        FileExistsError: `run_dir` exists and is not empty.
    """
    folder, run_dir = Path(folder), Path(run_dir).absolute()
    if _is_own(folder):
        raise CheckpointError(f"{folder}: it is a run, or a part of one; use it as it is, or `fmem export` it")
    if run_dir.is_symlink() or (run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir()))):
        raise FileExistsError(f"{run_dir}: it exists and is not empty; choose another run folder")
    model, tokenizer, config = _read_pretrained(folder)
    record = _known_training(folder)
    with atomic_folder(run_dir) as aside:
        try:
            checkpoint = save_checkpoint(
                aside, model=model, optimizer=None, config=config, state=TrainingState(**record.get("state", {})),
                tokenizer_fingerprint=tokenizer.fingerprint, corpus_fingerprint=record.get("corpus_fingerprint", ""),
            )  # fmt: skip
        except CheckpointError as error:
            raise CheckpointError(
                f"{run_dir}: the model could not be written there ({error.__cause__}); nothing was kept: make room or give "
                "access, or write elsewhere"
            ) from error
        for name, key in ((ENVIRONMENT_NAME, "environment"), (SOURCES_NAME, "sources")):
            if record.get(key):
                write_json(aside / name, record[key])
        tokenizer.save(aside / TOKENIZER_NAME)
        write_json(aside / CONFIG_NAME, to_dict(config))
        place = checkpoint.relative_to(aside)
    return run_dir / place


def _checkpoint(path: Path) -> Path:
    """The checkpoint's folder that `path`, which may be that of a run, means."""
    if (path / STATE_NAME).exists() or FOLDER_NAME.fullmatch(path.name):
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run folder or a checkpoint's folder")
    return find_checkpoint(path, "best")


def _model(path: Path, config: RunConfig) -> LanguageModel:
    from factorization_memory.models import LanguageModel

    model = LanguageModel(config.model)
    load_tensors(model, path)
    return model.eval()


def _tokenizer_file(path: Path) -> Path:
    places = (path / TOKENIZER_NAME, path.resolve().parent.parent / TOKENIZER_NAME)
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise CheckpointError(f"{path}: no {TOKENIZER_NAME} beside it or in its run folder; copy the run's there")
    return found


def _tokenizer(path: Path, record: Mapping[str, Any]) -> Tokenizer:
    from factorization_memory.data.tokenizer import Tokenizer

    file = _tokenizer_file(path)
    tokenizer = Tokenizer.load(file)
    if tokenizer.fingerprint != record["tokenizer_fingerprint"]:
        raise CheckpointError(
            f"{file}: not the tokenizer this model was trained with (fingerprint {tokenizer.fingerprint}, "
            f"the checkpoint's is {record['tokenizer_fingerprint']}); put the run's own {TOKENIZER_NAME} there"
        )
    return tokenizer


def _is_own(path: Path) -> bool:
    """Whether a folder is one of ours: a run's, or a checkpoint's."""
    return (path / STATE_NAME).exists() or bool(FOLDER_NAME.fullmatch(path.name)) or bool(list_checkpoints(path))


def _read_pretrained(folder: Path) -> tuple[LanguageModel, Tokenizer, RunConfig]:
    from factorization_memory.data.tokenizer import Tokenizer

    model = load_pretrained(folder)
    file = folder / TOKENIZER_NAME
    if not file.exists():
        raise CheckpointError(f"{file}: missing; copy the model's tokenizer there")
    tokenizer = Tokenizer.load(file)
    record = _training(folder)
    config = _pretrained_config(folder)
    fields = read_config(folder)
    ends = {"eos_token_id": tokenizer.document_end, "pad_token_id": tokenizer.padding}
    wrong = [name for name, own in ends.items() if fields.get(name) not in (None, own, [own])]
    other = record.get("tokenizer_fingerprint") not in (None, tokenizer.fingerprint)
    if tokenizer.vocab_size > model.config.vocab_size or wrong or other:
        raise CheckpointError(
            f"{file}: not the tokenizer of this model, whose config.json has vocab_size={model.config.vocab_size} and "
            f"eos_token_id={fields.get('eos_token_id')}; put its own there"
        )
    return model, tokenizer, dataclasses.replace(config, model=model.config)


def _pretrained_config(folder: Path) -> RunConfig:
    """What training.json says of how a model was trained; its `model` may be another than the one that is there."""
    try:
        return from_dict(RunConfig, _training(folder).get("config", {"name": "imported"}))
    except ConfigError as error:
        raise _unreadable(folder / TRAINING_NAME, str(error)) from None


def _training(folder: Path) -> dict[str, Any]:
    """What training.json holds, {} if it is missing."""
    path = folder / TRAINING_NAME
    record = _read_json(path)
    if record and (not isinstance(record.get("format_version"), int) or record["format_version"] > FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: format version {record.get('format_version')!r} is not one that this package reads "
            f"({FORMAT_VERSION}); upgrade factorization-memory, or remove that file, which only says how the model was trained"
        )
    return record


def _known_training(folder: Path) -> dict[str, Any]:
    """What training.json says of these very weights: nothing where somebody has trained them further since."""
    record = _training(folder)
    if not record or record.get("weights") != digest(read_weights(folder)):
        return {}
    for name, kind in (("state", dict), ("corpus_fingerprint", str), ("environment", dict), ("sources", dict)):
        if not isinstance(record.get(name), kind):
            raise _unreadable(folder / TRAINING_NAME, f"the field {name!r} cannot be {record.get(name)!r}")
    wrong = wrong_state_field(record["state"])
    if wrong is not None:
        raise _unreadable(folder / TRAINING_NAME, wrong)
    return record


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: {reason}; restore it, or remove it: it only says how the model was trained")


def _read_json(path: Path) -> dict[str, Any]:
    """An object of a file that may be missing, {} then."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        return {}
    except JSONError as error:
        raise CheckpointError(f"{path}: not JSON, damaged or cut short ({error.reason}); restore it, or remove it") from None
    return values if isinstance(values, dict) else {}


def _evaluation(run_dir: Path, path: Path, record: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The held-out results of a checkpoint by source, and what they are of: those of `fmem evaluate` if they are of this
    checkpoint, else those of training, else nothing."""
    found = _read_json(run_dir / EVALUATION_NAME)
    by = found.get("evaluated", {})
    if by.get("checkpoint") == path.name and _are_scores(found.get("sources")) and _are_scores({"all": found.get("total")}):
        every = "all of it" if by.get("max_tokens") is None else "a part of it, spread evenly"
        return {**found["sources"], "all": found["total"]}, f"Text kept apart before training, {every}"
    state = record["state"]
    for evaluation in (state["best_evaluation"], state["last_evaluation"]):
        if evaluation and evaluation.get("step") == state["step"] and _are_scores(evaluation.get("sources")):
            return evaluation["sources"], "A part of the text that was kept apart before training, spread evenly"
    return {}, ""


def _are_scores(sources: Any) -> bool:
    """Whether these are scores by source, as the card shows them."""
    names = ("loss", "bits_per_byte", "tokens")
    return isinstance(sources, dict) and all(
        isinstance(row, dict) and all(isinstance(row.get(name), (int, float)) for name in names) for row in sources.values()
    )


def _sources(
    config: RunConfig, record: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[dict[str, dict[str, int]], tuple[str, ...]]:
    """Sizes of the training text's sources and its languages, from the corpus or else from what an import brought along."""
    from factorization_memory.data.corpora import CorpusError
    from factorization_memory.data.shards import PackedCorpus

    try:
        corpus = PackedCorpus.open(Path(config.data.corpus)) if config.data.corpus else None
    except (CorpusError, OSError):  # gone, or something else is there now
        corpus = None
    if corpus is None or corpus.fingerprint != record["corpus_fingerprint"]:
        return known.get("sizes", {}), tuple(known.get("languages", ()))
    sizes = {
        name: {"documents": split.num_documents, "tokens": len(split.tokens), "bytes": split.text_bytes}
        for name, source in corpus.sources.items()
        for split in (source.splits["train"],)
    }
    languages = {source.language for source in corpus.sources.values() if source.language}
    return sizes, tuple(sorted(languages))


def _published(environment: dict[str, Any]) -> dict[str, Any]:
    """What is said of the machine, without its paths."""
    command = environment.get("command")
    if not isinstance(command, list):
        return environment

    def bare(word: str) -> str:
        flag, equals, value = word.partition("=")
        return f"{flag}={bare(value)}" if equals else Path(word).name if Path(word).is_absolute() else word

    return environment | {"command": [" ".join(bare(str(word)).split()) for word in command]}


def _bytes(size: str | int) -> int:
    """A number of bytes, from one or from text such as "5GB"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", str(size).strip().upper())
    number = 0 if found is None else int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))
    if number < 1:
        raise ConfigError(f"max_shard_size={size!r}: use a number of bytes, or one with a unit such as 5GB")
    return number
