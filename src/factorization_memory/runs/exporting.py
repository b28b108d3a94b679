"""Exports a run's model in Hugging Face's layout, with its card and training record."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from factorization_memory.config import ConfigError, RunConfig, to_dict
from factorization_memory.data.corpora import CorpusError
from factorization_memory.data.shards import PackedCorpus
from factorization_memory.models.pretrained import CardFacts, is_pretrained, model_card, save_pretrained
from factorization_memory.models.pretrained.export import exported_weights, require_free
from factorization_memory.runs.checkpoint_folder import CheckpointError, read_run_config, read_state
from factorization_memory.runs.exported import FORMAT_VERSION, read_object
from factorization_memory.runs.loading import checkpoint_of, is_own, model_of, tokenizer_file, tokenizer_of
from factorization_memory.runs.names import ENVIRONMENT_NAME, EVALUATION_NAME, SOURCES_NAME
from factorization_memory.runs.record import strict_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    """Writes the model of a run in Hugging Face's layout (see `models.pretrained.export`), with its card.

    Args:
        run: run folder (its best checkpoint) or one checkpoint's folder inside it.
        folder: written atomically.
        name: name of the model, for the card; the folder's by default.
        license: identifier of the licence of the weights.
        data: a sentence on the training data, for the card.
        dtype: dtype of the weights, one of `DTYPES`.
        max_shard_size: maximum size of one file of weights, in bytes or as "5GB".
        overwrite: replace an existing folder.

    Returns:
        The name of the class that `transformers` loads it as.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        FileExistsError: the folder exists.
        ConfigError: an invalid `dtype`, `license` or `max_shard_size`.
        ValueError: a weight is not finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    if license and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise ConfigError(f"license={license!r}: use the hub's identifier, for example apache-2.0")
    max_shard_size = _bytes(max_shard_size)
    run, folder = Path(run), Path(folder).absolute()
    if not is_own(run) and is_pretrained(run):
        raise CheckpointError(f"{run}: already an exported model; copy it, or make it a run with `fmem import`")
    require_free(folder, overwrite)
    path = checkpoint_of(run)
    record = read_state(path)
    config = read_run_config(record, path)
    definition = tokenizer_file(path)
    tokenizer_of(path, record)  # raises if it is not this model's
    model = model_of(path, config)
    run_dir = path.resolve().parent.parent
    environment = _published(read_object(run_dir / ENVIRONMENT_NAME))
    sources, languages = _sources(config, record, read_object(run_dir / SOURCES_NAME))
    # Paths on this machine are private, and useless to others.
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
        held_out_note=f"{note}, in windows of {context:,} tokens, each starting from empty memory." if note else "",
        environment=environment,
        seconds=record["state"]["seconds"],
        precision=config.training.precision.replace("auto", ""),
    )
    return save_pretrained(
        model,
        folder,
        definition,
        card=model_card(facts),
        dtype=DTYPES[dtype],
        context_length=config.data.context_length,
        training=json.loads(strict_json(training)),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )


def _evaluation(run_dir: Path, path: Path, record: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The held-out results of a checkpoint by source, and their description: from `fmem evaluate` if of this checkpoint, else
    from training, else empty."""
    found = read_object(run_dir / EVALUATION_NAME)
    by = found.get("evaluated", {})
    if by.get("checkpoint") == path.name and _are_scores(found.get("sources")) and _are_scores({"all": found.get("total")}):
        every = "all of it" if by.get("max_tokens") is None else "an evenly spread sample"
        return {**found["sources"], "all": found["total"]}, f"Text held out before training, {every}"
    state = record["state"]
    for evaluation in (state["best_evaluation"], state["last_evaluation"]):
        if evaluation and evaluation.get("step") == state["step"] and _are_scores(evaluation.get("sources")):
            return evaluation["sources"], "An evenly spread sample of the text held out before training"
    return {}, ""


def _are_scores(sources: Any) -> bool:
    """Whether `sources` has scores by source in the form that the card shows."""
    names = ("loss", "bits_per_byte", "tokens")
    return isinstance(sources, dict) and all(
        isinstance(row, dict) and all(isinstance(row.get(name), (int, float)) for name in names) for row in sources.values()
    )


def _sources(
    config: RunConfig, record: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[dict[str, dict[str, int]], tuple[str, ...]]:
    """Sizes and languages of the training text's sources, from the corpus or else from the records of an import."""
    try:
        corpus = PackedCorpus.open(Path(config.data.corpus)) if config.data.corpus else None
    except (CorpusError, OSError):  # removed or replaced
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
    """The environment without paths of this machine."""
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
        raise ConfigError(f"max_shard_size={size!r}: use a number of bytes, optionally with a unit, such as 5GB")
    return number
