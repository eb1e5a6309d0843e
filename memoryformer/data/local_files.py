"""Local files to documents: what each file of a corpus holds.

A document is a plain-text file, a part of one up to a separator, or one line of a
JSON-lines file. Plain text longer than `MAX_CHARS` is cut at line ends, so no text file
is ever held whole. Every fault of a file is a one-line `DataError` that names the file,
and the line.

Start at `read_documents`.
"""

import codecs
import dataclasses
import hashlib
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from memoryformer import errors
from memoryformer.data import blocks, jsonlines, long_texts, parquet
from memoryformer.data.listing import Files
from memoryformer.data.names import shown

MAX_CHARS = 1 << 20
SMALL_CORPUS = 256 << 20  # bytes up to which a fingerprint reads every file


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files become documents.

    text_field: of JSON lines.  separator: what ends a document of plain text ('': the end
    of its file).  piece_chars: where nothing else does, about its length.  share: of the
    documents of each file.  long: bytes of a JSON line above which it is not held.
    """

    text_field: str = "text"
    separator: str = ""
    piece_chars: int = MAX_CHARS
    share: jsonlines.Share = jsonlines.WHOLE
    long: int = 1 << 62


def read_documents(
    files: Iterable[tuple[str, blocks.File]], how: Reading
) -> Iterator[tuple[str, Any, int]]:
    """Yield (unique key, text, index of its file) for every document of `files`.

    A text is a `str`, or with `how.long` a `long_texts.Text`. Raises `DataError` naming file and line for anything unreadable.
    """
    for index, (key, path) in enumerate(files):
        if blocks.has_fields(path):
            texts: Iterator[tuple[int, long_texts.Text]]
            if blocks.is_parquet(path):
                texts = parquet.texts(path, how.text_field, how.share)
            else:
                texts = _json_texts(path, how)
            for line, text in texts:
                yield f"{key}:{line}", text, index
            continue
        if how.separator:
            documents = split(read_text(path), how.separator, MAX_CHARS)
        else:
            documents = cut(read_text(path), how.piece_chars)
        for number, text in enumerate(documents):
            if how.share.holds(number + 1):
                yield f"{key}#{number}" if number else key, text, index


def without_text(path: blocks.File, text_field: str) -> str:
    """'empty', 'binary' or 'other JSON' for a file that holds no document, else ''.

    It looks at the beginning only. A damaged file has ''; `read_documents` says what is
    wrong with it.
    """
    if path.stat().st_size == 0:
        return "empty"
    if blocks.has_fields(path):
        other = blocks.kind(path) == ".json"
        other = other and jsonlines.is_other_json(path, text_field)
        return "other JSON" if other else ""
    try:
        head = blocks.head(path)
    except Exception:  # of whatever kind its decompressor raises
        return ""
    return "binary" if b"\0" in head else "" if head else "empty"


def fingerprint(files: Files) -> str:
    """sha256 over keys and contents; over keys, sizes and times for a large corpus.

    It decides whether a prepared directory may be used again, nothing else: what a
    checkpoint records is the manifest's fingerprint, which is of contents only.
    """
    digest = hashlib.sha256()
    try:
        stats = [path.stat() for _, path in files]
        small = sum(stat.st_size for stat in stats) <= SMALL_CORPUS
        for (key, path), stat in zip(files, stats, strict=True):
            content = f"{stat.st_size} {stat.st_mtime_ns}"
            if small:
                with path.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{key}\0{content}\n".encode())
    except OSError as error:
        name = shown(error.filename or "a file")
        raise errors.DataError(f"{name}: cannot be read ({error.strerror}).") from error
    return digest.hexdigest()


def lone_text_piece(files: Files, validation_every: int) -> int:
    """Characters per document for a corpus that is one text file, else `MAX_CHARS`.

    A lone file would be a single document, with nothing to hold out; about five pieces
    of it go to validation instead.
    """
    if len(files) != 1 or blocks.has_fields(files[0][1]):
        return MAX_CHARS
    piece = files[0][1].stat().st_size // (5 * validation_every)
    return min(max(256, piece), MAX_CHARS)


def in_validation(key: str, every: int) -> bool:
    """Whether the document with this key is held out: sha256(key) mod every == 0."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % every == 0


