from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from factorization_memory.runs import RunLock, RunLockedError
from factorization_memory.runs.names import LOCK_NAME

HOLDER = """
import sys
from pathlib import Path
from factorization_memory.runs import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=rf"process {holder.pid} on .* is writing this run folder"), RunLock(tmp_path):
            pass
        # However the holder ends, its lock goes with it.
        holder.kill()
        holder.wait()
        assert (tmp_path / LOCK_NAME).exists()
        with RunLock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_second_run_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(RunLockedError), RunLock(tmp_path):
            pass
        assert (tmp_path / LOCK_NAME).exists()
    with RunLock(tmp_path):
        pass
