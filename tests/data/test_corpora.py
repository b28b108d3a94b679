"""Documents come out of every kind of file alike, and every bad file has its one clear error."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import re
import sys
import tracemalloc
import types
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from factorization_memory.config import ConfigError
from factorization_memory.data import rows
from factorization_memory.data.corpora import (
    CorpusError,
    Document,
    builtin_corpus,
    read_documents,
)
from factorization_memory.data.fetch import fetch_dataset, source_record
from factorization_memory.data.named_corpora import CORPORA
from factorization_memory.data.shards import pack
from factorization_memory.data.tokenizer import Tokenizer

ROWS = [
    {"text": "One day,\nit rained.", "id": "a", "author": "Ann", "language": "en"},
    {"text": "ある日、\n雨が降った。", "id": "b", "author": "花子", "language": "ja"},
    {"text": "no more fields"},
]


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def error_of(path: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        list(read_documents(path))
    return str(caught.value)


class TestKinds:
    @pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "jsonl.zst in two frames", "parquet"])
    def test_rows(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / f"books.{kind.split()[0]}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        elif kind == "jsonl":
            write(path, b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\n\n"))
        else:
            cut = 40 if "two" in kind else 0
            data = jsonl(ROWS)
            write(path, zstandard.compress(data[:cut]) * bool(cut) + zstandard.compress(data[cut:]))
        first, second, third = read_documents(path)
        assert first == Document("One day,\nit rained.", "a", "en", "en", "Ann")
        assert second == Document("ある日、\n雨が降った。", "b", "ja", "ja", "花子")
        assert (third.text, third.source, third.language, third.author) == ("no more fields", "books", None, None)
        assert third.id.startswith(f"{path.name}:")
        assert [document.source for document in read_documents(path, source="mine")] == ["mine"] * 3

    def test_lines_longer_than_a_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rows, "_READ_SIZE", 7)
        path = write(tmp_path / "a.jsonl", jsonl(ROWS).rstrip(b"\n"))
        assert [document.text for document in read_documents(path)] == [row["text"] for row in ROWS]

    def test_a_long_line_is_held_few_times(self, tmp_path: Path) -> None:
        line = jsonl([{"text": "some words " * 1_000_000}])
        path = write(tmp_path / "a.jsonl", line + line)
        tracemalloc.start()
        try:
            lengths = [len(document.text) for document in read_documents(path)]
            assert tracemalloc.get_traced_memory()[1] < 4.5 * len(line)
        finally:
            tracemalloc.stop()
        assert lengths == [11_000_000, 11_000_000]

    def test_zstandard_of_a_long_window(self, tmp_path: Path) -> None:
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        path = write(tmp_path / "a.jsonl.zst", stream.compress(jsonl(ROWS)) + stream.flush())
        assert [document.text for document in read_documents(path)] == [row["text"] for row in ROWS]

    def test_text_file_is_one_document(self, tmp_path: Path) -> None:
        path = write(tmp_path / "story.TXT", "\ufeffCafe\u0301\r\nか\u3099\rx\r\r\n".encode())
        assert list(read_documents(path)) == [Document("Café\nが\nx\n\n", "story.TXT", "story", None, None)]

    def test_folder_is_read_sorted_and_only_its_texts(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        write(tmp_path / "b" / "x.txt", b"third")
        write(tmp_path / "a.txt", b"first")
        write(tmp_path / "a2.jsonl", jsonl([{"text": "second"}]))
        write(tmp_path / "README.md", b"not read")
        write(tmp_path / ".hidden.txt", b"not read")
        documents = list(read_documents(tmp_path))
        assert [document.text for document in documents] == ["first", "second", "third"]
        assert documents[2].id == str(Path("b") / "x.txt")
        assert [document.source for document in documents] == [tmp_path.name, tmp_path.name, "b"]

    def test_links_are_followed_once(self, tmp_path: Path) -> None:
        folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
        (folder / "own").mkdir(parents=True)
        (elsewhere / "deep").mkdir(parents=True)
        write(folder / "own" / "a.txt", b"own")
        write(elsewhere / "b.txt", b"linked folder")
        write(elsewhere / "deep" / "c.txt", b"below a linked folder")
        write(tmp_path / "blob", b"linked file")
        for name, target in (
            ("shard", elsewhere),
            ("shard2", elsewhere),
            ("deep", elsewhere / "deep"),
            ("file.txt", tmp_path / "blob"),
            ("again.txt", folder / "own" / "a.txt"),
            ("nowhere.txt", tmp_path / "nowhere.txt"),
            ("self.txt", folder / "self.txt"),
            ("up", tmp_path),
            ("here", folder),
        ):
            (folder / name).symlink_to(target)
        (elsewhere / "back").symlink_to(folder)
        (elsewhere / "deep" / "up").symlink_to(elsewhere)
        told: dict[str, str] = {}
        documents = list(read_documents(folder, skipped=lambda path, why: told.update({str(path.relative_to(folder)): why})))
        assert [(document.text, document.source, document.id) for document in documents] == [
            ("below a linked folder", "deep", "deep/c.txt"),
            ("linked file", "corpus", "file.txt"),
            ("own", "own", "own/a.txt"),
            ("linked folder", "shard", "shard/b.txt"),
        ]
        circle, already = "a link to a folder that it is in itself", "read already, by another way"
        assert told == {
            "shard2": already,
            "shard/deep": already,
            "shard/back": already,
            "again.txt": already,
            "nowhere.txt": "a link that leads nowhere",
            "self.txt": "a link that leads nowhere (Too many levels of symbolic links)",
            "up": circle,
            "here": circle,
            "deep/up": circle,
        }

    def test_what_is_left_out_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path / "a.txt", b"text")
        write(tmp_path / "notes.md", b"text")
        (tmp_path / ".git").mkdir()
        os.mkfifo(tmp_path / "pipe.txt")
        (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
        told: list = []
        assert len(list(read_documents(tmp_path, skipped=lambda path, why: told.append((path.name, why))))) == 1
        assert told == [
            (".git", "hidden"),
            ("lost.txt", "a link that leads nowhere"),
            ("notes.md", "of another kind"),
            ("pipe.txt", "neither a file nor a folder"),
        ]
        read_documents(tmp_path)
        assert "lost.txt: skipped, it is a link that leads nowhere" in caplog.text
        assert "notes.md" not in caplog.text

    def test_folder_without_texts_says_what_it_holds(self, tmp_path: Path) -> None:
        write(tmp_path / "a.md", b"text")
        (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
        assert "a.md is of another kind; b.txt is a link that leads nowhere" in error_of(tmp_path)

    def test_folder_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "a.txt", b"text")

        def refused(self: Path) -> Iterator[Path]:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "iterdir", refused)
        with pytest.raises(OSError, match=rf"{tmp_path}: cannot be read \(Permission denied\); grant read access"):
            read_documents(tmp_path)

    def test_books_of_the_package(self) -> None:
        english, japanese = read_documents(builtin_corpus())
        assert (english.source, japanese.source) == ("en", "ja")
        assert "Sherlock Holmes" in english.text
        assert "坊っちゃん" in japanese.text
        assert "public domain" in (builtin_corpus() / "README.md").read_text(encoding="utf-8")


class TestBadFiles:
    def test_missing_names_the_nearest(self, tmp_path: Path) -> None:
        write(tmp_path / "books-en.jsonl", b"")
        assert f"did you mean {str(tmp_path / 'books-en.jsonl')!r}" in error_of(tmp_path / "book-en.jsonl")
        assert "no such file" in error_of(tmp_path / "zzz.txt")
        assert "mean" not in error_of(tmp_path / "zzz.txt")
        assert f"({tmp_path / 'none'} is not a folder)" in error_of(tmp_path / "none" / "below" / "a.txt")

    def test_link_that_leads_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").symlink_to("nowhere.txt")
        assert "a link that leads nowhere (to nowhere.txt); fix it" in error_of(tmp_path / "a.txt")

    def test_missing_is_seen_before_the_first_document_is_asked_for(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError):
            read_documents(tmp_path / "none.txt")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst"])
    def test_empty(self, tmp_path: Path, name: str) -> None:
        data = b" \n\n"
        assert "empty" in error_of(write(tmp_path / name, zstandard.compress(data) if name.endswith("zst") else data))
        assert "empty" in error_of(write(tmp_path / name, b""))

    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    def test_not_utf8_names_the_byte(self, tmp_path: Path, mark: bytes) -> None:
        message = error_of(write(tmp_path / "a.txt", mark + "日本".encode() + b"\x8f\xfa"))
        assert "a.txt" in message
        assert "0x8f" in message
        assert f"offset {len(mark) + 6}" in message

    def test_not_utf8_in_a_line(self, tmp_path: Path) -> None:
        first = jsonl(ROWS[:1])
        message = error_of(write(tmp_path / "a.jsonl", first + b'{"text": "\xff"}\n'))
        assert "line 2" in message
        assert "0xff" in message
        assert f"offset {len(first) + 10}" in message

    @pytest.mark.parametrize(
        ("line", "what"),
        [
            (b'{"title": "x"}', "no field 'text'"),
            (b'{"text": ""}', "empty 'text'"),
            (b'{"text": 5}', "'text' = '5'"),
            (b'{"text": null}', "'text' = 'None'"),
            (b'{"text": "x"', "not JSON"),
            (b"[1]", "expected a JSON object, got a list"),
            (b'{"text": "a\\ud800"}', "character 1 is the lone surrogate U+D800"),
            (b'{"text": "a", "author": "b\\udc00"}', "field 'author': character 1 is the lone surrogate U+DC00"),
            (b'{"text": "a", "language": "\\udc00"}', "field 'language': character 0"),
            (b'{"text": "a", "id": "\\udc00"}', "field 'id': character 0"),
            (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
            (b'{"text": ' + b"[" * 400 + b"]" * 400 + b"}", "'text' = '[[[["),
            (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "digits"),
        ],
    )
    def test_bad_line_is_named(self, tmp_path: Path, line: bytes, what: str) -> None:
        message = error_of(write(tmp_path / "a.jsonl", jsonl(ROWS[:1]) + b"\n" + line + b"\n"))
        assert f"{tmp_path / 'a.jsonl'}, line 3" in message
        assert what in message

    def test_surrogate_in_a_field_that_is_not_read(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", b'{"text": "words", "title": "\\ud800"}\n')
        assert [document.text for document in read_documents(path)] == ["words"]

    @pytest.mark.parametrize(
        ("encoding", "named"),
        [
            ("utf-16", "UTF-16"),
            ("utf-16-le", "UTF-16LE"),
            ("utf-16-be", "UTF-16BE"),
            ("utf-32", "UTF-32"),
            ("cp932", "SHIFT_JIS"),
            ("euc_jp", "EUC-JP"),
            ("latin-1", "WINDOWS-1252"),
        ],
    )
    def test_other_encodings_are_named(self, tmp_path: Path, encoding: str, named: str) -> None:
        japanese = "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。\n"
        for text in ["Un café très noir.\n"] if encoding == "latin-1" else ["some words\n", japanese]:
            if text.isascii() and not encoding.startswith("utf"):
                continue
            for name, content in (("a.txt", text), ("a.jsonl", json.dumps({"text": text}, ensure_ascii=False))):
                message = error_of(write(tmp_path / name, content.encode(encoding)))
                assert str(tmp_path / name) in message
                assert f"iconv -f {named} -t UTF-8" in message

    def test_file_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        table = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)

        def refused(self: Path, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        for method in ("open", "read_bytes"):
            monkeypatch.setattr(Path, method, refused)
        for path in (table, *(tmp_path / name for name in ("a.txt", "a.jsonl", "a.jsonl.zst"))):
            path.touch()
            with pytest.raises(OSError, match=rf"{path}: cannot be read \(Permission denied\); grant read access"):
                list(read_documents(path))

    def test_compressed_data_cut_short(self, tmp_path: Path) -> None:
        data = zstandard.compress(jsonl(ROWS))
        for length in (len(data) - 1, len(data) // 2):
            assert "cut short" in error_of(write(tmp_path / "a.jsonl.zst", data[:length]))

    def test_not_compressed_data(self, tmp_path: Path) -> None:
        assert "not a Zstandard file" in error_of(write(tmp_path / "a.jsonl.zst", jsonl(ROWS)))

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "x", "id": 1}]), path)
        assert "no column 'text' among body, id" in error_of(path)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}, {"text": None}]), path)
        assert "a.parquet, row 2" in error_of(path)
        assert "not a parquet file" in error_of(write(path, path.read_bytes()[:-20]))
        # Writers that take bytes for text make such a column.
        text = pyarrow.array([b"good"] * 70 + [b"caf\xe9"]).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
        assert f"{path}, row 71: not UTF-8: byte 0xe9 at offset 3 of a field" in error_of(path)

    def test_unsupported(self, tmp_path: Path) -> None:
        assert "unsupported" in error_of(write(tmp_path / "a.docx", b"x"))
        assert ".parquet" in error_of(tmp_path / "a.docx")
        assert "file in this folder" in error_of(tmp_path)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Iterable, commit: str = COMMIT) -> dict:
    """Stands in for the optional library; returns the arguments it was called with."""
    asked: dict = {}

    def load_dataset_builder(name, config=None, **options):
        asked.update(name=name, config=config, **options)
        return types.SimpleNamespace(hash=commit, as_streaming_dataset=lambda split: asked.update(split=split) or iter(rows))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset_builder=load_dataset_builder))
    return asked


class TestFetch:
    def test_without_the_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(CorpusError, match="pip install datasets"):
            fetch_dataset("some/name", tmp_path / "a.jsonl.zst")

    def test_streams_to_a_file_that_reads_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [{"body": row["text"], **row} for row in ROWS[:2]] + [
            {"body": None},
            {"body": "third\ud800"},
            {"body": "fourth"},
        ]
        asked = fake_datasets(monkeypatch, rows)
        output = tmp_path / "new" / "a.jsonl.zst"
        record = fetch_dataset(
            "some/name", output, config="x", split="test", text_column="body", revision="v1", max_documents=3
        )
        assert asked == {"name": "some/name", "config": "x", "split": "test", "revision": "v1"}
        documents = list(read_documents(output))
        assert [document.text for document in documents] == [ROWS[0]["text"], ROWS[1]["text"], "third?"]
        assert [document.language for document in documents] == ["en", "ja", None]
        assert (documents[0].id, documents[0].author, documents[2].id) == ("a", "Ann", "some/name:4")
        assert sorted(file.name for file in output.parent.iterdir()) == ["a.jsonl.zst", "a.source.json"]
        written = json.loads(source_record(output).read_text(encoding="utf-8"))
        assert written == dataclasses.asdict(record)
        # A tag or branch is told by the commit it stood for.
        assert written == {
            "data_set": "some/name", "config": "x", "split": "test", "revision": COMMIT, "local_files": None,
            "text_column": "body", "language": None, "licence": None, "documents": 3, "max_documents": 3,
            "fetched": record.fetched,
        }  # fmt: skip
        assert datetime.fromisoformat(record.fetched).utcoffset() == timedelta(0)

    def test_stops_without_reading_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def rows() -> Iterator[dict]:
            yield from ROWS[:2]
            pytest.fail("a row more than asked for was read")

        fake_datasets(monkeypatch, rows())
        assert fetch_dataset("some/name", tmp_path / "a.jsonl.zst", max_documents=2).documents == 2

    def test_tells_progress(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_datasets(monkeypatch, ROWS[:1] * 2500)
        told: list = []
        fetch_dataset("some/name", tmp_path / "a.jsonl.zst", progress=lambda *numbers: told.append(numbers))
        assert [documents for documents, _ in told] == [1000, 2000]
        assert told[1][1] == 2 * told[0][1] > 0

    def test_failures_leave_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        output = tmp_path / "a.jsonl.zst"

        def rows(error: Exception) -> Iterator[dict]:
            yield ROWS[0]
            raise error

        for bad, message in (
            (rows(OSError(errno.ENOSPC, "No space left on device")), "no space left"),
            (rows(OSError("connection reset")), r"stopped after 1 rows \(OSError: connection reset\); nothing was kept"),
            ([{"body": "x"}], "no column 'text' among body"),
            ([], "no text in the column"),
        ):
            fake_datasets(monkeypatch, bad)
            with pytest.raises(CorpusError, match=message):
                fetch_dataset("some/name", output)
            assert not list(tmp_path.iterdir())

    def test_second_fetch_into_one_file_is_refused_and_harms_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "a.jsonl.zst"

        def rows() -> Iterator[dict]:
            yield ROWS[0]
            fake_datasets(monkeypatch, ROWS)
            with pytest.raises(CorpusError, match=r"a\.jsonl\.zst: another process is fetching into this file; wait"):
                fetch_dataset("some/name", output)
            yield ROWS[1]

        fake_datasets(monkeypatch, rows())
        assert fetch_dataset("some/name", output).documents == 2
        assert [document.text for document in read_documents(output)] == [row["text"] for row in ROWS[:2]]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.zst", "a.source.json"]

    def test_output_must_be_new_and_named_rightly(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match="exists"):
            fetch_dataset("x", write(tmp_path / "a.jsonl.zst", b""))
        with pytest.raises(CorpusError, match="must end in"):
            fetch_dataset("x", tmp_path / "a.json")

    @pytest.mark.parametrize("number", [0, -1])
    def test_number_of_documents(self, tmp_path: Path, number: int) -> None:
        with pytest.raises(ConfigError, match=f"max_documents={number}: use 1 or more"):
            fetch_dataset("pg19", tmp_path / "a.jsonl.zst", max_documents=number)

    def test_local_data_set_through_the_library(self, tmp_path: Path, real_datasets: None) -> None:
        (tmp_path / "set").mkdir()
        write(tmp_path / "set" / "train.jsonl", jsonl([row | {"id": "x"} for row in ROWS[:2]]))
        record = fetch_dataset(str(tmp_path / "set"), tmp_path / "a.jsonl.zst")
        assert (record.documents, record.revision) == (2, None)
        with pytest.raises(CorpusError, match="could not be loaded"):
            fetch_dataset(str(tmp_path / "none"), tmp_path / "b.jsonl.zst")


@pytest.fixture
def real_datasets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself, with no network and a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cache)}.items():
        monkeypatch.setenv(name, value)
    datasets = pytest.importorskip("datasets")
    # What it read from the environment if an earlier test imported it.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def fineweb_edu_row(number: int) -> dict:
    return {
        "text": f"Page {number} teaches that water boils.", "id": f"<urn:uuid:{number}>", "dump": "CC-MAIN-2024-10",
        "url": f"https://example.org/{number}", "file_path": "s3://warc", "language": "eng", "language_score": 0.97,
        "token_count": 9, "score": 3.2, "int_score": 3,
    }  # fmt: skip


def wikipedia_row(number: int) -> dict:
    title = f"第{number}の湖"
    return {
        "id": str(number),
        "url": "https://ja.wikipedia.org/wiki/湖",
        "title": title,
        "text": f"{title}は湖である。\n深い。",
    }


@pytest.fixture
def fineweb_edu(tmp_path: Path) -> Path:
    """Two files of the sample, and one of another configuration."""
    folder = tmp_path / "fineweb-edu"
    for part in range(2):
        rows = [fineweb_edu_row(10 * part + i) for i in range(10)]
        parquet(folder / "sample" / "10BT" / f"00{part}_00000.parquet", rows)
    parquet(folder / "sample" / "100BT" / "000_00000.parquet", [fineweb_edu_row(99)])
    return folder


@pytest.fixture
def wikipedia(tmp_path: Path) -> Path:
    """Two files in Japanese, one in English, and what macOS leaves beside them."""
    folder = tmp_path / "wiki [2023]"
    for part in range(2):
        rows = [wikipedia_row(10 * part + i) for i in range(10)]
        parquet(folder / "20231101.ja" / f"train-0000{part}-of-00015.parquet", rows)
    write(folder / "20231101.ja" / "._train-00000-of-00015.parquet", b"no parquet")
    english = {"id": "7", "url": "https://en.wikipedia.org/wiki/Lake", "title": "Lake", "text": "A lake is water."}
    parquet(folder / "20231101.en" / "train-00000-of-00041.parquet", [english])
    return folder


class TestNamedCorpora:
    def test_table(self) -> None:
        for name, corpus in CORPORA.items():
            assert re.fullmatch("[0-9a-f]{40}", corpus.revision or ""), name
            assert corpus.data_set.count("/") == 1, name
            assert corpus.language in ("en", "ja"), name
            assert all((corpus.about, corpus.size, corpus.licence, corpus.pattern)), name
            assert "{" not in str(corpus.pattern), name

    def test_unknown_short_name_names_the_nearest(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"name='wikipedia_jp'.*did you mean 'wikipedia-ja'.*OWNER/NAME"):
            fetch_dataset("wikipedia_jp", tmp_path / "a.jsonl.zst")
        with pytest.raises(ConfigError, match=r"choose from .*fineweb-edu.*pg19"):
            fetch_dataset("zzzzzz", tmp_path / "a.jsonl.zst")

    def test_pinned_revision_unless_another_is_given(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pinned = CORPORA["wikipedia-ja"].revision
        assert pinned is not None
        asked = fake_datasets(monkeypatch, [wikipedia_row(1)], commit=pinned)
        record = fetch_dataset("wikipedia-ja", tmp_path / "a.jsonl.zst")
        assert asked == {"name": "wikimedia/wikipedia", "config": "20231101.ja", "split": "train", "revision": pinned}
        assert (record.revision, record.language, record.licence) == (pinned, "ja", "CC BY-SA 3.0, GFDL")
        asked = fake_datasets(monkeypatch, [wikipedia_row(1)])
        record = fetch_dataset("wikipedia-ja", tmp_path / "b.jsonl.zst", revision=COMMIT)
        assert asked["revision"] == record.revision == COMMIT

    def test_language_of_another_configuration_is_not_taken_for_known(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_datasets(monkeypatch, [{"text": "Ein See."}], commit=str(CORPORA["wikipedia-ja"].revision))
        record = fetch_dataset("wikipedia-ja", tmp_path / "a.jsonl.zst", config="20231101.de")
        assert (record.config, record.language) == ("20231101.de", None)
        assert [document.source for document in read_documents(tmp_path / "a.jsonl.zst")] == ["a"]

    def test_cached_copy_of_another_revision_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The library falls back on one, whatever was asked for, where there is no network."""
        fake_datasets(monkeypatch, [wikipedia_row(1)], commit=COMMIT)
        with pytest.raises(CorpusError, match=f"the cache has revision {COMMIT}.*--revision {COMMIT}.*hf download"):
            fetch_dataset("wikipedia-ja", tmp_path / "a.jsonl.zst")

    def test_folder_of_the_same_name_is_not_taken_for_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "emozilla" / "pg19").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CorpusError, match="--data-dir emozilla/pg19"):
            fetch_dataset("pg19", tmp_path / "a.jsonl.zst")

    def test_other_columns(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        row = {"short_book_title": "Emma", "publication_date": 1815, "url": "http://gutenberg.org/158", "text": "Emma was"}
        fake_datasets(monkeypatch, [row], commit=str(CORPORA["pg19"].revision))
        fetch_dataset("pg19", tmp_path / "a.jsonl.zst")
        line = json.loads(zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / "a.jsonl.zst").read_bytes()))
        assert line == {"id": "http://gutenberg.org/158", "title": "Emma", "language": "en", "text": "Emma was"}


