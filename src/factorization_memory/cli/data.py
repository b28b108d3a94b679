"""`fmem data`: fetch a data set, train a tokenizer, pack a corpus."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from factorization_memory._text import visible
from factorization_memory.cli.common import choose, console, emit, parse, say
from factorization_memory.config import ConfigError
from factorization_memory.runs.names import TOKENIZER_NAME


@dataclass(frozen=True)
class FetchOptions:
    """Stream a data set once, to disk, as .jsonl.zst, with a record of where it comes from (needs the `datasets` package)."""

    name: tyro.conf.Positional[str | None] = None
    """A short name from the list, OWNER/NAME on the Hugging Face hub, or a folder; if omitted, the list is shown."""
    output: Path | None = None
    """File to write; its name must end in .jsonl.zst."""
    show_list: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List the corpora that have a short name, and exit."""
    data_dir: Path | None = None
    """Folder with the data set's files, laid out as on the hub, to read instead of the hub."""
    config: str | None = None
    """Configuration of the data set, if it has several; overrides the list's for a short name."""
    split: str | None = None
    """Split to read; by default "train"."""
    text_column: str | None = None
    """Column with the text; by default "text"."""
    revision: str | None = None
    """Revision to pin; overrides the list's for a short name."""
    max_documents: int | None = None
    """Stop after this many documents."""
    json: bool = False
    """Write the result to stdout as JSON."""


@dataclass(frozen=True)
class TokenizerOptions:
    """Train a byte-level BPE tokenizer (lossless; English and Japanese are cut by script)."""

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Texts: .txt, .jsonl, .jsonl.zst, .parquet, or folders of these."""
    output: Path = Path(TOKENIZER_NAME)
    """File to write."""
    vocab_size: int = 16384
    """Number of ids, including the 256 bytes and 2 special tokens."""
    max_megabytes: float = 50.0
    """Megabytes of text to train on; from longer inputs, documents are sampled evenly."""
    json: bool = False
    """Write the result to stdout as JSON."""


@dataclass(frozen=True)
class PackOptions:
    """Tokenize texts into a packed corpus: memory-mapped tokens, training and held-out."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Texts: .txt, .jsonl, .jsonl.zst, .parquet, or folders of these; NAME=PATH sets the name of the source in the mixture."""
    output: Path
    """Folder to write."""
    tokenizer: str = "bytes"
    """A tokenizer.json, or "bytes" for the byte-level tokenizer that needs no training."""
    holdout: Literal["auto", "hash", "author", "tail"] = "auto"
    """What is held out: whole documents by hash, whole authors by hash, or the end of each document; auto takes whole documents
    if every source has enough of them, else the ends."""
    holdout_fraction: float = 0.05
    """Approximate share of the text to hold out."""
    overwrite: bool = False
    """Replace an existing packed corpus."""
    json: bool = False
    """Write the result to stdout as JSON."""


@dataclass(frozen=True)
class VerifyOptions:
    """Read a packed corpus whole: every checksum, token id and document border is compared with what was packed."""

    corpus: tyro.conf.Positional[Path]
    """Folder of the packed corpus."""
    json: bool = False
    """Write the result to stdout as JSON."""


def run(arguments: list[str]) -> int:
    """`fmem data VERB`."""
    verbs: dict[str, Callable[[list[str]], int]] = {"fetch": _fetch, "tokenizer": _tokenizer, "pack": _pack, "verify": _verify}
    if not arguments or arguments[0] in ("-h", "--help"):
        console().print(
            "usage: fmem data VERB [options]; see fmem data VERB --help for more\n\n"
            "  fetch      download a data set from the hub, streaming, to one file; alone, list those with a short name\n"
            "  tokenizer  train a byte-level BPE tokenizer\n"
            "  pack       tokenize texts into a packed corpus\n"
            "  verify     reread a packed corpus and check that it is as it was packed"
        )
        return 0 if arguments else 2
    return choose(arguments[0], verbs, "fmem data")(arguments[1:])


def _fetch(arguments: list[str]) -> int:
    options = parse(FetchOptions, arguments, "data fetch")
    if options.show_list or options.name is None:
        return _list_corpora(options.json)
    if options.output is None:
        raise ConfigError(
            f"--output is missing; give the file to write, for example --output {Path(options.name).name}.jsonl.zst"
        )
    from factorization_memory.data.fetch import fetch_dataset, source_record

    out = console()
    with out.status("opening the data set") as status:
        record = fetch_dataset(
            options.name,
            options.output,
            config=options.config,
            split=options.split,
            text_column=options.text_column,
            revision=options.revision,
            data_dir=options.data_dir,
            max_documents=options.max_documents,
            progress=lambda documents, size: status.update(f"fetching: {documents:,} documents, {size / 1e6:,.1f} MB"),
        )
    beside = source_record(options.output)
    say(f"{record.documents:,} documents of {options.name} written to {options.output}, their origin to {beside.name}")
    emit({"output": str(options.output), "record": str(beside), **asdict(record)}, options.json)
    return 0


def _list_corpora(as_json: bool) -> int:
    from factorization_memory.data.named_corpora import CORPORA

    out = console()
    for name, corpus in CORPORA.items():
        out.print(f"{name}: {corpus.about}", soft_wrap=True, markup=False)
        where = corpus.data_set + (f", {corpus.config}" if corpus.config else "")
        out.print(f"    {where}, revision {corpus.revision}", soft_wrap=True, markup=False)
        out.print(f"    {corpus.size}; {corpus.licence}", soft_wrap=True, markup=False)
    out.print("\nfmem data fetch NAME --output NAME.jsonl.zst", markup=False)
    emit({name: asdict(corpus) for name, corpus in CORPORA.items()}, as_json)
    return 0


