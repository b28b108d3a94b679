"""Decoding UTF-8, with advice for text that is in another encoding."""

from __future__ import annotations

import codecs
from pathlib import Path

from factorization_memory.data.errors import CorpusError

_SEEN_BYTES = 1 << 18
"""How much of a text is examined."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_JAPANESE = {"EUC-JP": "euc_jp", "SHIFT_JIS": "cp932", "UTF-16LE": "utf-16-le", "UTF-16BE": "utf-16-be"}
"""Names of encodings: `iconv`'s to Python's."""


def decode(data: bytes, path: Path, place: str = "", offset: int = 0) -> str:
    """The text in UTF-8 `data` of `path`, without a byte-order mark; `offset` bytes of its file, named `place`, precede it.

    Raises `CorpusError` for what is not UTF-8.
    """
    if is_wide(data):
        raise CorpusError(f"{place or path}: not UTF-8, as about every other byte is zero; {conversion(data)}")
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")  # a byte-order mark is not part of the text
    except UnicodeDecodeError as error:
        # error.start does not count the byte-order mark; error.object is the data after it
        start = offset + error.start + len(data) - len(error.object)
        raise CorpusError(
            f"{place or path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {start}; {conversion(data)}"
        ) from error


def is_wide(data: bytes) -> bool:
    """Whether text looks like UTF-16 or UTF-32: ASCII in these has at least every other byte zero, which is valid UTF-8."""
    seen = data[:_SEEN_BYTES]
    return seen.count(0) > len(seen) // 4


def conversion(data: bytes) -> str:
    """How to convert text that is not UTF-8."""
    found = _encoding(data[:_SEEN_BYTES])
    if found is None:
        return "convert it to UTF-8 from its encoding, for example with `iconv -f WINDOWS-1252 -t UTF-8`"
    return f"it looks like {found}; convert it, for example with `iconv -f {found} -t UTF-8`"


def _encoding(data: bytes) -> str | None:
    """Guesses the encoding from the start of a text, by byte-order mark, zero bytes or kana; None if unclear."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    if is_wide(data):
        return "UTF-16BE" if data[::2].count(0) > data[1::2].count(0) else "UTF-16LE"
    for name, codec in _JAPANESE.items():
        try:
            # The last character may be cut.
            text = codecs.getincrementaldecoder(codec)().decode(data)
        except UnicodeDecodeError:
            continue
        foreign = [character for character in text if character > "\x7f"]
        if sum("ぁ" <= character <= "ヶ" for character in foreign) > len(foreign) / 4:
            return name
    return None
