from __future__ import annotations

from pathlib import Path

import pytest

from factorization_memory.data.text_sample import TextSample


@pytest.mark.parametrize(("limit", "kept"), [(1000, 6), (78, 6), (77, 3), (39, 3), (38, 2), (0, 1)])
def test_an_even_part_of_the_documents_remains(tmp_path: Path, limit: int, kept: int) -> None:
    lines = [f'{{"text": "number {number}: あ"}}\n' for number in range(6)]
    (tmp_path / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    sample = TextSample([tmp_path / "texts.jsonl"], limit, lambda path, reason: None)
    texts = list(sample)
    assert sample.total == 6 * len("number 0: あ".encode())
    assert len(texts) == kept
    assert texts[0] == "number 0: あ"
    assert sample.read == sum(len(text.encode()) for text in texts)
