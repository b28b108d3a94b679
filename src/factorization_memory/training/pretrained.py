"""Trained models: loaded from a run or from Hugging Face's layout, given away in that layout, and taken back from it."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from factorization_memory.config import ConfigError, RunConfig, from_dict, to_dict
from factorization_memory.models.counting import count
from factorization_memory.models.pretrained import CardFacts, is_pretrained, load_pretrained, model_card, save_pretrained
from factorization_memory.models.pretrained.export import TRAINING_NAME
from factorization_memory.training.checkpoint import (
    FOLDER_NAME,
    STATE_NAME,
    CheckpointError,
    TrainingState,
    find_checkpoint,
    load_tensors,
    read_run_config,
    read_state,
    save_checkpoint,
)
from factorization_memory.training.device import resolve_device
from factorization_memory.training.record import CONFIG_NAME, ENVIRONMENT_NAME, TOKENIZER_NAME, strict_json, write_json

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel

FORMAT_VERSION = 1
EVALUATION_NAME = "evaluation.json"
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
    if is_pretrained(path):
        model, tokenizer, config, _ = _read_pretrained(path)
        return model.to(device), tokenizer, config
    path = _checkpoint(path)
    record = read_state(path)
    config = read_run_config(record, path)
    tokenizer = _tokenizer(path, record)
    return _model(path, config).to(device), tokenizer, config


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
        ConfigError: no such `dtype`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    path, folder = _checkpoint(Path(run)), Path(folder)
    record = read_state(path)
    config = read_run_config(record, path)
    tokenizer_file = _tokenizer_file(path)
    _tokenizer(path, record)  # that it is this model's
    model = _model(path, config)
    run_dir = path.resolve().parent.parent
    environment = _read_json(run_dir / ENVIRONMENT_NAME)
    # A path on this machine is nobody else's business, and of no use to them.
    published = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=""))
    training = {
        "format_version": FORMAT_VERSION,
        "config": to_dict(published),
        "state": record["state"],
        "corpus_fingerprint": record["corpus_fingerprint"],
        "environment": environment,
    }
    facts = _facts(
        name or folder.name, config, record, environment, _evaluation(run_dir, path, record), license=license, data=data
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
    folder, run_dir = Path(folder), Path(run_dir)
    model, tokenizer, config, record = _read_pretrained(folder)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise FileExistsError(f"{run_dir}: it exists and is not empty; choose another run folder")
    aside = run_dir.with_name(run_dir.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        checkpoint = save_checkpoint(
            aside, model=model, optimizer=None, config=config, state=_state(record),
            tokenizer_fingerprint=tokenizer.fingerprint, corpus_fingerprint=record.get("corpus_fingerprint", ""),
        )  # fmt: skip
        if record.get("environment"):
            write_json(aside / ENVIRONMENT_NAME, record["environment"])
        tokenizer.save(aside / TOKENIZER_NAME)
        write_json(aside / CONFIG_NAME, to_dict(config))
        if run_dir.exists():
            run_dir.rmdir()
        aside.rename(run_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return run_dir / checkpoint.relative_to(aside)


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


def _read_pretrained(folder: Path) -> tuple[LanguageModel, Tokenizer, RunConfig, dict[str, Any]]:
    """Model, tokenizer, configuration, and what training.json holds, {} where it is missing."""
    from factorization_memory.data.tokenizer import Tokenizer

    model = load_pretrained(folder)
    file = folder / TOKENIZER_NAME
    if not file.exists():
        raise CheckpointError(f"{file}: missing; copy the model's tokenizer there")
    tokenizer = Tokenizer.load(file)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{file}: it has {tokenizer.vocab_size:,} ids, the model {model.config.vocab_size:,}; use the model's own"
        )
    record = _read_json(folder / TRAINING_NAME)
    if record and (not isinstance(record.get("format_version"), int) or record["format_version"] > FORMAT_VERSION):
        raise CheckpointError(
            f"{folder / TRAINING_NAME}: format version {record.get('format_version')!r} is not one that this package reads "
            f"({FORMAT_VERSION}); upgrade factorization-memory, or remove that file, which only says how the model was trained"
        )
    try:
        config = from_dict(RunConfig, record.get("config", {"name": "imported"}))
        config = dataclasses.replace(config, model=model.config)
        _state(record)
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / TRAINING_NAME}: it cannot be read ({error}); restore it, or remove it: it only says how the model was "
            "trained"
        ) from None
    return model, tokenizer, config, record


def _state(record: Mapping[str, Any]) -> TrainingState:
    return TrainingState(**record.get("state", {}))


def _read_json(path: Path) -> dict[str, Any]:
    """An object of a file that may be missing, {} then."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not JSON, damaged or cut short ({error}); restore it, or remove it") from None
    return values if isinstance(values, dict) else {}


def _evaluation(run_dir: Path, path: Path, record: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The held-out results of a checkpoint by source, and a sentence on them: those of `fmem evaluate` if they are of this
    checkpoint, else those of training, else nothing."""
    found = _read_json(run_dir / EVALUATION_NAME)
    if found.get("evaluated", {}).get("checkpoint") == path.name and "sources" in found:
        every = "all of it" if found["evaluated"].get("max_tokens") is None else "a part of it, spread evenly"
        return {**found["sources"], "all": found["total"]}, f"Text kept apart before training, {every}"
    state = record["state"]
    for evaluation in (state["best_evaluation"], state["last_evaluation"]):
        if evaluation is not None and evaluation["step"] == state["step"]:
            return evaluation["sources"], "A part of the text that was kept apart before training, spread evenly"
    return {}, ""


def _facts(
    name: str,
    config: RunConfig,
    record: Mapping[str, Any],
    environment: dict[str, Any],
    evaluation: tuple[dict[str, Any], str],
    license: str,
    data: str,
) -> CardFacts:
    held_out, note = evaluation
    sources, languages = _sources(config, record)
    context = config.data.context_length
    if environment.get("command"):
        environment = environment | {"command": [shlex.quote(word) for word in environment["command"]]}
    return CardFacts(
        name=name,
        config=config.model,
        parameters=count(config.model).parameters,
        license=license,
        data=data,
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


def _sources(config: RunConfig, record: Mapping[str, Any]) -> tuple[dict[str, dict[str, int]], tuple[str, ...]]:
    """Sizes of the training text's sources and its languages; nothing where the corpus is not there any more."""
    from factorization_memory.data.shards import PackedCorpus

    folder = Path(config.data.corpus)
    if not config.data.corpus or not folder.exists():
        return {}, ()
    corpus = PackedCorpus.open(folder)
    if corpus.fingerprint != record["corpus_fingerprint"]:
        return {}, ()
    sizes = {
        name: {"documents": split.num_documents, "tokens": len(split.tokens), "bytes": split.text_bytes}
        for name, source in corpus.sources.items()
        for split in (source.splits["train"],)
    }
    languages = {source.language for source in corpus.sources.values() if source.language}
    return sizes, tuple(sorted(languages))
