"""Shared style of the package's HTML pages: one column of text, light and dark mode, self-contained."""

from __future__ import annotations

from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --card: #ffffff; --ink: #1d2127; --soft: #59616c; --faint: #8a929c; --line: #e3e4e0; --accent: #2257c4;
  --first: #2257c4; --second: #c2541d; --third: #1f8a5b; --fourth: #8a4fc4; --good: #1f7a4d; --bad: #b3261e;
  --state-lightness: 0.80; --state-chroma: 0.12;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Hiragino Sans", "Yu Gothic UI",
    "Noto Sans CJK JP", "Noto Sans JP", sans-serif;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Georgia, "Hiragino Mincho ProN", "Yu Mincho",
    "Noto Serif CJK JP", "Noto Serif JP", serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", "JetBrains Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1b1e24; --ink: #e6e8eb; --soft: #a2aab5; --faint: #737c88; --line: #2d323a; --accent: #8fb4ff;
    --first: #7da7ff; --second: #f0955e; --third: #5cc796; --fourth: #c29af0; --good: #5cc796; --bad: #ff8a80;
    --state-lightness: 0.50; --state-chroma: 0.11;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 var(--sans); -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.25rem; line-height: 1.3; letter-spacing: -0.01em; margin: 3.5rem 0 .4rem; }
p { margin: .4rem 0 1rem; }
.note { color: var(--soft); max-width: 46rem; }
code, pre { font-family: var(--mono); font-size: .875em; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """A complete HTML document around `body`, which is HTML; `title` is text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
