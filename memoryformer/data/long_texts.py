"""Texts too long to be held: they lie in temporary files, which end with the object.

A line of JSON that is longer than `LONG` is never whole in memory. Its strings are read from it
piece by piece, and a long one becomes a `LongText`, which is read the same way. The temporary
files are in the system's folder for them ($TMPDIR). Start at `value` and `pieces`.
"""

import codecs
import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

LONG = 16 << 20  # bytes of a line
_PIECE = 1 << 20  # characters that are held together

# Inside of a string of JSON, up to the quote that ends it.
_INSIDE = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
# Whole escapes: \uD83D\uDE00 is one, so a first half waits for what follows it.
_WHOLE = re.compile(
    r"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])[^\\]{4}"
    r"|\\u[dD][89abAB][^\\]{2}(?:\\u[dD][c-fC-F][^\\]{2}|(?=.{6})))*+",
    re.DOTALL,
)
_ESCAPE = 12  # characters of the longest


class LongText:
    """A text in a temporary file. is_text: no half of a surrogate pair is alone in it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._chars = 0
        self.is_text = True

    def append(self, piece: str) -> None:
        """Add to the end."""
        try:
            content = piece.encode("utf-8")
        except UnicodeEncodeError:
            content = piece.encode("utf-8", "replace")
            self.is_text = False
        self._file.write(content)
        self._chars += len(piece)

    def __del__(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Characters."""
        return self._chars

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces of about a megabyte."""
        self._file.seek(0)
        return decoded(self._file)


Text = str | LongText


def decoded(file: IO[bytes]) -> Iterator[str]:
    """Yield UTF-8 from a file in pieces of about a megabyte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    while block := file.read(_PIECE):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def pieces(text: Text) -> Iterator[str]:
    """Yield a text in pieces of about a megabyte; they joined are the text."""
    if isinstance(text, LongText):
        yield from text.pieces()
        return
    for start in range(0, len(text), _PIECE):
        yield text[start : start + _PIECE]


def sha256(text: Text) -> bytes:
    """The digest of a text in UTF-8."""
    digest = hashlib.sha256()
    for piece in pieces(text):
        digest.update(piece.encode("utf-8"))
    return digest.digest()


def num_bytes(text: Text) -> int:
    """The length of a text in UTF-8."""
    return sum(len(piece.encode("utf-8")) for piece in pieces(text))


def holds(text: Text, mark: str) -> bool:
    """Whether `mark` is in a text."""
    edge = ""
    for piece in pieces(text):
        if mark in edge + piece:
            return True
        edge = (edge + piece)[-len(mark) + 1 :]
    return False


def head(text: Text, size: int) -> bytes:
    """The first `size` bytes of a text in UTF-8."""
    content = b""
    for piece in pieces(text):
        content += piece[:size].encode("utf-8")
        if len(content) >= size:
            break
    return content[:size]


def value(parts: Iterable[str], size: int = _PIECE) -> Any:
    """What JSON that comes in parts says; strings longer than `size` are `LongText`.

    Raises what `json.loads` does.
    """
    scan = _Scan(size)
    for part in parts:
        scan.add(part)
    return scan.value()


class _Scan:
    """Takes the long strings out of JSON, and leaves a name in the place of each."""

    def __init__(self, size: int):
        self._size = size
        self._prefix = secrets.token_hex(16)  # no string of the file is this
        self._short: list[str] = []  # the JSON without its long strings
        self._literal = ""  # of the string in hand, escaped; without its quotes
        self._edge = ""  # may be half an escape
        self._inside = False
        self._text: LongText | None = None  # the beginning of that string
        self._long: dict[str, LongText] = {}

    def add(self, part: str) -> None:
        text, at = self._edge + part, 0
        self._edge = ""
        while at < len(text):
            if not self._inside:
                end = text.find('"', at)
                self._short.append(text[at : end if end >= 0 else len(text)])
                at = end + 1 if end >= 0 else len(text)
                self._inside = end >= 0
                continue
            match = _INSIDE.match(text, at)
            assert match  # it may be empty
            self._literal += match[0]
            at = match.end()
            if text[at : at + 1] == '"':
                self._close()
                at += 1
            else:
                self._edge, at = text[at:], len(text)
                if len(self._literal) > self._size:
                    self._spill(self._literal, whole=False)

    def value(self) -> Any:
        if self._inside:
            self._short.append(
                f'"{self._literal}{self._edge}'
            )  # json says what is wrong
        return self._restored(json.loads("".join(self._short)))

    def _close(self) -> None:
        self._inside = False
        if self._text is None and len(self._literal) <= self._size:
            self._short.append(f'"{self._literal}"')
            self._literal = ""
            return
        self._spill(self._literal, whole=True)
        assert self._text
        name = f"{self._prefix}{len(self._long)}"
        self._long[name] = self._text
        self._short.append(f'"{name}"')
        self._text = None

    def _spill(self, literal: str, whole: bool) -> None:
        self._text = self._text or LongText()
        end = len(literal)
        if not whole:
            match = _WHOLE.match(literal)
            assert match
            # What is longer than an escape is a bad one, and json says so.
            end = match.end() if end - match.end() <= _ESCAPE else end
        self._text.append(json.loads(f'"{literal[:end]}"'))
        self._literal = literal[end:]

    def _restored(self, found: Any) -> Any:
        if not self._long:
            return found
        if isinstance(found, dict):
            return {
                "".join(self._long[key].pieces()) if key in self._long else key: (
                    self._restored(inner)
                )
                for key, inner in found.items()
            }
        if isinstance(found, list):
            return [self._restored(inner) for inner in found]
        if isinstance(found, str):
            return self._long.get(found, found)
        return found
