"""Shared fixtures. Uninitialised memory is filled with NaN in every test, so that what is read before it is written shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from factorization_memory.data.shards import PackedCorpus

SENTENCES = (
    "It was a bright cold day in April, and the clocks were striking thirteen.",
    "The sky above the port was the colour of a television tuned to a dead channel.",
    "Call me Ishmael; some years ago, never mind how long precisely, I went to sea.",
)


# Tests are small, and threads that wait for each other on busy cores make them many times slower.
torch.set_num_threads(1)


def patch_language_once_a_launch() -> None:
    """Triton's interpreter patches its language again in every call of a device function, which took a third of
    the tests' time; once per launch is enough."""
    from triton.language import core
    from triton.runtime import interpreter

    patch, launch, language = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter.tl
    patched: set[tuple[bool, bool]] = set()

    def patch_once(fn: Any) -> Any:
        known = fn.__globals__.values()
        seen = (any(value is language for value in known), any(value is core for value in known))
        if seen in patched:
            return None
        patched.add(seen)
        return patch(fn)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels are interpreted where there is no GPU.
    os.environ["TRITON_INTERPRET"] = "1"

    if find_spec("triton"):
        patch_language_once_a_launch()

# Where there is no Triton, as on a Mac, there are no kernels to test.
collect_ignore = (
    []
    if find_spec("triton")
    else [
        "ops/test_cross_entropy.py",
        "ops/test_decoding_kernels.py",
        "ops/test_triton.py",
        "ops/test_triton_gates.py",
        "ops/test_small_linear.py",
        "ops/test_sparse.py",
        "ops/test_operators.py",
        "models/test_causality.py",
        "models/test_second_derivatives.py",
        "models/test_steps.py",
        "benchmarks/test_tuning.py",
    ]
)

# What runs tests in the background (nohup, a shell's &) may ignore signals, which the processes that tests start would inherit.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in a fixed order, so that equal runs are equal bit for bit, whatever an earlier test has set."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What verbs remember between calls stays out of the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PackedCorpus:
    """A packed corpus of one source, "en"."""
    from factorization_memory.data.shards import pack
    from factorization_memory.data.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    (folder / "en.txt").write_text("\n".join(SENTENCES[i % 3] for i in range(120)), encoding="utf-8")
    return pack([("en", folder / "en.txt")], Tokenizer.bytes_level(), folder / "packed", holdout="tail")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def in_two_processes() -> Callable[..., None]:
    """Runs a script as two processes, whose arguments are a rank and those given; fails if either does."""

    def run(script: Path, *arguments: Any, **environment: str) -> None:
        processes = [
            subprocess.Popen(
                [sys.executable, script, str(rank), *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            for process in processes:
                said = process.communicate(timeout=240)[1]
                assert process.returncode == 0, said[-2000:]
        finally:
            for process in processes:
                process.kill()

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no GPU here (torch.cuda.is_available() is False)")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