class TestLocalFiles:
    """Files on disk, laid out like the data sets, through the `datasets` library."""

    def test_fetched_then_packed(self, tmp_path: Path, fineweb_edu: Path, wikipedia: Path, real_datasets: None) -> None:
        english = fetch_dataset("fineweb-edu", tmp_path / "en.jsonl.zst", data_dir=fineweb_edu)
        japanese = fetch_dataset("wikipedia-ja", tmp_path / "ja.jsonl.zst", data_dir=wikipedia)
        assert english.local_files == ("sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet")
        assert japanese.local_files == tuple(f"20231101.ja/train-0000{i}-of-00015.parquet" for i in range(2))
        assert [record.documents for record in (english, japanese)] == [20, 20]
        documents = list(read_documents(tmp_path / "en.jsonl.zst"))
        assert [document.id for document in documents] == [f"<urn:uuid:{i}>" for i in range(20)]
        assert {document.language for document in documents} == {"en"}  # the rows say "eng"
        data = zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / "ja.jsonl.zst").read_bytes())
        expected = {key: value for key, value in wikipedia_row(0).items() if key != "url"} | {"language": "ja"}
        assert json.loads(data.splitlines()[0]) == expected

        fetched = [(None, tmp_path / "en.jsonl.zst"), (None, tmp_path / "ja.jsonl.zst")]
        corpus = pack(fetched, Tokenizer.bytes_level(), tmp_path / "packed", holdout_fraction=0.2)
        assert set(corpus.sources) == {"en", "ja"}
        for source in corpus.sources.values():
            assert sum(split.num_documents for split in source.splits.values()) == 20

    @pytest.mark.parametrize("links", [False, True])
    def test_inner_folder(self, tmp_path: Path, wikipedia: Path, real_datasets: None, links: bool) -> None:
        """Just the folder that holds the files; also one of links to them, as the hub's cache is."""
        folder = wikipedia / "20231101.ja"
        if links:
            for number, path in enumerate(sorted(folder.glob("train-*"))):
                path.rename(wikipedia / str(number))
                path.symlink_to(wikipedia / str(number))
        record = fetch_dataset("wikipedia-ja", tmp_path / "a.jsonl.zst", data_dir=folder, max_documents=15)
        assert (record.documents, len(record.local_files or ())) == (15, 2)

    def test_lines_of_json(self, tmp_path: Path, real_datasets: None) -> None:
        folder = tmp_path / "c4"
        (folder / "en").mkdir(parents=True)
        for part in range(2):
            rows = jsonl([{"text": f"page {part}", "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{part}"}])
            write(folder / "en" / f"c4-train.0000{part}-of-01024.json.gz", gzip.compress(rows))
        write(folder / "en" / "c4-validation.00000-of-00008.json.gz", gzip.compress(jsonl([{"text": "held out"}])))
        fetch_dataset("c4-en", tmp_path / "a.jsonl.zst", data_dir=folder)
        documents = list(read_documents(tmp_path / "a.jsonl.zst"))
        assert [(d.id, d.text, d.source) for d in documents] == [
            (f"https://example.org/{part}", f"page {part}", "en") for part in range(2)
        ]
        fetch_dataset("c4-en", tmp_path / "b.jsonl.zst", data_dir=folder, split="validation")
        assert [document.text for document in read_documents(tmp_path / "b.jsonl.zst")] == ["held out"]
        write(folder / "en" / "c4-train.00002.parquet", b"")
        with pytest.raises(CorpusError, match=r"several types \(json, parquet\)"):
            fetch_dataset("c4-en", tmp_path / "c.jsonl.zst", data_dir=folder)

    def test_another_configuration_and_other_data_sets(self, tmp_path: Path, wikipedia: Path, real_datasets: None) -> None:
        fetch_dataset("wikipedia-ja", tmp_path / "a.jsonl.zst", config="20231101.en", data_dir=wikipedia)
        assert [document.text for document in read_documents(tmp_path / "a.jsonl.zst")] == ["A lake is water."]
        parquet(tmp_path / "folder" / "train.parquet", [{"text": "A lake is water."}])
        record = fetch_dataset("some/name", tmp_path / "b.jsonl.zst", data_dir=tmp_path / "folder")
        assert (record.data_set, record.documents, record.local_files) == ("some/name", 1, None)

    def test_files_of_another_corpus(self, tmp_path: Path, wikipedia: Path, fineweb_edu: Path) -> None:
        message = r"fineweb-edu: no 20231101.ja/train-\* .*hf download wikimedia/wikipedia .*--local-dir DIR"
        with pytest.raises(CorpusError, match=message):
            fetch_dataset("wikipedia-ja", tmp_path / "a.jsonl.zst", data_dir=fineweb_edu)
        with pytest.raises(CorpusError, match=r"no .* file of "):
            fetch_dataset("wikipedia-ja", tmp_path / "a.jsonl.zst", data_dir=wikipedia / "20231101.en")
        with pytest.raises(CorpusError, match="no such file or folder; did you mean"):
            fetch_dataset("wikipedia-ja", tmp_path / "a.jsonl.zst", data_dir=tmp_path / "fineweb-ed")

    def test_damaged_file(self, tmp_path: Path, wikipedia: Path, real_datasets: None) -> None:
        """The second file is cut short: what the first held is not kept either."""
        second = wikipedia / "20231101.ja" / "train-00001-of-00015.parquet"
        second.write_bytes(second.read_bytes()[:-20])
        (tmp_path / "out").mkdir()
        with pytest.raises(CorpusError, match="'wikipedia-ja': reading stopped after 10 rows"):
            fetch_dataset("wikipedia-ja", tmp_path / "out" / "a.jsonl.zst", data_dir=wikipedia)
        assert not list((tmp_path / "out").iterdir())

    def test_no_network_says_what_to_give_instead(self, tmp_path: Path, real_datasets: None) -> None:
        with pytest.raises(CorpusError) as caught:
            fetch_dataset("wikipedia-ja", tmp_path / "out" / "a.jsonl.zst")
        message = str(caught.value)
        assert "'wikipedia-ja'" in message
        assert "the hub cannot be reached" in message
        assert "--data-dir DIR" in message
        assert (
            "hf download wikimedia/wikipedia --repo-type dataset --revision b04c8d1ceb2f5cd4588862100d08de323dccfbaa "
            "--include '20231101.ja/train-*' --local-dir DIR"
        ) in message
        assert not (tmp_path / "out").exists()
        with pytest.raises(CorpusError, match="hf download some/name --repo-type dataset --revision v1 --local-dir DIR"):
            fetch_dataset("some/name", tmp_path / "a.jsonl.zst", revision="v1")
