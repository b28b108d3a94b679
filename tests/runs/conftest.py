from __future__ import annotations

from pathlib import Path

import pytest
import torch

from factorization_memory.data.shards import PackedCorpus, pack
from factorization_memory.data.tokenizer import Tokenizer

SENTENCES = (
    "It was a bright cold day in April, and the clocks were striking thirteen.",
    "The sky above the port was the colour of a television tuned to a dead channel.",
    "Call me Ishmael; some years ago, never mind how long precisely, I went to sea.",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PackedCorpus:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "en.txt").write_text("\n".join(SENTENCES[i % 3] for i in range(120)), encoding="utf-8")
    return pack([("en", folder / "en.txt")], Tokenizer.bytes_level(), folder / "packed", holdout="tail")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in a fixed order, so that equal runs are equal bit for bit."""
    torch.set_num_threads(1)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
