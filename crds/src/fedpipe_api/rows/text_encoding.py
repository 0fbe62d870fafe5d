# SPDX-License-Identifier: Apache-2.0
"""Lines of text files in the encodings that people have: Unicode, and for CSV those before it."""

import io
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ..base import UserError

LINE_LIMIT = 2**26
"""Bytes (characters of UTF-16 and UTF-32) of the longest line."""
_MARGIN = 0.1
"""By how much an encoding's text must be more like a language's than others' to be believed."""
_SAMPLE = 2**16
"""Bytes by which an encoding is guessed."""
# The guess is among these: a few words look like text in many a forgotten encoding.
_GUESSED = ["cp1252", "cp1250", "cp1251", "cp932", "gb18030", "big5", "euc_kr"]


def encoding_of(file: io.BufferedReader, encoding: str | None = None) -> str:
    """Return the given encoding, else that of Unicode by the byte order mark or zero bytes of the start."""
    return encoding or json.detect_encoding(file.peek(4)[:4])


class Lines:
    """Iterates over lines with their ends; a carriage return alone ends one too.

    `number` is that of the latest line, from 1. `fault` says what of the lines since it was last cleared
    could not be decoded, in whose place stands U+FFFD. `guessed` is the encoding that was found where the
    text is not Unicode.
    """

    def __init__(
        self, path: Path, file: io.BufferedReader, encoding: str | None = None, *, guess: bool = False
    ):
        """Read lines of the file; `guess` the encoding where none is given and it is not Unicode."""
        self._path = path
        self._file = file
        self._encoding = encoding
        self._guess = guess
        self._unicode = False
        self.number = 0
        self.fault: str | None = None
        self.guessed: str | None = None

    def __iter__(self) -> Iterator[str]:
        encoding = encoding_of(self._file, self._encoding)
        yield from self._wide(encoding) if encoding[4:6] in ("16", "32") else self._bytes(encoding)

    def _wide(self, encoding: str) -> Iterator[str]:
        with io.TextIOWrapper(self._file, encoding, newline="") as text:
            while True:
                try:
                    line = text.readline(LINE_LIMIT + 1)
                except UnicodeError:
                    what = f"{self._path}: not {encoding.upper()} after line {self.number}"
                    raise UserError(f"{what}; save the file as UTF-8") from None
                if not line:
                    return
                self._check(len(line))
                self.number += 1
                yield line

    def _bytes(self, encoding: str) -> Iterator[str]:
        lines = self._raw()
        for raw in lines:
            self.number += 1
            try:
                text = raw.decode(encoding)
                self._unicode = self._unicode or not raw.isascii()
            except UnicodeDecodeError as error:
                if self._guess and not self._unicode and not (self._encoding or self.guessed):
                    sample = list(_first(lines))
                    self.guessed = _guessed(b"".join([raw, *sample]))
                    lines = chain(sample, lines)
                text = raw.decode(self.guessed or encoding, errors="replace")
                if self.guessed is None or "\ufffd" in text:
                    self.fault = self.fault or self._not(encoding, error.start)
            else:
                if self.guessed and not raw.isascii():
                    self.fault = self.fault or "its text is UTF-8, unlike that of earlier lines"
            encoding = "utf-8" if encoding == "utf-8-sig" else encoding
            yield text

    def _not(self, encoding: str, start: int) -> str:
        fault = f"byte {start + 1} is not {encoding.upper().removesuffix('-SIG')}"
        return fault if self._encoding else f"{fault}, see spec.data.encoding"

    def _raw(self) -> Iterator[bytes]:
        while some := self._file.readline(LINE_LIMIT + 1):
            self._check(len(some))
            yield from some.splitlines(keepends=True)

    def _check(self, length: int) -> None:
        if length > LINE_LIMIT:
            what = f"{self._path}:{self.number + 1}: the line is longer than {LINE_LIMIT >> 20} MiB"
            raise UserError(f"{what}; write one row per line")


def _first(lines: Iterator[bytes]) -> Iterator[bytes]:
    size = 0
    for line in lines:
        yield line
        size += len(line)
        if size > _SAMPLE:
            return


def _guessed(sample: bytes) -> str | None:
    """Return the encoding of a text; None where no or more than one is likely."""
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return None
    # Fewer disorders first, then more of some language's letters; those that give the same text are one.
    matches = sorted(
        from_bytes(sample, cp_isolation=_GUESSED), key=lambda match: (match.chaos, -match.coherence)
    )
    if not matches:
        return None
    best, others = matches[0], matches[1:]
    if any(other.chaos <= best.chaos and other.coherence > best.coherence - _MARGIN for other in others):
        return None
    return best.encoding
