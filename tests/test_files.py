"""Files and folders are whole or not there, whoever else writes and whenever a writer is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from factorization_memory._files import JSONError, atomic_file, atomic_folder, lock, parse_json, read_json, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_within(code: str) -> None:
    """Run `code` in a process that kills itself where the code says KILL."""
    script = f"import os, signal\nfrom pathlib import Path\nfrom factorization_memory._files import *\n{code}"
    done = subprocess.run([sys.executable, "-c", script.replace("KILL", "os.kill(os.getpid(), signal.SIGKILL)")], check=False)
    assert done.returncode == -signal.SIGKILL


class TestFile:
    def test_is_whole_or_as_before(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "a.json"
        write_atomic(path, "日本")
        assert path.read_bytes() == "日本".encode()
        with pytest.raises(NotADirectoryError), atomic_file(path) as partial:
            partial.rename(path / "no folder")
        assert path.read_text(encoding="utf-8") == "日本"
        assert names(path.parent) == ["a.json"]

    def test_two_writers_have_a_file_each(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        with atomic_file(path) as first:
            first.write_text("first " * 1000)
            with atomic_file(path) as second:
                second.write_text("second")
            assert path.read_text() == "second"
        assert path.read_text() == "first " * 1000
        assert names(tmp_path) == ["a"]

    def test_many_writers_at_once(self, tmp_path: Path) -> None:
        path, failed = tmp_path / "a", []

        def write(number: int) -> None:
            try:
                for _ in range(20):
                    write_atomic(path, str(number) * 10_000)
            except BaseException as error:  # told by the test's own thread
                failed.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert len(set(path.read_text())) == 1
        assert len(path.read_text()) == 10_000
        assert names(tmp_path) == ["a"]

    def test_reaches_the_disk_before_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (order.append(Path(f"/proc/self/fd/{fd}").resolve().name), fsync(fd))[1])
        monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b))[1])
        write_atomic(tmp_path / "a", "text")
        assert order[0].endswith(".partial")
        assert order[1:] == ["rename", tmp_path.name]

    def test_what_a_killed_writer_left_goes(self, tmp_path: Path) -> None:
        killed_within(f"with atomic_file(Path({str(tmp_path / 'a')!r})) as partial: partial.write_text('half'); KILL")
        (tmp_path / "a.txt.01234567.partial").touch()  # another file's
        assert len(names(tmp_path)) == 2
        write_atomic(tmp_path / "a", "whole")
        assert names(tmp_path) == ["a", "a.txt.01234567.partial"]

    def test_longest_names(self, tmp_path: Path) -> None:
        name = "あ" * 85
        write_atomic(tmp_path / name, "text")
        assert names(tmp_path) == [name]

    def test_only_files_are_replaced(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe"):
            with pytest.raises(FileExistsError, match="not a file"):
                write_atomic(path, "text")
        assert names(tmp_path) == ["pipe"]


class TestFolder:
    def test_is_whole_or_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "run"
        with pytest.raises(FileNotFoundError), atomic_folder(path) as partial:
            (partial / "missing" / "a").touch()
        assert names(path.parent) == []
        with atomic_folder(path) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "a").write_text("whole")
        assert (path / "inner" / "a").read_text() == "whole"
        assert names(path.parent) == ["run"]

    def test_replaces_only_where_asked(self, tmp_path: Path) -> None:
        path = tmp_path / "run"
        path.mkdir()
        for overwrite, text in ((False, "first"), (True, "second")):  # an empty folder is free
            with atomic_folder(path, overwrite=overwrite) as partial:
                (partial / "a").write_text(text)
        with pytest.raises(FileExistsError, match="run: exists and is not empty"), atomic_folder(path) as partial:
            (partial / "a").write_text("third")
        assert (path / "a").read_text() == "second"
        assert names(tmp_path) == ["run"]

    def test_old_one_survives_a_failing_rename(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "run"
        with atomic_folder(path) as partial:
            (partial / "a").write_text("old")
        rename = os.rename

        def failing(source: Path, target: Path) -> None:
            if str(source).endswith(".partial"):
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="Input/output"), atomic_folder(path, overwrite=True):
            pass
        assert (path / "a").read_text() == "old"
        assert names(tmp_path) == ["run"]

    def test_old_one_is_put_back_after_a_kill_between_the_renames(self, tmp_path: Path) -> None:
        path = tmp_path / "run"
        with atomic_folder(path) as partial:
            (partial / "a").write_text("old")
        killed_within(
            f"rename = os.rename\n"
            f"def failing(source, target):\n"
            f"    if str(source).endswith('.partial'): KILL\n"
            f"    rename(source, target)\n"
            f"os.rename = failing\n"
            f"with atomic_folder(Path({str(path)!r}), overwrite=True): pass"
        )
        assert not path.exists()
        with pytest.raises(KeyError), atomic_folder(path):
            raise KeyError
        assert (path / "a").read_text() == "old"
        assert names(tmp_path) == ["run"]


class TestLock:
    def test_one_holder(self, tmp_path: Path) -> None:
        path = tmp_path / ".lock"
        with lock(path, ValueError):
            with pytest.raises(ValueError, match=f"^process {os.getpid()} on "), lock(path, ValueError):
                pass
            assert path.exists()
        with lock(path, ValueError):
            pass
        assert not path.exists()

    def test_goes_with_its_process(self, tmp_path: Path) -> None:
        path = tmp_path / ".lock"
        killed_within(f"with lock(Path({str(path)!r}), ValueError): KILL")
        assert path.exists()
        with lock(path, ValueError):
            pass

    def test_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", failing)
        with pytest.warns(UserWarning, match="no locks"), lock(tmp_path / ".lock", ValueError):
            pass
        write_atomic(tmp_path / "a", "text")
        assert names(tmp_path) == ["a"]


class TestJSON:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "not JSON"),
            (b'{"a": 1', r"not JSON \(.* at character 7\)"),
            (b'"\xff"', "not UTF-8: byte 0xff at offset 1"),
            (b'{"a": ["\\ud800"]}', r"lone surrogate U\+D800"),
            (b'{"\\uDC00": 1}', r"lone surrogate U\+DC00"),
            (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
            (b'{"a": ' + b"[" * 501 + b"]" * 501 + b"}", "nested too deeply"),
            (b"9" * 5000, "digits"),
        ],
        ids=["empty", "cut", "bytes", "value", "key", "very deep", "deep", "digits"],
    )
    def test_damaged(self, tmp_path: Path, data: bytes, message: str) -> None:
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(JSONError, match=rf"a\.json: .*{message}") as caught:
            read_json(tmp_path / "a.json")
        assert "\n" not in str(caught.value)

    def test_values(self, tmp_path: Path) -> None:
        write_atomic(tmp_path / "a.json", '{"a": "\\ud83d\\ude00", "b": [1.5, null]}')
        assert read_json(tmp_path / "a.json") == {"a": "😀", "b": [1.5, None]}
        assert parse_json('"\\\\ud800"') == "\\ud800"
        assert parse_json("[" * 499 + "[1], [2]" + "]" * 499)
        assert len(parse_json("[" + "[], " * 2000 + "{}]")) == 2001
        with pytest.raises(FileNotFoundError):
            read_json(tmp_path / "b.json")
        with pytest.raises(JSONError, match=r"lone surrogate U\+D800"):
            parse_json('{"a": "\ud800"}')
