"""`fmem data fetch`: the list of corpora, files on disk to a packed corpus, and usage errors."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from factorization_memory.cli import dispatch
from factorization_memory.data.named_corpora import CORPORA
from factorization_memory.data.shards import PackedCorpus


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr, as one line each, of `fmem` in this process."""
    try:
        status = dispatch([str(a) for a in arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, " ".join(err.split())


@pytest.mark.parametrize("arguments", [[], ["--list"], ["pg19", "--list"]])
def test_list(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, out, err = call(capsys, "data", "fetch", *arguments)
    assert (status, out) == (0, "")
    for name, corpus in CORPORA.items():
        for text in (f"{name}: {corpus.about}", corpus.data_set, corpus.revision, corpus.size, corpus.licence):
            assert text is not None
            assert text in err


def test_list_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "data", "fetch", "--json")
    assert status == 0
    assert json.loads(out)["wikipedia-ja"]["config"] == "20231101.ja"


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.jsonl.zst"
    for arguments, message in (
        (["pg19"], "--output is missing; give the file to write, for example --output pg19.jsonl.zst"),
        (["pg20", "--output", output], "did you mean 'pg19'?"),
        (["pg19", "--output", output, "--max-documents", 0], "--max-documents=0"),
    ):
        status, out, err = call(capsys, "data", "fetch", *arguments)
        assert (status, out) == (2, "")
        assert message in err
    assert call(capsys, "data", "fetch", "pg19", "--output", tmp_path / "a.json")[0] == 1
    assert not list(tmp_path.iterdir())


def test_files_on_disk_to_a_packed_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("wikipedia-en", "wikipedia-ja"):
        folder = tmp_path / "wikipedia" / str(CORPORA[name].config)
        folder.mkdir(parents=True)
        rows = [{"id": str(i), "url": "u", "title": f"{name} {i}", "text": f"{name}: {i} 湖"} for i in range(30)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00015.parquet")
        output = tmp_path / f"{name}.jsonl.zst"
        status, out, err = call(
            capsys,
            "data",
            "fetch",
            name,
            "--data-dir",
            tmp_path / "wikipedia",
            "--output",
            output,
            "--max-documents",
            20,
            "--json",
        )
        assert status == 0, err
        assert f"20 documents of {name} written to" in err
        result = json.loads(out)
        assert json.loads(Path(result.pop("record")).read_text(encoding="utf-8")).items() < result.items()
        assert result["revision"] == CORPORA[name].revision
    packed = tmp_path / "packed"
    texts = [tmp_path / f"{name}.jsonl.zst" for name in ("wikipedia-en", "wikipedia-ja")]
    assert call(capsys, "data", "pack", *texts, "--output", packed, "--holdout-fraction", 0.3)[0] == 0
    sources = PackedCorpus.open(packed).sources
    assert {name: sum(split.num_documents for split in source.splits.values()) for name, source in sources.items()} == {
        "en": 20,
        "ja": 20,
    }
