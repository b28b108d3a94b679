"""What `fmem data` says and returns, on small folders of text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factorization_memory.cli import dispatch


@pytest.fixture
def packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "a.txt").write_text("some words\n" * 100)
    output = tmp_path / "packed"
    assert dispatch(["data", "pack", str(tmp_path / "a.txt"), "--output", str(output), "--holdout", "tail"]) == 0
    capsys.readouterr()
    return output


def test_verify(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["data", "verify", str(packed), "--json"]) == 0
    said = capsys.readouterr()
    assert "as it was packed, 2 documents and 1,102 tokens" in said.err
    assert json.loads(said.out)["tokens"] == 1102
    file = next(packed.glob("*.train.tokens"))
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    assert dispatch(["data", "verify", str(packed)]) == 1
    said = capsys.readouterr()
    assert f"{file}: changed since it was packed" in said.err
    assert "pack the corpus again" in said.err
