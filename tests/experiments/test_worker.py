from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def test_a_run_ends_with_the_comparison_that_started_it() -> None:
    child = """if True:
        import os, sys, time
        from factorization_memory.experiments.worker import end_with
        end_with(os.getppid())
        print(os.getpid(), flush=True)
        time.sleep(60)
    """
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        pid = int(running.stdout.readline())
        running.kill()

    def alive() -> bool:
        try:
            os.kill(pid, 0)
            return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return False

    deadline = time.monotonic() + 20
    while alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
