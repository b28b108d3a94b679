"""What the verbs share: parsing, the console, results."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from factorization_memory._files import write_atomic
from factorization_memory._text import visible
from factorization_memory.config import ConfigError, suggestion

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from factorization_memory.config import RunConfig
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel

T = TypeVar("T")


def parse(options: type[T], arguments: list[str], verb: str, default: T | None = None) -> T:
    """The options of `fmem VERB` as an instance of the dataclass `options`; usage errors exit with status 2."""
    extra: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(options, prog=f"fmem {verb}", args=arguments, **extra)


def choose(name: str, known: dict[str, Any], what: str) -> Any:
    """`known[name]`, or a usage error that names the nearest."""
    if name not in known:
        raise ConfigError(f"{what} {name!r} is not known{suggestion(name, known)}")
    return known[name]


def at_least(options: Any, **bounds: int) -> None:
    """A usage error for the first of the named options that is set below its bound."""
    for name, least in bounds.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: use {least} or more")


def console() -> Console:
    """Where people read: stderr. What would steer the terminal is written out; names from data go through `plain`, as markup is
    read in what is printed."""
    from rich.console import Console

    class VisibleConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text, keep="\n\t"), **options)

    return VisibleConsole(stderr=True, highlight=False, emoji=False)


def plain(text: str) -> Text:
    """A name from data, for a line or a cell: it is shown as it is, nothing in it is markup."""
    from rich.text import Text

    return Text(visible(text))


def resolve(run: Path | None) -> tuple[Path | None, Path | None]:
    """The run folder, if `run` is one; and the folder to load, of a run its best checkpoint, None for the package's model."""
    from factorization_memory.training import find_checkpoint, list_checkpoints

    if run is None or not list_checkpoints(run):
        return None, run
    return run, find_checkpoint(run, "best")


def load(run: Path | None, device: str) -> tuple[LanguageModel, Tokenizer, RunConfig]:
    """The model that a verb was given, or else the one that comes with the package; `device` is its `--device`."""
    from factorization_memory.models.pretrained import builtin_model
    from factorization_memory.training import load_model, resolve_device

    if run is None:
        console().print("[dim]no model named: this is the one that comes with the package[/dim]")
    return load_model(builtin_model() if run is None else run, resolve_device(device, "--device"))


def say(message: str) -> None:
    """A line for people that holds paths: nothing in it is markup, and it is not broken."""
    console().print(message, markup=False, soft_wrap=True)


def emit(result: Any, as_json: bool) -> None:
    """With `--json`, the result as one line on stdout."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False), flush=True)


def interrupted_status(result: dict[str, Any]) -> int:
    """Exit status of a training that a signal stopped, from its result: 128 + the signal's number."""
    return 128 + signal.Signals[result["signal"]].value


def bench_status(result: dict[str, Any], failed: bool) -> int:
    """Exit status of a benchmark from its result: 1 if something of ours `failed`; where a signal ended the measuring early,
    128 + its number, and a line that says so."""
    if result["interrupted"] is None:
        return int(failed)
    say(f"stopped by {result['interrupted']}: the result holds the sizes that were measured until then")
    return 128 + signal.Signals[result["interrupted"]].value


def write_aside(path: Path, text: str) -> None:
    """Write a text file under another name and rename it, so that it is whole or not there."""
    write_atomic(path, text)


def read_text(path: str) -> str:
    """A UTF-8 file's text, or that of stdin for "-", without the byte order mark that some editors put before it."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; name one that is there, or - for stdin") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); name a readable text file") from None
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} ({raw[error.start]:#04x}) is not UTF-8; convert the text first"
        ) from None
