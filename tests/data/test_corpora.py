"""Documents come out of every kind of file alike, and every bad file has its one clear error."""

from __future__ import annotations

import errno
import json
import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from factorization_memory.data import corpora
from factorization_memory.data.corpora import CorpusError, Document, builtin_corpus, fetch_dataset, read_documents

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
        monkeypatch.setattr(corpora, "_READ_SIZE", 7)
        path = write(tmp_path / "a.jsonl", jsonl(ROWS).rstrip(b"\n"))
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
            (b"[1]", "list, not a JSON object"),
            (b'{"text": "a\\ud800"}', "U+D800"),
        ],
    )
    def test_bad_line_is_named(self, tmp_path: Path, line: bytes, what: str) -> None:
        message = error_of(write(tmp_path / "a.jsonl", jsonl(ROWS[:1]) + b"\n" + line + b"\n"))
        assert f"{tmp_path / 'a.jsonl'}, line 3" in message
        assert what in message

    def test_compressed_data_cut_short(self, tmp_path: Path) -> None:
        data = zstandard.compress(jsonl(ROWS))
        for length in (len(data) - 1, len(data) // 2):
            assert "cut short" in error_of(write(tmp_path / "a.jsonl.zst", data[:length]))

    def test_not_compressed_data(self, tmp_path: Path) -> None:
        assert "not Zstandard" in error_of(write(tmp_path / "a.jsonl.zst", jsonl(ROWS)))

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "x", "id": 1}]), path)
        assert "no column 'text' among body, id" in error_of(path)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}, {"text": None}]), path)
        assert "a.parquet, row 2" in error_of(path)
        assert "not a parquet file" in error_of(write(path, path.read_bytes()[:-20]))

    def test_unsupported(self, tmp_path: Path) -> None:
        assert "unsupported" in error_of(write(tmp_path / "a.docx", b"x"))
        assert ".parquet" in error_of(tmp_path / "a.docx")
        assert "holds no" in error_of(tmp_path)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: list) -> dict:
    """Stands in for the optional library; returns the arguments it was called with."""
    asked: dict = {}

    def load_dataset(name, config, **options):
        asked.update(name=name, config=config, **options)
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
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
        count = fetch_dataset("some/name", output, config="x", split="test", text_column="body", revision="v1", max_documents=3)
        assert count == 3
        assert asked == {"name": "some/name", "config": "x", "split": "test", "revision": "v1", "streaming": True}
        documents = list(read_documents(output))
        assert [document.text for document in documents] == [ROWS[0]["text"], ROWS[1]["text"], "third?"]
        assert (documents[0].id, documents[0].author, documents[2].id) == ("a", "Ann", "some/name:4")
        assert [file.name for file in output.parent.iterdir()] == ["a.jsonl.zst"]

    def test_failures_leave_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        output = tmp_path / "a.jsonl.zst"

        def rows():
            yield ROWS[0]
            raise OSError(errno.ENOSPC, "No space left on device")

        for bad, message in (
            (rows(), "no space left"),
            ([{"body": "x"}], "no column 'text' among body"),
            ([], "no row has text"),
        ):
            fake_datasets(monkeypatch, bad)
            with pytest.raises(CorpusError, match=message):
                fetch_dataset("some/name", output)
            assert not list(tmp_path.iterdir())

    def test_output_must_be_new_and_named_rightly(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match="exists"):
            fetch_dataset("x", write(tmp_path / "a.jsonl.zst", b""))
        with pytest.raises(CorpusError, match="must end in"):
            fetch_dataset("x", tmp_path / "a.json")

    def test_local_data_set_through_the_library(self, tmp_path: Path) -> None:
        pytest.importorskip("datasets")
        (tmp_path / "set").mkdir()
        write(tmp_path / "set" / "train.jsonl", jsonl([row | {"id": "x"} for row in ROWS[:2]]))
        assert fetch_dataset(str(tmp_path / "set"), tmp_path / "a.jsonl.zst") == 2
        with pytest.raises(CorpusError, match="cannot be loaded"):
            fetch_dataset(str(tmp_path / "none"), tmp_path / "b.jsonl.zst")