def _tokenizer(arguments: list[str]) -> int:
    options = parse(TokenizerOptions, arguments, "data tokenizer")
    _require_inputs(options.inputs, "data tokenizer")
    if options.vocab_size < 258:
        raise ConfigError(f"--vocab-size={options.vocab_size}: use 258 (256 bytes and 2 special tokens) or more")
    import time

    from factorization_memory.data.text_sample import TextSample
    from factorization_memory.data.tokenizer import Tokenizer

    left_out = LeftOut()
    with console().status("reading the texts"):
        texts = TextSample(options.inputs, int(options.max_megabytes * 1e6), left_out.add)
    left_out.say()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with console().status("training the tokenizer"):
        tokenizer = Tokenizer.train(texts, options.vocab_size)
    tokenizer.save(options.output)
    seconds = time.perf_counter() - start
    result = {"output": str(options.output), "vocab_size": tokenizer.vocab_size, "bytes": texts.read, "seconds": seconds}
    read, total = texts.read / 1e6, texts.total / 1e6
    say(f"{options.output}: {tokenizer.vocab_size:,} ids from {read:.1f} of {total:.1f} MB in {seconds:.0f} s")
    emit(result, options.json)
    return 0


def _pack(arguments: list[str]) -> int:
    options = parse(PackOptions, arguments, "data pack")
    _require_inputs(options.inputs, "data pack")
    if not 0 < options.holdout_fraction < 1:
        raise ConfigError(f"--holdout-fraction={options.holdout_fraction}: use a number between 0 and 1, such as 0.05")
    import time

    from factorization_memory.data.shards import pack
    from factorization_memory.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.bytes_level() if options.tokenizer == "bytes" else Tokenizer.load(Path(options.tokenizer))
    start = time.perf_counter()
    out = console()
    left_out = LeftOut()
    with out.status("packing") as status:
        corpus = pack(
            [_named(text) for text in options.inputs],
            tokenizer,
            options.output,
            holdout=options.holdout,
            holdout_fraction=options.holdout_fraction,
            overwrite=options.overwrite,
            progress=lambda documents, size: status.update(
                f"packing: {documents:,} documents, {size / 1e6:.1f} MB, {size / 1e6 / (time.perf_counter() - start):.1f} MB/s"
            ),
            skipped=left_out.add,
            notice=say,
        )
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {"output": str(options.output), "seconds": seconds, "sources": {}}
    size = 0
    for name, source in corpus.sources.items():
        result["sources"][name] = {}
        for part, split in source.splits.items():
            size += split.text_bytes
            numbers = {"documents": split.num_documents, "tokens": len(split.tokens), "bytes": split.text_bytes}
            result["sources"][name][part] = numbers
            say(
                f"{visible(name):>8} {part:<11}{numbers['documents']:>8,} documents {numbers['tokens']:>14,} tokens "
                f"{numbers['bytes']:>14,} bytes"
            )
    result["megabytes_per_second"] = size / 1e6 / seconds
    result["left_out"] = left_out.paths
    left_out.say()
    say(f"packed into {options.output} at {result['megabytes_per_second']:.1f} MB/s")
    emit(result, options.json)
    return 0


def _verify(arguments: list[str]) -> int:
    options = parse(VerifyOptions, arguments, "data verify")
    from factorization_memory.data.shards import PackedCorpus

    out = console()
    with out.status("reading the corpus") as status:
        corpus = PackedCorpus.open(options.corpus)
        corpus.verify(lambda read, total: status.update(f"reading: {read / 1e6:,.0f} of {total / 1e6:,.0f} MB"))
    splits = [split for source in corpus.sources.values() for split in source.splits.values()]
    result = {
        "corpus": str(options.corpus),
        "fingerprint": corpus.fingerprint,
        "sources": len(corpus.sources),
        "documents": sum(split.num_documents for split in splits),
        "tokens": sum(len(split.tokens) for split in splits),
    }
    say(f"{options.corpus}: intact, {result['documents']:,} documents and {result['tokens']:,} tokens")
    emit(result, options.json)
    return 0


class LeftOut:
    """What folders hold and is not read, to be told by reasons."""

    def __init__(self) -> None:
        self.paths: dict[str, list[str]] = {}

    def add(self, path: Path, reason: str) -> None:
        """Records a path that is not read."""
        # As text that can be written, also where a name is not UTF-8.
        self.paths.setdefault(reason, []).append(os.fsencode(path).decode("utf-8", errors="backslashreplace"))

    def say(self) -> None:
        """Lists the first paths of each reason on stderr."""
        for reason, paths in self.paths.items():
            more = f" and {len(paths) - 5:,} more" if len(paths) > 5 else ""
            say(f"skipped ({reason}): {', '.join(paths[:5])}{more}")


def _require_inputs(inputs: Sequence[object], verb: str) -> None:
    if not inputs:
        raise ConfigError(f"no input given; name at least one file or folder: fmem {verb} PATH ...")


def _named(text: str) -> tuple[str | None, Path]:
    """A source's name and path from NAME=PATH, or from a path alone (which may itself hold "=")."""
    name, equals, path = text.partition("=")
    named = equals and re.fullmatch(r"[\w.-]+", name) and not Path(text).exists()
    return (name, Path(path)) if named else (None, Path(text))
