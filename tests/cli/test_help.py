"""Help pages: whole within 80 columns, and in the words of the docstrings."""

from __future__ import annotations

import pytest

from factorization_memory.cli import dispatch
from factorization_memory.cli.help import tidy

VERBS = ["data pack", "data fetch", "train tiny", "compare", "evaluate", "generate", "inspect", "bench op", "bench", "export"]

RAW = """\
usage: fmem verb [-h] [OPTIONS] [{None}|PATH]

What the verb does, in one sentence that is so long that nobody would leave it in one line of a terminal.

╭─ options ──────────────────────────────╮
│ -h, --help    show this help message   │
│               and exit                 │
│ --steps {None}|INT                     │
│               Steps of it; by default  │
│               as many as               │
│               there are. (default:     │
│               None)                    │
╰────────────────────────────────────────╯
"""
TIDY = """\
usage: fmem verb [-h] [OPTIONS] [PATH]

What the verb does, in one sentence that
is so long that nobody would leave it in
one line of a terminal.

╭─ options ──────────────────────────────╮
│ -h, --help    show this help message   │
│               and exit                 │
│ --steps INT|none                       │
│               Steps of it; by default  │
│               as many as there are.    │
│               (default: none)          │
╰────────────────────────────────────────╯
"""


def test_wrapped_anew() -> None:
    assert tidy(RAW) == tidy(TIDY) == TIDY


def test_a_box_without_a_column_of_texts_stays() -> None:
    box = "╭─ subcommands ─╮\n│ (required)    │\n│   • op        │\n│   • training  │\n╰───────────────╯\n"
    assert tidy(box) == box


@pytest.mark.parametrize("verb", VERBS)
def test_pages(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        dispatch([*verb.split(), "--help"])
    page = capsys.readouterr().out
    assert page.startswith(f"usage: fmem {verb}")
    assert max(map(len, page.split("\n"))) <= 80
    assert "{None}" not in page
    assert "default: None" not in page
    assert "show this help message and exit" in page
