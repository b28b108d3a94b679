"""Reading JSON, from files and text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factorization_memory._files.errors import explain_unreadable

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

MAX_DEPTH = 500
"""Maximum nesting depth of JSON that is read. From Python 3.12 on, `json` itself reads deeper nesting than it can write."""


class JSONError(ValueError):
    """Text that is not JSON, or that our writers do not accept; the message is the `place`, if known, and the `reason`."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(f"{place}: {reason}" if place else reason)
        self.reason = reason


class JSONSyntaxError(JSONError):
    """Text that is not JSON, perhaps because it is truncated."""


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises `JSONError`, whose message begins with the path, for a damaged file, FileNotFoundError for one that is not there, and
    `UnreadableError`.
    """
    with explain_unreadable(path):
        data = Path(path).read_bytes()
    try:
        return parse_json(data)
    except JSONError as error:
        raise type(error)(error.reason, str(path)) from None


def read_json_or_none(path: Path) -> Any:
    """The value in a JSON file; None if there is no such file or it is truncated."""
    try:
        return read_json(path)
    except (FileNotFoundError, JSONError):
        return None


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a log with one per line, none if there is no such file; truncated lines are skipped.

    Raises `JSONError`, naming the file and the line, for one that is JSON and yet no object that can be read, and
    `UnreadableError`.
    """
    try:
        with explain_unreadable(path), open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    values = parse_json(line.decode("utf-8", errors="replace"))
                except JSONSyntaxError:
                    continue
                except JSONError as error:
                    raise JSONError(f"{error}; remove that line", f"{path}, line {number}") from None
                if not isinstance(values, dict):
                    raise JSONError(
                        f"expected an object, got a {type(values).__name__}; remove that line", f"{path}, line {number}"
                    )
                yield values
    except FileNotFoundError:
        return


def parse_json(data: str | bytes, *, any_text: bool = False) -> Any:
    """Parses JSON text (bytes: UTF-8).

    Raises `JSONError` for what is not JSON, for nesting and numbers beyond what Python reads, and (unless `any_text`) for lone
    surrogates, which no UTF-8 file can hold.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
            raise RecursionError
        if not any_text and isinstance(data, str):
            text.encode("utf-8")
        if not any_text and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise JSONSyntaxError(f"not JSON ({error.msg} at character {error.pos})") from None
    except UnicodeDecodeError as error:
        raise JSONError(f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from None
    except UnicodeEncodeError as error:
        raise JSONError(
            f"contains the lone surrogate U+{ord(error.object[error.start]):04X}, which is not a character"
        ) from None
    except RecursionError:
        raise JSONError("JSON nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise JSONError(f"unreadable JSON ({error})") from None
    return value


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (list, dict))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
