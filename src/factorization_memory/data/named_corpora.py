"""Data sets of the Hugging Face hub with short names, each pinned to a commit; and their files on a local disk.

Pinning keeps runs reproducible: a branch on the hub can change between two fetches.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from factorization_memory.config import ConfigError, suggestion

READERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".jsonl.zst": "json",
}
"""The reader of the `datasets` library for each kind of local file."""


@dataclass(frozen=True)
class HubCorpus:
    """Location of a corpus on the hub, and the contents of its rows."""

    data_set: str
    """OWNER/NAME on the hub."""
    about: str = ""
    """What it is, in one line."""
    size: str = ""
    """Approximate documents and download size of the split."""
    licence: str | None = None
    language: str | None = None
    """Language of every document, which names its source; None: given by the rows, if at all."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """A full commit hash; None: whatever the hub has now."""
    files: str | None = None
    """Pattern of the files on the hub, without suffix; may contain the placeholders {config} and {split}."""
    text_column: str = "text"
    id_column: str = "id"
    title_column: str = "title"

    @property
    def pattern(self) -> str | None:
        """`files` for this configuration and split."""
        return self.files and self.files.format(config=self.config, split=self.split)

    def choose(self, *, config: str | None, split: str | None, text_column: str | None, revision: str | None) -> HubCorpus:
        """A copy with the arguments that are not None; facts known only for one configuration are dropped for another."""
        chosen = replace(
            self,
            config=config or self.config,
            split=split or self.split,
            text_column=text_column or self.text_column,
            revision=revision or self.revision,
        )
        changed = [part for part in ("config", "split") if getattr(chosen, part) != getattr(self, part)]
        if self.files and not all(f"{{{part}}}" in self.files for part in changed):
            chosen = replace(chosen, files=None)
        return replace(chosen, language=None) if "config" in changed else chosen


CORPORA = {
    "fineweb-edu": HubCorpus(
        "HuggingFaceFW/fineweb-edu",
        about="English web pages chosen for educational value, a sample of 10 billion tokens",
        size="9.7 million documents, 29 GB",
        licence="ODC-By 1.0",
        language="en",
        config="sample-10BT",
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        files="sample/10BT/*",
    ),
    "fineweb": HubCorpus(
        "HuggingFaceFW/fineweb",
        about="English web pages, filtered and deduplicated, a sample of 10 billion tokens",
        size="15 million documents, 31 GB",
        licence="ODC-By 1.0",
        language="en",
        config="sample-10BT",
        revision="9bb295ddab0e05d785b879661af7260fed5140fc",
        files="sample/10BT/*",
    ),
    "c4-en": HubCorpus(
        "allenai/c4",
        about="the Colossal Clean Crawled Corpus: English web pages of 2019",
        size="365 million documents, 305 GB",
        licence="ODC-By 1.0",
        language="en",
        config="en",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        files="{config}/c4-{split}.*",
        id_column="url",
    ),
    "wikipedia-en": HubCorpus(
        "wikimedia/wikipedia",
        about="English Wikipedia of November 2023, as plain text",
        size="6.4 million documents, 12 GB",
        licence="CC BY-SA 3.0, GFDL",
        language="en",
        config="20231101.en",
        revision="b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
        files="{config}/{split}-*",
    ),
    "pg19": HubCorpus(
        "emozilla/pg19",
        about="PG-19: English books of Project Gutenberg from before 1919, whole; for long contexts",
        size="29 thousand documents, 11 GB of text",
        licence="Apache 2.0; the books are in the public domain in the USA",
        language="en",
        revision="c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
        files="data/{split}-*",
        id_column="url",
        title_column="short_book_title",
    ),
    "tinystories": HubCorpus(
        "roneneldan/TinyStories",
        about="short English stories in simple words, made by GPT-3.5 and GPT-4; for small models",
        size="2.1 million documents, 1.9 GB of text",
        licence="CDLA-Sharing 1.0",
        language="en",
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        files="data/{split}-*",
    ),
    "fineweb-2-ja": HubCorpus(
        "HuggingFaceFW/fineweb-2",
        about="Japanese web pages, filtered and deduplicated",
        size="376 million documents, 2 TB",
        licence="ODC-By 1.0",
        language="ja",
        config="jpn_Jpan",
        revision="af9c13333eb981300149d5ca60a8e9d659b276b9",
        files="data/{config}/{split}/*",
    ),
    "fineweb-2-edu-ja": HubCorpus(
        "hotchpotch/fineweb-2-edu-japanese",
        about="the pages of FineWeb-2 in Japanese chosen for educational value, a sample of 10 billion tokens",
        size="13 million documents, 37 GB",
        licence="ODC-By 1.0",
        language="ja",
        config="sample_10BT",
        revision="180ca004c6a89b590daaad86cb062a07a5353c69",
        files="{config}/{split}-*",
    ),
    "c4-ja": HubCorpus(
        "allenai/c4",
        about="mC4 in Japanese: web pages until 2020, not much filtered",
        size="1.4 TB of text",
        licence="ODC-By 1.0",
        language="ja",
        config="ja",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        files="multilingual/c4-ja.*",
        id_column="url",
    ),
    "wikipedia-ja": HubCorpus(
        "wikimedia/wikipedia",
        about="Japanese Wikipedia of November 2023, as plain text",
        size="1.4 million documents, 4 GB",
        licence="CC BY-SA 3.0, GFDL",
        language="ja",
        config="20231101.ja",
        revision="b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
        files="{config}/{split}-*",
    ),
}
"""Each revision is in public use for its data set; a corpus whose commit is unknown is not listed."""


def find_corpus(name: str) -> HubCorpus:
    """The corpus of a short name; for OWNER/NAME or a folder, one with nothing else filled in.

    Raises `ConfigError`, suggesting the most similar one, for an unknown short name.
    """
    if name in CORPORA:
        return CORPORA[name]
    if "/" not in name and not Path(name).is_dir():
        raise ConfigError(
            f"name={name!r}: unknown short name{suggestion(name, CORPORA)} "
            "(give other data sets of the hub as OWNER/NAME, a folder by its path)"
        )
    return HubCorpus(name)


def download_command(corpus: HubCorpus) -> str:
    """A shell command that downloads the corpus's files to a folder DIR."""
    options = ["--repo-type", "dataset"]
    if corpus.revision:
        options += ["--revision", corpus.revision]
    if corpus.pattern:
        options += ["--include", corpus.pattern]
    return shlex.join(["hf", "download", corpus.data_set, *options, "--local-dir", "DIR"])


def local_files(corpus: HubCorpus, folder: Path) -> list[Path]:
    """The corpus's files, sorted, in a folder laid out like the data set, or in just that subfolder of it which holds them.

    Empty if there are none, or if it is not known what they are called.
    """
    if corpus.pattern is None:
        return []
    pattern = PurePosixPath(corpus.pattern)
    inner = pattern.parent.parts
    is_inner = folder.resolve().parts[-len(inner) :] == inner
    found = [*folder.glob(str(pattern)), *(folder.glob(pattern.name) if is_inner else [])]
    # macOS leaves "._NAME" files next to those copied to other disks.
    return sorted(path for path in found if path.is_file() and reader(path) and not path.name.startswith("."))


def reader(path: Path) -> str | None:
    """The reader of the `datasets` library for a file, by its name."""
    return next((READERS[suffix] for suffix in READERS if path.name.endswith(suffix)), None)
