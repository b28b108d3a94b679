"""Shared by the verbs: parsing, the console, results."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import signal
import sys
import textwrap
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from factorization_memory._streams import best_effort, lacks
from factorization_memory._text import visible
from factorization_memory.cli.help import tidy, without_boxes
from factorization_memory.config import ConfigError, suggestion

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from factorization_memory.config import RunConfig
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel
    from factorization_memory.runs.training_record import RunResult

T = TypeVar("T")
TABLE_WIDTH = 110
"""Least width of benchmarks' tables where no terminal sets it."""


def parse(options: type[T], arguments: list[str], verb: str, default: T | None = None) -> T:
    """The options of `fmem VERB` as an instance of the dataclass `options`; usage errors exit with status 2."""
    extra: dict[str, Any] = {} if default is None else {"default": default}
    may_be_none = flags_that_may_be_none(options)
    words = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        flag, equals, value = word.partition("=")
        if before.replace("_", "-") in may_be_none and word.lower() == "none":
            word = "None"
        elif equals and flag.replace("_", "-") in may_be_none and value.lower() == "none":
            word = f"{flag}=None"
        words.append(word)
    if not {"-h", "--help"} & {*words}:
        return tyro.cli(options, prog=f"fmem {verb}", args=words, **extra)
    page = io.TextIOWrapper(io.BytesIO(), "utf-8")  # tyro draws boxes only for UTF-8
    try:
        with contextlib.redirect_stdout(page):
            return tyro.cli(options, prog=f"fmem {verb}", args=words, **extra)
    finally:
        page.seek(0)
        text = tidy(page.read())
        print(without_boxes(text) if lacks(sys.stdout, text) else text, end="")


def flags_that_may_be_none(options: type[Any], prefix: str = "--") -> set[str]:
    """The flags of the dataclass `options`, and of those in it, that take a number or `None`, which people write `none`."""
    if not dataclasses.is_dataclass(options):  # one of several subcommands
        members = [
            typing.get_args(each)[0] if typing.get_origin(each) is Annotated else each for each in typing.get_args(options)
        ]
        return {flag for each in members for flag in flags_that_may_be_none(each, prefix)}
    found = set()
    for name, hint in typing.get_type_hints(options, include_extras=True).items():
        kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        named = next((each.name for each in notes if isinstance(getattr(each, "name", None), str)), name)
        if dataclasses.is_dataclass(kind):
            inner = f"{prefix}{named.replace('_', '-')}." if named else prefix
            found |= flags_that_may_be_none(typing.cast(type, kind), inner)
        elif type(None) in (among := typing.get_args(kind)) and {int, float} & {*among}:
            found.add(prefix + name.replace("_", "-"))
    return found


def checked(kind: type[T], options: T) -> T:
    """What `options`, of a subclass of the dataclass `kind` that checks nothing, say of its fields; made, and so checked, here,
    as an error while they are parsed would not name the flag."""
    return kind(**{each.name: getattr(options, each.name) for each in dataclasses.fields(typing.cast(Any, kind))})


def listing(items: dict[str, str], width: int) -> str:
    """Names and descriptions for help texts: names in a column of `width`, wrapped to fit a terminal of 80 columns."""
    return "\n".join(
        textwrap.fill(what, 80, initial_indent=f"  {name:<{width}}", subsequent_indent=" " * (width + 2))
        for name, what in items.items()
    )


def choose(name: str, known: dict[str, Any], what: str) -> Any:
    """`known[name]`, or a usage error that suggests the most similar name."""
    if name not in known:
        raise ConfigError(f"unknown {what} {name!r}{suggestion(name, known)}")
    return known[name]


def at_least(options: Any, **bounds: int) -> None:
    """Raises a usage error for the first of the named options below its bound."""
    for name, least in bounds.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: use {least} or more")


def console() -> Console:
    """The console for human readers: stderr, whose failure is not fatal. Terminal control characters are escaped; names from
    data go through `plain` of reports/terminal, since printed strings are parsed as markup."""
    from rich.console import Console

    class VisibleConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text, keep="\n\t"), **options)

    return VisibleConsole(file=best_effort(sys.stderr), highlight=False, emoji=False)


def wide_console(width: int = TABLE_WIDTH) -> Console:
    """A console that is wide enough for tables if no terminal sets the width."""
    people = console()
    if not people.is_terminal:
        people.width = max(people.width, width)
    return people


def resolve(run: Path | None) -> tuple[Path | None, Path | None]:
    """The run folder, if `run` is one; and the folder to load, of a run its best checkpoint, None for the package's model."""
    from factorization_memory.runs import find_checkpoint, list_checkpoints

    if run is None or not list_checkpoints(run):
        return None, run
    return run, find_checkpoint(run, "best")


def load(run: Path | None, device: str) -> tuple[LanguageModel, Tokenizer, RunConfig]:
    """The model given to a verb, or else the one that comes with the package; `device` is its `--device`."""
    from factorization_memory.models.device import resolve_device
    from factorization_memory.models.pretrained import builtin_model
    from factorization_memory.runs import load_model

    if run is None:
        console().print("[dim]no model given: using the one that comes with the package[/dim]")
    return load_model(builtin_model() if run is None else run, resolve_device(device, "--device"))


def say(message: str) -> None:
    """Prints a line that contains paths, without parsing markup or wrapping."""
    console().print(message, markup=False, soft_wrap=True)


def emit(result: Any, as_json: bool) -> None:
    """With `--json`, prints the result as one line on stdout, in ASCII if stdout's encoding lacks any of its characters."""
    if as_json:
        line = json.dumps(result, ensure_ascii=False, allow_nan=False)
        write_out((json.dumps(result, allow_nan=False) if lacks(sys.stdout, line) else line) + "\n")


def write_out(text: str) -> None:
    """Writes to stdout and flushes. Raises OSError that names stdout, BrokenPipeError if its reader has left."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"stdout: {error.strerror or error}; redirect it to a file or a pipe to receive the result") from None


def interrupted_status(result: RunResult) -> int:
    """Exit status of a training that a signal stopped, from its result: 128 + the signal's number."""
    assert result["signal"] is not None
    return 128 + signal.Signals[result["signal"]].value


def bench_status(result: dict[str, Any], failed: bool) -> int:
    """Exit status of a benchmark from its result: 1 if something of ours `failed`; where a signal ended the measuring early,
    128 + its number, and a line that says so."""
    if result["interrupted"] is None:
        return int(failed)
    say(f"stopped by {result['interrupted']}: the result has only the sizes measured so far")
    return 128 + signal.Signals[result["interrupted"]].value


def read_text(path: str) -> str:
    """The text of a UTF-8 file, or of stdin for "-", without the byte-order mark that some editors add."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give an existing one, or - for stdin") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); give a readable text file") from None
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} ({raw[error.start]:#04x}) is not UTF-8; convert the text first"
        ) from None
