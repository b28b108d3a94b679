"""A packed corpus holds all of its text, says so when it does not, and never looks whole before it is."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from factorization_memory.data import manifest, packer, verification
from factorization_memory.data.corpora import CorpusError, builtin_corpus
from factorization_memory.data.manifest import fingerprint_of
from factorization_memory.data.shards import PackedCorpus, pack
from factorization_memory.data.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_level()


def documents(count: int, *, source: str = "a", author: bool = True) -> list[dict]:
    rows = [{"text": f"{source} document {i}\n雨" + "x" * (i % 7), "id": str(i), "language": source} for i in range(count)]
    return [row | {"author": f"author {i // 4}"} for i, row in enumerate(rows)] if author else rows


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = documents(100, source="en") + documents(60, source="ja")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(corpus: PackedCorpus, source: str, split: str) -> list[str]:
    part = corpus.sources[source].splits[split]
    starts = part.document_starts
    for start, end in itertools.pairwise(starts):
        assert part.tokens[end - 1] == corpus.tokenizer.document_end
        assert corpus.tokenizer.document_end not in part.tokens[start : end - 1]
    return [corpus.tokenizer.decode(part.tokens[a:b].tolist()) for a, b in itertools.pairwise(starts)]


class TestPack:
    def test_everything_is_there_once(self, jsonl: Path, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        corpus = pack([(None, jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2, progress=lambda *p: seen.append(p))
        assert list(corpus.sources) == ["en", "ja"]
        total = 0
        for name, count in (("en", 100), ("ja", 60)):
            parts = {split: texts(corpus, name, split) for split in ("train", "validation")}
            assert sorted(parts["train"] + parts["validation"]) == sorted(row["text"] for row in documents(count, source=name))
            assert 0.05 < len(parts["validation"]) / count < 0.4
            for split, found in parts.items():
                entry = corpus.sources[name].splits[split]
                assert entry.text_bytes == sum(len(text.encode()) for text in found)
                assert entry.num_documents == len(found)
                assert entry.language == name
                assert entry.document_starts[-1] == len(entry.tokens)
                total += entry.text_bytes
        assert seen[-1] == (160, total)
        assert len(seen) == 160
        corpus.verify()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]

    def test_is_repeatable_and_order_of_files_does_not_move_documents(self, jsonl: Path, tmp_path: Path) -> None:
        first = pack([(None, jsonl)], BYTES, tmp_path / "one", holdout_fraction=0.2)
        second = pack([(None, jsonl)], BYTES, tmp_path / "two", holdout_fraction=0.2)
        assert first.fingerprint == second.fingerprint
        lines = jsonl.read_text().splitlines()
        (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)))
        turned = pack([(None, tmp_path / "turned.jsonl")], BYTES, tmp_path / "three", holdout_fraction=0.2)
        assert turned.fingerprint != first.fingerprint
        assert set(texts(turned, "en", "validation")) == set(texts(first, "en", "validation"))

    def test_author_holdout_keeps_authors_together(self, tmp_path: Path) -> None:
        rows = documents(200)
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        corpus = pack([("s", tmp_path / "in.jsonl")], BYTES, tmp_path / "out", holdout="author", holdout_fraction=0.2)
        author = {row["text"]: row["author"] for row in rows}
        train, validation = ({author[text] for text in texts(corpus, "s", split)} for split in ("train", "validation"))
        assert train
        assert validation
        assert not train & validation

    def test_tail_holdout_cuts_each_book_at_a_line(self, tmp_path: Path) -> None:
        corpus = pack([(None, builtin_corpus())], BYTES, tmp_path / "out", holdout="tail", holdout_fraction=0.1)
        for name in ("en", "ja"):
            (train,), (validation,) = (texts(corpus, name, split) for split in ("train", "validation"))
            (book,) = (builtin_corpus() / name).glob("*.txt")
            assert train + validation == book.read_text(encoding="utf-8")
            assert train.endswith("\n")
            assert 0.09 < len(validation) / len(train + validation) < 0.11

    def test_tail_of_a_text_without_lines(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x" * 100)
        corpus = pack([(None, tmp_path / "a.txt")], BYTES, tmp_path / "out", holdout="tail", holdout_fraction=0.25)
        assert len(texts(corpus, "a", "validation")[0]) == 25

    def test_wide_ids_when_the_vocabulary_needs_them(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("some text\n" * 10)
        narrow = pack([(None, tmp_path / "a.txt")], BYTES, tmp_path / "narrow", holdout="tail", holdout_fraction=0.3)
        tokenizer = Tokenizer.bytes_level()
        tokenizer.vocab_size = 70_000
        wide = pack([(None, tmp_path / "a.txt")], tokenizer, tmp_path / "wide", holdout="tail", holdout_fraction=0.3)
        one, two = (corpus.sources["a"].splits["train"].tokens for corpus in (narrow, wide))
        assert (one.dtype, two.dtype) == (np.uint16, np.uint32)
        assert np.array_equal(one, two)

    def test_auto_takes_whole_documents_where_there_are_enough_and_else_their_ends(self, jsonl: Path, tmp_path: Path) -> None:
        told: list[str] = []
        by_hash = pack([(None, jsonl)], BYTES, tmp_path / "hash", holdout="hash", holdout_fraction=0.2)
        enough = pack([(None, jsonl)], BYTES, tmp_path / "auto", holdout="auto", holdout_fraction=0.2, notice=told.append)
        assert enough.fingerprint == by_hash.fingerprint
        assert not told
        books = tmp_path / "books"
        for number in range(21):
            (books / ("ja" if number == 0 else "en")).mkdir(parents=True, exist_ok=True)
            (books / ("ja" if number == 0 else "en") / f"{number}.txt").write_text(f"line {number}\n" * 30)
        few = pack([(None, books)], BYTES, tmp_path / "few", holdout="auto", notice=told.append)
        assert few.fingerprint == pack([(None, books)], BYTES, tmp_path / "tail", holdout="tail").fingerprint
        assert [(source.splits["train"].num_documents, source.splits["validation"].num_documents) for source in
                few.sources.values()] == [(20, 20), (1, 1)]  # fmt: skip
        (message,) = told
        assert "holding out the end of every document: source 'ja'" in message
        assert "1 document(s)" in message

    @pytest.mark.parametrize("holdout", ["hash", "author"])
    def test_empty_split_is_seen_before_anything_is_tokenized(self, tmp_path: Path, monkeypatch, holdout) -> None:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents(8)))
        monkeypatch.setattr(Tokenizer, "encode_blocks", lambda *_: pytest.fail("tokenized"))
        with pytest.raises(CorpusError, match=r"'a'.*validation.*8 document\(s\)"):
            pack([(None, tmp_path / "a.jsonl")], BYTES, tmp_path / "out", holdout=holdout, holdout_fraction=1e-9)

    def test_sources_with_awkward_names(self, jsonl: Path, tmp_path: Path) -> None:
        inputs = [("a/b", jsonl), ("a_b", jsonl), ("日本", jsonl)]
        corpus = pack(inputs, BYTES, tmp_path / "out", holdout_fraction=0.2)
        assert list(corpus.sources) == ["a/b", "a_b", "日本"]
        assert all(source.language is None for source in corpus.sources.values())
        assert len({len(source.splits["train"].tokens) for source in corpus.sources.values()}) == 1

    def test_sources_with_long_names(self, jsonl: Path, tmp_path: Path) -> None:
        names = ["日本" * 60 + end for end in "ab"]
        corpus = pack([(name, jsonl) for name in names], BYTES, tmp_path / "out", holdout_fraction=0.2)
        assert list(corpus.sources) == names

    def test_more_sources_than_open_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [{"text": f"text {i} of some words\n" * 4, "language": f"l{i % 60}"} for i in range(120)]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        most = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, most[1]))
            corpus = pack([(None, tmp_path / "in.jsonl")], BYTES, tmp_path / "out", holdout="tail", holdout_fraction=0.3)
            assert len(corpus.sources) == 60
            read = [text for name in corpus.sources for split in ("train", "validation") for text in texts(corpus, name, split)]
            assert sum(map(len, read)) == sum(len(row["text"]) for row in rows)
            monkeypatch.setattr(manifest, "MAPPED_BYTES", 0)
            with pytest.raises(CorpusError, match=r"more sources than the limit on open files; raise it"):
                PackedCorpus.open(tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, most)


class TestRefusals:
    @pytest.mark.parametrize(("holdout", "remedy"), [("hash", "holdout='tail'"), ("author", "holdout='tail'")])
    def test_empty_split(self, tmp_path: Path, holdout, remedy: str) -> None:
        (tmp_path / "a.jsonl").write_text(json.dumps(documents(1)[0]))
        with pytest.raises(CorpusError, match=rf"'a'.*validation.*{remedy}"):
            pack([(None, tmp_path / "a.jsonl")], BYTES, tmp_path / "out", holdout=holdout, holdout_fraction=1e-9)
        with pytest.raises(CorpusError, match=r"'a'.*train.*smaller"):
            pack([(None, tmp_path / "a.jsonl")], BYTES, tmp_path / "out", holdout=holdout, holdout_fraction=1 - 1e-9)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

    def test_tail_of_next_to_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(CorpusError, match="too little text"):
            pack([(None, tmp_path / "a.txt")], BYTES, tmp_path / "out", holdout="tail")

    def test_author_missing(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(json.dumps(documents(1, author=False)[0]))
        with pytest.raises(CorpusError, match=r"document '0'.*no author.*holdout='hash'"):
            pack([(None, tmp_path / "a.jsonl")], BYTES, tmp_path / "out", holdout="author")

    def test_bad_arguments(self, jsonl: Path, tmp_path: Path) -> None:
        for options, message in (
            ({"holdout": "random"}, "holdout='random'"),
            ({"holdout_fraction": 0.0}, "holdout_fraction=0.0"),
            ({"holdout_fraction": 1.0}, "holdout_fraction=1.0"),
        ):
            with pytest.raises(CorpusError, match=message):
                pack([(None, jsonl)], BYTES, tmp_path / "out", **options)
        with pytest.raises(CorpusError, match="no input"):
            pack([], BYTES, tmp_path / "out")

    def test_existing_folders(self, jsonl: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        output.mkdir()
        old = pack([("old", jsonl)], BYTES, output, holdout_fraction=0.2)  # an empty folder is free
        with pytest.raises(CorpusError, match="overwrite"):
            pack([("new", jsonl)], BYTES, output, holdout_fraction=0.2)
        with pytest.raises(CorpusError, match="would be empty"):
            pack([("new", jsonl)], BYTES, output, holdout_fraction=1e-9, overwrite=True)
        assert PackedCorpus.open(output).fingerprint == old.fingerprint
        assert list(pack([("new", jsonl)], BYTES, output, holdout_fraction=0.2, overwrite=True).sources) == ["new"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "thesis.tex").write_text("precious")
        with pytest.raises(CorpusError, match="not a packed corpus"):
            pack([("new", jsonl)], BYTES, mine, overwrite=True)
        assert (mine / "thesis.tex").exists()


class TestInterrupted:
    @pytest.mark.parametrize(
        ("failure", "raised", "message"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), CorpusError, "no space left on the disk"),
            (OSError(errno.EIO, "Input/output error"), OSError, "Input/output"),
            (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
        ],
    )
    def test_nothing_is_left(self, jsonl: Path, tmp_path: Path, monkeypatch, failure, raised, message: str) -> None:
        write, calls = packer._SplitWriter.write, []

        def failing(self, ids):
            calls.append(ids)
            if len(calls) > 30:
                raise failure
            write(self, ids)

        with monkeypatch.context() as patched:
            patched.setattr(packer._SplitWriter, "write", failing)
            with pytest.raises(raised, match=message):
                pack([(None, jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2)
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
        pack([(None, jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2).verify()

    def test_disk_full_when_the_manifest_is_written(self, jsonl: Path, tmp_path: Path, monkeypatch) -> None:
        def failing(self, *_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", failing)
        with pytest.raises(CorpusError, match="no space left"):
            pack([(None, jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2)
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]

    def test_what_a_killed_pack_left_is_no_corpus_and_does_no_harm(self, jsonl: Path, tmp_path: Path) -> None:
        partial = tmp_path / "out.01234567.partial"
        whole = pack([(None, jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2)
        shutil.move(tmp_path / "out", partial)
        (partial / "manifest.json").unlink()
        (partial / "stale.tokens").write_bytes(b"stale")
        with pytest.raises(CorpusError, match="not a packed corpus"):
            PackedCorpus.open(partial)
        again = pack([(None, jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2)
        assert again.fingerprint == whole.fingerprint
        assert not partial.exists()
        assert not (tmp_path / "out" / "stale.tokens").exists()

    def test_second_pack_into_one_output_is_refused_and_harms_nothing(self, jsonl: Path, tmp_path: Path) -> None:
        refused: list[str] = []

        def second(documents: int, text_bytes: int) -> None:
            if not refused:
                with pytest.raises(CorpusError, match=r"out: another process is packing into this folder; wait") as caught:
                    pack([(None, jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2)
                refused.append(str(caught.value))

        corpus = pack([(None, jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2, progress=second)
        corpus.verify()
        assert len(refused) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]

    def test_lock_that_a_killed_pack_left_does_not_count(self, jsonl: Path, tmp_path: Path) -> None:
        (tmp_path / "out.lock").touch()
        pack([(None, jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2)
        assert not (tmp_path / "out.lock").exists()

    def test_corpus_being_replaced_survives_a_failing_rename(self, jsonl: Path, tmp_path: Path, monkeypatch) -> None:
        old = pack([("old", jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2)
        rename = os.rename

        def failing(source, target):
            if str(source).endswith(".partial"):
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="Input/output"):
            pack([("new", jsonl)], BYTES, tmp_path / "out", holdout_fraction=0.2, overwrite=True)
        assert PackedCorpus.open(tmp_path / "out").fingerprint == old.fingerprint


class TestOpen:
    @pytest.fixture
    def packed(self, jsonl: Path, tmp_path: Path) -> Path:
        pack([(None, jsonl)], BYTES, tmp_path / "packed", holdout_fraction=0.2)
        return tmp_path / "packed"

    def error_of(self, folder: Path) -> str:
        with pytest.raises(CorpusError) as caught:
            PackedCorpus.open(folder)
        return str(caught.value)

    def test_no_corpus(self, packed: Path, tmp_path: Path) -> None:
        assert f"did you mean {str(packed)!r}" in self.error_of(tmp_path / "paked")
        assert "not a packed corpus" in self.error_of(tmp_path)
        (packed / "manifest.json").write_text('{"format": "another"}')
        assert "not the manifest" in self.error_of(packed)
        (packed / "manifest.json").write_text('{"format": ')
        assert "damaged" in self.error_of(packed)

    def test_newer_version(self, packed: Path) -> None:
        manifest = json.loads((packed / "manifest.json").read_text())
        (packed / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
        assert "version 2" in self.error_of(packed)
        assert "update" in self.error_of(packed)

    def test_manifest_edited(self, packed: Path) -> None:
        text = (packed / "manifest.json").read_text()
        (packed / "manifest.json").write_text(text.replace('"documents": ', '"documents": 1'))
        assert "fingerprint" in self.error_of(packed)

    @pytest.mark.parametrize("suffix", [".tokens", ".documents.npy"])
    def test_file_cut_short_or_missing(self, packed: Path, suffix: str) -> None:
        file = next(path for path in sorted(packed.iterdir()) if path.name.endswith(suffix))
        size = file.stat().st_size
        file.write_bytes(file.read_bytes()[:-2])
        assert file.name in self.error_of(packed)
        assert f"got {size - 2} bytes, expected {size}" in self.error_of(packed)
        file.unlink()
        assert file.name in self.error_of(packed)
        assert "missing" in self.error_of(packed)

    @pytest.mark.parametrize("suffix", [".tokens", ".documents.npy"])
    def test_changed_bytes_are_seen(self, packed: Path, suffix: str) -> None:
        corpus = PackedCorpus.open(packed)
        file = next(path for path in sorted(packed.iterdir()) if path.name.endswith(suffix))
        data = bytearray(file.read_bytes())
        data[-10] ^= 1
        file.write_bytes(data)
        message = self.error_of(packed)
        assert message.startswith(str(file))
        assert "checksum" in message
        assert "pack the corpus again" in message
        with pytest.raises(CorpusError, match=rf"{file.name}.*checksum"):
            corpus.verify()

    def test_file_that_may_not_be_read(self, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = next(packed.glob("*.tokens"))
        opened = Path.open

        def refused(self: Path, *arguments: object, **options: object) -> object:
            if self == file:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return opened(self, *arguments, **options)

        monkeypatch.setattr(Path, "open", refused)
        with pytest.raises(OSError, match=rf"{file}: cannot be read \(Permission denied\); grant read access"):
            PackedCorpus.open(packed)

    def rewritten(self, packed: Path, change) -> str:
        """What is said of the corpus with its first training files changed by `change(tokens, starts, manifest)` and every
        checksum made right."""
        manifest = json.loads((packed / "manifest.json").read_text())
        files = manifest["sources"]["en"]["splits"]["train"]
        places = [packed / files[kind]["name"] for kind in ("tokens_file", "documents_file")]
        tokens, starts = change(np.fromfile(places[0], dtype="<u2"), np.load(places[1]), manifest)
        places[0].write_bytes(tokens.tobytes())
        np.save(places[1], starts)
        for kind, place in zip(("tokens_file", "documents_file"), places, strict=True):
            files[kind] |= {"size": place.stat().st_size, "sha256": hashlib.sha256(place.read_bytes()).hexdigest()}
        manifest["fingerprint"] = fingerprint_of(manifest)
        (packed / "manifest.json").write_text(json.dumps(manifest))
        return self.error_of(packed)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda t, s, _: (np.where(np.arange(len(t)) == 5, 258, t).astype("<u2"), s),
                "train.tokens: contains the token id 258",
            ),
            (lambda t, s, _: (t, s + 1), "train.documents.npy: document borders"),
            (lambda t, s, _: (t, np.append(s[:-1], s[-1] - 1)), "document borders"),
            (lambda t, s, _: (t, np.append([0, s[2], s[1]], s[3:])), "document borders"),
            (lambda t, s, _: (t, s[:-1]), r"train.documents.npy: got int64 \[\d+\], expected"),
            (lambda t, s, _: (t, s.astype(np.float64)), "train.documents.npy: got float64"),
            (lambda t, s, _: (t.astype("<u4"), s), "manifest.json: size="),
            (lambda t, s, m: m.update(dtype="<f2") or (t, s), "manifest.json: dtype='<f2'"),
            (lambda t, s, m: m.pop("sources", None) and (t, s), "manifest.json: sources='None'"),
            (lambda t, s, m: m["sources"]["ja"].update(splits=[1]) or (t, s), r"manifest.json: splits='\[1\]'"),
            (
                lambda t, s, m: m["sources"]["ja"]["splits"]["train"]["tokens_file"].update(name="../a") or (t, s),
                r"name='\.\./a'",
            ),
        ],
    )
    def test_what_no_packing_writes(self, packed: Path, change, message: str) -> None:
        said = self.rewritten(packed, change)
        assert re.search(message, said)
        assert "pack" in said

    def test_large_corpora_are_read_once_until_a_file_changes(self, packed: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(verification, "REMEMBERED_BYTES", 1)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        read: list[int] = []
        contents = verification._check_contents
        monkeypatch.setattr(verification, "_check_contents", lambda *a: (read.append(1), contents(*a)))
        corpus = PackedCorpus.open(packed)
        PackedCorpus.open(packed)
        assert len(read) == 1
        corpus.verify()
        assert len(read) == 2
        file = next(packed.glob("*.tokens"))
        before, data = file.stat(), bytearray(file.read_bytes())
        data[10] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert "checksum" in self.error_of(packed)
        assert "checksum" in self.error_of(packed)  # what was found damaged is not remembered
        # A note that cannot be read or written is no reason to stop.
        data[10] ^= 1
        file.write_bytes(data)
        note = next((tmp_path / "cache").rglob("*.json"))
        note.write_text("{")
        PackedCorpus.open(packed)
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
        PackedCorpus.open(packed)
        assert len(read) == 6

    def test_another_tokenizer(self, packed: Path) -> None:
        Tokenizer.train(["other text"], 300).save(packed / "tokenizer.json")
        assert "not the tokenizer the corpus was packed with" in self.error_of(packed)
        (packed / "tokenizer.json").write_text("{")
        assert "tokenizer.json" in self.error_of(packed)
        (packed / "tokenizer.json").unlink()
        assert "missing" in self.error_of(packed)
