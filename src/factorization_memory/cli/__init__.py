"""The `fmem` command: one module per verb, imported when called, so that `fmem --help` is fast.

Human text goes to stderr; with `--json` a verb writes its result to stdout as one JSON line. Exit status: 0 done, 1 a failed
run, 2 bad usage, 128 + the signal's number when stopped by one.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from types import FrameType

from factorization_memory._streams import best_effort, prepare_standard_streams

VERBS = {
    "demo": "train, evaluate and sample a small model on two books in about two minutes, and write a report",
    "doctor": "show what is installed, and test which backends run here",
    "data": "fetch a data set, train a tokenizer, pack a corpus",
    "plan": "show a run's parameters, FLOPs, memory and learning rates without running it",
    "train": "train a model on a packed corpus",
    "compare": "train models of equal size on the same text, each at its best learning rate, and compare",
    "sweep": "plan and run many runs from one Python function, and show where they stand",
    "evaluate": "measure held-out loss, bits per byte, loss by position, routing health; or run lm-evaluation-harness tasks",
    "generate": "continue a prompt",
    "inspect": "show which memory states the tokens of a text update and read",
    "export": "write a run's model in Hugging Face's layout",
    "import": "make a run folder from a model in that layout",
    "bench": "measure the recurrence and whole models on this machine",
}

MODULES = {"import": "import_model"}
"""Modules of verbs that are Python keywords."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `fmem` with `arguments` (those of the process by default) and exit."""
    if arguments is None:
        prepare_standard_streams()
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _leave)
    status = dispatch(list(sys.argv[1:] if arguments is None else arguments))
    try:
        sys.stdout.flush()
    except OSError as error:
        lost = _lost_stdout(error)
        status = status or lost
    sys.exit(status)


def dispatch(arguments: list[str]) -> int:
    """Run one verb; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), file=best_effort(sys.stderr) if not arguments else sys.stdout)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from factorization_memory._version import __version__

        print(f"fmem {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        from factorization_memory.config import suggestion

        return complain(f"{verb!r} is not a verb of fmem{suggestion(verb, VERBS)}", 2)
    from factorization_memory.config import ConfigError

    try:
        return import_module(f"{__name__}.{MODULES.get(verb, verb)}").run(rest)
    except ConfigError as error:
        return complain(_with_flag(str(error)), 2)
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except BrokenPipeError as error:
        return _lost_stdout(error)
    except (MemoryError, OverflowError, ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FMEM_TRACEBACK"):
            raise
        return complain(_in_words(error), 1)


def _with_flag(message: str) -> str:
    """Replaces the name of a library argument by that of its flag. Fields of a run, with their section, are spelled alike."""
    return re.sub(r"^(?!contenders=)[a-z]+(_[a-z]+)*=", lambda name: "--" + name[0].replace("_", "-"), message)


def _in_words(error: Exception) -> str:
    """The message of an error; for lack of memory, also the remedy."""
    message = str(error)
    asked = re.search(r"(?:tried to|Tried to|Unable to) allocate (\d+ bytes|[\d.]+ \w+)", message)
    if isinstance(error, MemoryError) or asked or "out of memory" in message or "Storage size calculation" in message:
        what = f" ({asked[1]} for one array)" if asked else ""
        return f"out of memory{what}; use smaller sizes, or fewer sequences at once"
    if isinstance(error, OverflowError):
        return f"a number is too large ({message}); use a smaller one"
    return message


def _leave(number: int, frame: FrameType | None) -> None:
    """Signal handler: exits by an exception, so that temporary files are removed on the way out."""
    raise SystemExit(128 + number)


def complain(message: str, status: int) -> int:
    """Prints an error on stderr; returns `status`."""
    from factorization_memory._text import visible

    print(f"fmem: {visible(message, keep=chr(10))}", file=best_effort(sys.stderr))
    return status


def _lost_stdout(error: OSError) -> int:
    """Keeps the interpreter from flushing to a lost stdout; silent if the reader has left, as `| head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if isinstance(error, BrokenPipeError) else complain(f"stdout: {error.strerror or error}", 1)


def _help() -> str:
    # Not `listing` of common.py, whose imports are too slow here.
    lines = "\n".join(
        textwrap.fill(what, 80, initial_indent=f"  {verb:<10}", subsequent_indent=" " * 12) for verb, what in VERBS.items()
    )
    return f"usage: fmem VERB [options]; see fmem VERB --help for more\n\n{lines}\n\n  --version"
