"""Where text is cut before its bytes are merged.

Text is cut into pieces by runs of one script; merges never cross a piece. Without word spaces a Japanese sentence would be one
"word", which makes training superlinear and tokens whole phrases, hence the cut by script. Whole pieces make up chunks, whose
token ids can be looked up, and whole chunks make up blocks, in which a long text is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}ーｰﾞﾟ〆〱-〵"  # with the letters that Unicode counts as common to several scripts
_LETTER = rf"[[^\P{{L}}{_CJK}]\p{{M}}]"
PRE_SPLIT = "|".join(
    (
        rf"['’](?i:s|t|re|ve|m|ll|d)(?!{_LETTER})",
        rf" ?{_LETTER}+",
        r"[\p{Han}〆]{1,8}",
        r"[\p{Hiragana}ー〱-〵]{1,8}",
        r"[\p{Katakana}ーｰﾞﾟ]+",
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",
        r"\n+　*",  # a Japanese paragraph starts with a full-width space
        r"[^\S\n]+(?!\S)",  # leaves the last space to the word that follows
        r"[^\S\n]+",
    )
)

# Chunks: stretches of text whose concatenated encodings are the encoding of the whole, because PRE_SPLIT cuts at every
# chunk's end whatever the context. Chunks recur in natural text, so most are encoded once and then looked up, several times
# faster than encoding everything. The classes are deliberately small subsets of those above: a cut is made only between
# characters known to be in different classes, in every version of Unicode.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_HAN, _HIRAGANA, _KATAKANA, _MARK = "一-龥々〇", "ぁ-んゝゞ", "ァ-ヶ", "、。「」『』（）！？…"
CHUNK = re.compile(
    "|".join(
        (
            rf" ?[^{_SPACE}{_HAN}{_HIRAGANA}{_KATAKANA}{_MARK}ー]++(?=[{_SPACE}]|\Z)",
            rf"[{_HAN}]++(?=[{_HIRAGANA}{_KATAKANA}{_MARK}{_SPACE}]|\Z)",
            rf"[{_HIRAGANA}][{_HIRAGANA}ー]*+(?=[{_HAN}{_KATAKANA}{_MARK}{_SPACE}]|\Z)",
            rf"[{_KATAKANA}][{_KATAKANA}ー]*+(?=[{_HAN}{_HIRAGANA}{_MARK}{_SPACE}]|\Z)",
            rf"[{_MARK}]++(?=[{_HAN}{_HIRAGANA}{_KATAKANA}{_SPACE}]|\Z)",
            rf"[{_SPACE}]*\n\u3000*+(?![{_SPACE}])",
            rf"[{_SPACE}]*+[^{_SPACE}]+?(?:(?<=[{_MARK}])(?=[{_HAN}{_HIRAGANA}{_KATAKANA}])|(?=[{_SPACE}])|\Z)",
            rf"[{_SPACE}]++",
        )
    )
)
# Where a chunk ends whatever stands around it: before spaces, and after a mark that a Japanese character follows. Where a long
# text has none of these, it is cut where the pre-split at least cuts: between letters, digits and signs of ASCII.
_CHUNK_END = re.compile(rf"(?<=[^{_SPACE}])(?=[{_SPACE}])|(?<=[{_MARK}])(?=[{_HAN}{_HIRAGANA}{_KATAKANA}])")
_PIECE_END = re.compile(r"(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])|(?<=[A-Za-z0-9])(?=[!-/:-@\[-`{-~])")


def cut_into_blocks(text: str, size: int) -> Iterator[str]:
    """`text` in stretches of `size` to 2 * `size` characters, cut where the pre-split cuts it too.

    A longer word (of one script, without spaces) is cut anywhere: training time is quadratic in the length of a word, and the
    memory of encoding is proportional to it.
    """
    start = 0
    while len(text) - start > 2 * size:
        window = start + size, start + 2 * size
        found = _CHUNK_END.search(text, *window) or _PIECE_END.search(text, *window)
        end = found.start() if found else start + 2 * size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
