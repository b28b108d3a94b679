"""Tidies tyro's help: texts rewrapped to their box, optional values as people write them."""

from __future__ import annotations

import re
import textwrap

NO_COLUMNS = 80
"""Width of text where there is no box to go by."""


def tidy(text: str) -> str:
    """`text` wrapped anew, in its boxes (where tyro keeps the line breaks of docstrings) and above them, and `none` in the
    place of `None`."""
    lines = text.split("\n")
    width = max((len(line) for line in lines if line.startswith("╭")), default=NO_COLUMNS)
    tidied: list[str] = []
    rows: list[str] = []
    for line in lines:
        if line.startswith("│"):
            rows.append(line)
            continue
        tidied += _box(rows)
        rows = []
        if line.startswith(("usage:", " ", "╭", "╰")):
            tidied.append(_names(line))
        else:
            tidied += textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join(tidied)


def without_boxes(text: str) -> str:
    """`text` with its boxes drawn in ASCII."""
    return text.translate(str.maketrans("│╭╮╰╯─•", "|++++-*"))


def _box(rows: list[str]) -> list[str]:
    """The rows of a box, each "│ ... │", rewrapped; unchanged if there is no column of texts."""
    contents = [row[2:-2] for row in rows]
    column = _column(contents)
    if column is None:
        return rows
    width = len(contents[0])
    entries: list[tuple[str, list[str]]] = []
    for content in contents:
        flag, words = content[:column].strip(), content[column:].split()
        if content[:1].strip():
            if content[column - 1 : column].strip():  # a flag that is as long as its row
                flag, words = content.strip(), []
            entries.append((_names(flag), words))
        elif entries:
            entries[-1][1].extend(words)
    lines: list[str] = []
    for flag, words in entries:
        said = " ".join(words).replace("(default: None)", "(default: none)")
        wrapped = textwrap.wrap(said, width - column, break_long_words=False, break_on_hyphens=False) or [""]
        if len(flag) < column - 1:
            lines.append(f"{flag:<{column}}{wrapped.pop(0)}")
        else:
            lines.append(flag)
        lines += [" " * column + part for part in wrapped if part]
    return [f"│ {line:<{width}} │" for line in lines]


def _column(contents: list[str]) -> int | None:
    """Column of the texts of a box, i.e. of its continuation lines. None in a list of verbs."""
    if any("•" in content for content in contents):
        return None
    indents = {len(content) - len(content.lstrip()) for content in contents if content.strip() and not content[0].strip()}
    if len(indents) == 1:
        return indents.pop()
    starts = {match.end() for content in contents if (match := re.match(r"\S+(?: \S+)*  +", content))}
    return starts.pop() if not indents and len(starts) == 1 else None


def _names(flags: str) -> str:
    """`{None}|INT` as `INT|none`, or as `INT` in the brackets of an optional argument."""
    flags = re.sub(r"\[\{None\}\|([^\]\s]+)\]", r"[\1]", flags)
    return re.sub(r"\{None\}\|(\S+)", r"\1|none", flags)
