"""Foreign text is shown as it is, and does nothing."""

from __future__ import annotations

import pytest

from factorization_memory._text import clock, markdown_cell, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [/red] $x_{", "plain [/red] $x_{"),
        ("日本 é 👨‍👩‍👧 می‌خواهم \u3000", "日本 é 👨‍👩‍👧 می‌خواهم \u3000"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\u202eb\u2066c\ufeff", "a\\u202eb\\u2066c\\ufeff"),
        ("a\r\nb\tc\x7f\x9b", "a\\r\\nb\\tc\\x7f\\x9b"),
        ("a\u2028b\ud800", "a\\u2028b\\ud800"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_visible_keeps_what_it_is_told_to() -> None:
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_markdown_cell() -> None:
    assert markdown_cell("a|b <i>`*[x](y) $z$ &\n_") == r"a\|b \<i\>\`\*\[x\](y) \$z\$ \&\\n_"


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
