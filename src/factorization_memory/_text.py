"""Names and other foreign text made safe to show: on terminals, in figures and on pages. Standard library only."""

from __future__ import annotations

import unicodedata

# Zero-width joiner and non-joiner make up letters of several scripts; all else of these kinds has no look of its own, and some
# of it (ESC, U+202E) changes how what stands around it looks.
_JOINERS = "\u200c\u200d"
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str, keep: str = "") -> str:
    """`text` with what has no look of its own written out: control characters, marks of direction, line separators, lone
    surrogates become `\\x1b`, `\\u202e` and the like. Characters of `keep` stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(character)[1:-1]
        if unicodedata.category(character) in _UNSEEN and character not in _JOINERS and character not in keep
        else character
        for character in text
    )


def markdown_cell(text: str) -> str:
    """`text` as it is, in a cell of a Markdown table: nothing in it is markup, a formula or HTML, or ends the cell."""
    return "".join(f"\\{character}" if character in "\\`*[]|$~<>&" else character for character in visible(text))