def read_text(path: blocks.File) -> Iterator[str]:
    """Yield the text of a plain file in parts of about a megabyte; `DataError` if none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = num_lines = num_chars = 0  # before the block that is looked at
    for block in itertools.chain(blocks.read(path), [b""]):
        if not num_bytes and b"\0" in block[: blocks.HEAD]:
            raise errors.DataError(
                f"{shown(path)}: a binary file, not text; give data.path a glob that "
                "skips it."
            )
        held = len(decoder.getstate()[0])  # of a character that was cut
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = num_lines + error.object.count(b"\n", 0, error.start) + 1
            raise errors.DataError(
                f"{shown(path)}:{line}: not UTF-8 (byte "
                f"{num_bytes - held + error.start}); convert the file."
            ) from error
        num_bytes += len(block)
        num_lines += block.count(b"\n")
        num_chars += len(text)
        yield text
    if not num_chars:
        raise errors.DataError(f"{shown(path)}: the file is empty.")


def cut(
    parts: Iterable[str],
    size: int,
    end_of: Callable[[str, int, int], int] | None = None,
) -> Iterator[str]:
    """Cut a text that comes in parts into pieces of `size` characters and a little more.

    A piece ends at the first line end, else blank, else anywhere, in as many characters
    again, or where `end_of(text, start, size)` says; only the last may be shorter.
    """
    end_of = end_of or first_end
    held: list[str] = []
    length = 0
    for part in parts:
        held.append(part)
        length += len(part)
        if length <= 2 * size:  # the end of a piece may not be in sight
            continue
        text, start = "".join(held), 0
        while length - start > 2 * size:
            end = end_of(text, start + size, size)
            yield text[start:end]
            start = end
        held, length = [text[start:]], length - start
    text, start = "".join(held), 0
    while start < len(text):
        end = start + size
        end = end_of(text, end, size) if end < len(text) else len(text)
        yield text[start:end]
        start = end


def split(parts: Iterable[str], separator: str, size: int) -> Iterator[str]:
    """Split a text that comes in parts at a separator; line ends beside it belong to it.

    A line end of the separator is \\n or \\r\\n in the text. Documents far longer than
    `size` are cut as by `cut`; what is white space alone is left out.
    """
    numbered = _between(parts, separator)
    for _, of_document in itertools.groupby(numbered, operator.itemgetter(0)):
        pieces = cut((part for _, part in of_document), size)
        held = next(pieces, "").lstrip("\r\n")
        for piece in pieces:
            if held.strip():
                yield held
            held = piece
        held = held.rstrip("\r\n")
        if held.strip():
            yield held


def _between(parts: Iterable[str], separator: str) -> Iterator[tuple[int, str]]:
    """Yield (number of the document, a part of it), nothing held but one part."""
    lines = separator.replace("\r\n", "\n").split("\n")
    pattern = re.compile(r"\r?\n".join(map(re.escape, lines)))
    longest = sum(map(len, lines)) + 2 * (len(lines) - 1)
    number = 0
    edge = ""  # what may be the beginning of a separator
    for part in parts:
        *documents, last = pattern.split(edge + part)
        for document in documents:
            yield number, document
            number += 1
        at = max(len(last) - longest + 1, 0)
        yield number, last[:at]
        edge = last[at:]
    yield number, edge


def first_end(text: str, start: int, size: int) -> int:
    """Where a piece ends, of the `size` characters from `start` on."""
    stops = (text.find(mark, start, start + size) for mark in "\n ")
    return next((stop for stop in stops if stop >= 0), start - 1) + 1


def _json_texts(
    path: blocks.File, how: Reading
) -> Iterator[tuple[int, long_texts.Text]]:
    number = 0
    for number, value in jsonlines.values(path, how.share, how.long):
        where = f"{shown(path)}:{number}"
        fix = "set data.source_options.text_field"
        yield number, jsonlines.text(value, how.text_field, where, fix)
    if not number and how.share.count == 1:
        raise errors.DataError(f"{shown(path)}: holds no JSON lines.")
