"""Text for people: names and other untrusted text made safe to display on terminals, in figures and on pages; durations.
Standard library only."""

from __future__ import annotations

import unicodedata

# Zero-width joiner and non-joiner make up letters of several scripts; all else of these kinds has no look of its own, and some
# of it (ESC, U+202E) changes how what stands around it looks.
_JOINERS = "\u200c\u200d"
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str, keep: str = "") -> str:
    """`text` with invisible characters escaped: control characters, direction marks, line separators and lone surrogates
    become `\\x1b`, `\\u202e` and the like. Characters in `keep` are kept."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(character)[1:-1]
        if unicodedata.category(character) in _UNSEEN and character not in _JOINERS and character not in keep
        else character
        for character in text
    )


def markdown_cell(text: str) -> str:
    """Escapes `text` for a cell of a Markdown table: nothing in it acts as markup, a formula or HTML, or ends the cell."""
    return "".join(f"\\{character}" if character in "\\`*[]|$~<>&" else character for character in visible(text))


def clock(seconds: float) -> str:
    """A time as h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def short(number: float) -> str:
    """A number with three digits and an SI prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
