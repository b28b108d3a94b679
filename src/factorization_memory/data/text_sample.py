"""An even sample of texts too large to train a tokenizer on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from factorization_memory.data.corpora import read_documents, utf8_length


class TextSample:
    """The documents of files and folders, or every n-th of each, so that about `limit` bytes remain.

    Reads them all once to determine their size, `total`; `read` counts the bytes iterated so far. `skipped` is called as in
    `read_documents`, once per path.
    """

    def __init__(self, inputs: Sequence[Path], limit: int, skipped: Callable[[Path, str], None]) -> None:
        self.inputs = inputs
        self.total = sum(utf8_length(document.text) for path in inputs for document in read_documents(path, skipped=skipped))
        self.read = 0
        self._keep = max(1, -(-self.total // max(limit, 1)))

    def __iter__(self) -> Iterator[str]:
        for path in self.inputs:
            for number, document in enumerate(read_documents(path, skipped=lambda *_: None)):  # reported before
                if number % self._keep == 0:
                    self.read += utf8_length(document.text)
                    yield document.text
