"""Byte-level tokenizers: plain bytes (no training), or byte-pair merges trained on text. Both are lossless.

Text is normalised to NFC and cut into pieces (see pre_split.py); merges never cross a piece.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, filterfalse
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from factorization_memory._files import explain_unreadable, parse_json, write_atomic
from factorization_memory.data.pre_split import CHUNK, PRE_SPLIT, cut_into_blocks

DOCUMENT_END = "</s>"
PADDING = "<pad>"

# A Japanese character is three bytes: tokens of at most eight, the length of its runs in PRE_SPLIT.
_MAX_TOKEN_BYTES = 24

_CACHED_CHARACTERS = 1 << 22  # about 700,000 chunks and 100 MB of memory
_JOINED_CHUNKS = 1000
_TRAINING_BLOCK, _ENCODING_BLOCK = 1 << 10, 1 << 20  # characters


class TokenizerError(ValueError):
    """An invalid tokenizer file, text that cannot be encoded, or a vocabulary that cannot be trained."""


LARGEST_VOCABULARY = 1 << 22


class Tokenizer:
    """A byte-level tokenizer, given by the text of its `tokenizer.json` (a `tokenizers` definition).

    Attributes: `vocab_size` (ids are 0 to vocab_size - 1), `document_end` and `padding` (ids of the only two special tokens),
    `token_bytes` (the exact bytes of each id; empty for the special ones) and `fingerprint` (sha256 of the definition).
    """

    def __init__(self, definition: str) -> None:
        try:
            self._definition = _canonical(_as_first_written(parse_json(definition)))
            self._backend = tokenizers.Tokenizer.from_str(self._definition)
            parts = json.loads(self._backend.to_str())
        except TokenizerError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"not a tokenizer definition: {error}") from error
        expected = json.loads(_new_backend(models.BPE()).to_str())
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if parts[part] != expected[part]:
                raise TokenizerError(f"its {part} is not this package's; train one with `fmem data tokenizer`")
        document_end, padding = (self._backend.token_to_id(token) for token in (DOCUMENT_END, PADDING))
        if document_end is None or padding is None:
            raise TokenizerError(f"it has no special token {DOCUMENT_END} or {PADDING}; train one with `fmem data tokenizer`")
        self.document_end: int = document_end
        self.padding: int = padding
        self.vocab_size: int = self._backend.get_vocab_size()
        self.fingerprint: str = hashlib.sha256(self._definition.encode()).hexdigest()
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        token_of = {i: token for token, i in self._backend.get_vocab().items()}
        self.token_bytes: list[bytes] = [
            b"" if i in (document_end, padding) else bytes(byte_of[c] for c in token_of[i]) for i in range(self.vocab_size)
        ]
        # Text is normalized here, before it is cut into chunks, with a single version of Unicode.
        self._backend.normalizer = None
        self._backend.encode_special_tokens = True  # "</s>" in a text is four characters, never the special token
        self._newline = self.token_bytes.index(b"\n")
        self._cache: dict[str, bytes] = {}
        self._cached_characters = 0

    @classmethod
    def bytes_level(cls) -> Tokenizer:
        """The tokenizer whose ids 0 to 255 are the bytes themselves; 258 ids with the special tokens."""
        backend = _new_backend(models.BPE(vocab={c: byte for byte, c in enumerate(_byte_characters())}, merges=[]))
        backend.add_special_tokens([DOCUMENT_END, PADDING])
        return cls(backend.to_str())

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-pair merges trained on `documents`, up to `vocab_size` ids (a small text may give fewer).

        Raises `TokenizerError` for a `vocab_size` below the 258 of bytes and special tokens, or if there is no text.
        """
        if vocab_size < 258:
            raise TokenizerError(f"vocab_size={vocab_size}: use 258 (256 bytes and 2 special tokens) or more")
        if vocab_size > LARGEST_VOCABULARY:  # the trainer preallocates, and aborts without memory
            raise TokenizerError(f"vocab_size={vocab_size}: use {LARGEST_VOCABULARY:,} or fewer")
        backend = _new_backend(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[DOCUMENT_END, PADDING],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=_MAX_TOKEN_BYTES,
            show_progress=False,
        )
        # The library trains on its inputs in parallel, one per thread: split long documents into blocks. Short ones, as its
        # time is quadratic in the length of the longest word.
        blocks = chain.from_iterable(cut_into_blocks(text, _TRAINING_BLOCK) for text in documents)
        first = next(blocks, None)
        if first is None:
            raise TokenizerError("no text to train a tokenizer on")
        backend.train_from_iterator(chain([first], blocks), trainer)
        return cls(backend.to_str())

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Loads a tokenizer written by `save`. Raises `TokenizerError` naming the file, or `UnreadableError`."""
        try:
            with explain_unreadable(path):
                definition = Path(path).read_text(encoding="utf-8")
            return cls(definition)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise TokenizerError(f"{path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}: not a tokenizer definition: not UTF-8") from error
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Writes `tokenizer.json` atomically; the Hugging Face `tokenizers` library can read it too."""
        write_atomic(Path(path), self._definition)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` (after NFC), without `document_end`. Raises `TokenizerError` for lone surrogates."""
        return [i for block in self.encode_blocks(text) for i in block.tolist()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_blocks(self, text: str) -> Iterator[np.ndarray]:
        """Token ids of `text` as uint32 arrays to concatenate: bounded memory for a text of any length."""
        for block in cut_into_blocks(unicodedata.normalize("NFC", text), _ENCODING_BLOCK):
            chunks = CHUNK.findall(block)
            new = set(filterfalse(self._cache.__contains__, chunks))
            if new:
                self._cache.update(self._encode_chunks(new))
                self._cached_characters += sum(map(len, new))
            yield np.frombuffer(b"".join(map(self._cache.__getitem__, chunks)), dtype=np.uint32)
            if self._cached_characters > _CACHED_CHARACTERS:
                self._cache, self._cached_characters = {}, 0

    def _encode_chunks(self, chunks: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each chunk with its ids as the bytes of a uint32 array."""
        # The library takes 20 microseconds per call or list entry, however short, so most chunks are joined by newlines:
        # between chunks that neither contain one nor start with a character that merges with it, a newline is a separate
        # token.
        joined: list[str] = []
        alone: list[str] = []
        for chunk in chunks:
            (alone if "\n" in chunk or chunk[0] == "\u3000" else joined).append(chunk)
        groups = [joined[i : i + _JOINED_CHUNKS] for i in range(0, len(joined), _JOINED_CHUNKS)]
        texts = ["\n".join(group) for group in groups]
        try:
            encodings = self._backend.encode_batch_fast(texts + alone, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizerError("the text contains lone surrogates, which are not characters; remove them") from error
        for group, encoding in zip(groups, encodings[: len(groups)], strict=True):
            ids = np.array(encoding.ids, dtype=np.uint32)
            data = ids.tobytes()
            ends = [*(np.flatnonzero(ids == self._newline) * 4).tolist(), len(data)]
            start = 0
            for chunk, end in zip(group, ends, strict=True):
                yield chunk, data[start:end]
                start = end + 4
        for chunk, encoding in zip(alone, encodings[len(groups) :], strict=True):
            yield chunk, np.array(encoding.ids, dtype=np.uint32).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are dropped, invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time."""
        return TextStream(self.token_bytes)


class TextStream:
    """Decodes ids one by one. A character can span tokens: only whole ones are returned. Bytes that cannot start or continue a
    character become U+FFFD."""

    def __init__(self, token_bytes: list[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, "" if none."""
        return self._decoder.decode(self._token_bytes[token])

    def flush(self) -> str:
        """The rest at the end: "" or U+FFFD for an incomplete character. Generated text leaves it out: the model did not
        choose that character."""
        return self._decoder.decode(b"", final=True)


def _new_backend(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PRE_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _as_first_written(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition without what `transformers` adds when it saves a tokenizer: padding, truncation, and a template that adds
    no tokens. Changes that would affect the ids are refused."""
    template = definition.get("post_processor")
    if template is not None:
        single = template.get("single") if template.get("type") == "TemplateProcessing" else None
        if single is None or [list(piece) for piece in single] != [["Sequence"]]:
            raise TokenizerError("its post_processor adds tokens to a text; train one with `fmem data tokenizer`")
    if definition.get("model", {}).get("dropout"):
        raise TokenizerError("its merges drop out at random, which is not supported; set model.dropout to null")
    for token in definition.get("added_tokens", []):
        if token.get("content") not in (DOCUMENT_END, PADDING):
            raise TokenizerError(
                f"the token {token.get('content')!r} was added to it; train one without it, with `fmem data tokenizer`"
            )
    return definition | {"padding": None, "truncation": None, "post_processor": None}


def _canonical(definition: object) -> str:
    return json.dumps(definition, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _byte_characters() -> list[str]:
    """The character for each byte in a byte-level vocabulary: the byte itself if printable, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in visible)
    moved = {byte: 0x100 + i for i, byte in enumerate(hidden)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]
