"""The bytes of a text file, decompressed: in blocks or in lines, never whole.

A line ends at \\n or \\r\\n and at nothing else, and a byte order mark is no content. What
a file is, its name says, in capitals or not: JSON lines (.jsonl, .json, .ndjson,
.jsonlines, .jl), compressed or not (.gz, .xz, .bz2; .zst if `zstandard` is installed), or a
table (.parquet, which `parquet` reads).

Start at `read` and `lines`.
"""

import bz2
import gzip
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol

from memoryformer import errors
from memoryformer.data.names import shown

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
BOM = b"\xef\xbb\xbf"
BLOCK = 1 << 20
_PACKED = 1 << 17  # bytes that are decompressed together, ten or more times as many
HEAD = 8192  # bytes that are looked at to tell what a file is
_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}
COMPRESSED = (*_OPENERS, ".zst")


class File(Protocol):
    """What is asked of a file, a path of this machine or of one in an object store."""

    @property
    def name(self) -> str:
        """The last part of its path."""

    @property
    def suffix(self) -> str:
        """The ending of its name."""

    @property
    def suffixes(self) -> list[str]:
        """All of them."""

    def stat(self) -> Any:
        """With `st_size` and `st_mtime_ns`."""

    def open(self, mode: str) -> Any:
        """Its bytes, for mode 'rb'."""

    def __fspath__(self) -> str: ...


def kind(path: File) -> str:
    """The ending of a file's name in small letters, that of its compression left out."""
    *_, outer, inner = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return outer if inner in COMPRESSED else inner


def is_json_lines(path: File) -> bool:
    """Whether a file holds JSON lines; .jl is Julia's ending too, so a look decides."""
    if kind(path) != ".jl":
        return kind(path) in JSON_SUFFIXES
    try:
        return head(path).lstrip().startswith(b"{")
    except Exception:  # of whatever kind its decompressor raises; `read` explains it
        return False


def has_fields(path: File) -> bool:
    """Whether a file's texts are in fields: those of JSON lines, or of parquet."""
    return is_parquet(path) or is_json_lines(path)


def is_parquet(path: File) -> bool:
    """Whether a file is a table that `parquet` reads."""
    return path.suffix.lower() == ".parquet"


def read(path: File) -> Iterator[bytes]:
    """Yield the content in blocks of about a megabyte; faults as one-line `DataError`."""
    name = shown(path)
    try:
        blocks = _raw(path, BLOCK)
        start = b""
        while len(start) < len(BOM) and (block := next(blocks, b"")):
            start += block
        if not start:
            raise errors.DataError(f"{name}: the file is empty.")
        yield start.removeprefix(BOM)
        yield from blocks
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise errors.DataError(f"{name}: damaged or truncated ({error}).") from error
    except OSError as error:
        reason = error.strerror or error
        raise errors.DataError(f"{name}: cannot be read ({reason}).") from error
    except Exception as error:  # zstandard may not be there to name its error
        if type(error).__name__ != "ZstdError":
            raise
        raise errors.DataError(f"{name}: damaged or truncated ({error}).") from error


def lines(path: File) -> Iterator[bytes]:
    """Yield the lines of a file without their ends."""
    for line, _ in lines_or_files(path, 1 << 62):
        yield line


def lines_or_files(
    path: File, size: int, wanted: Callable[[int], bool] = lambda number: True
) -> Iterator[tuple[bytes, IO[bytes] | None]]:
    """Yield (line, None), or (b"", a temporary file) for a line longer than `size`.

    The file is there until the next line is asked for. Of a long line whose number, from 1,
    is not `wanted`, only the end is there.
    """
    number = 1
    parts: list[bytes] = []
    file: IO[bytes] | None = None
    try:
        for block in read(path):
            first, *others = block.split(b"\n")
            parts.append(first)
            if sum(map(len, parts)) > size:
                if wanted(number):
                    file = file or tempfile.TemporaryFile()
                    file.writelines(parts)
                parts = []
            for line in others:
                yield _line(parts, file)
                parts = [line]
                number += 1
                if file:
                    file.close()
                    file = None
        if file or any(parts):
            yield _line(parts, file)
    finally:
        if file:
            file.close()


def _line(parts: list[bytes], file: IO[bytes] | None) -> tuple[bytes, IO[bytes] | None]:
    if file is None:
        return b"".join(parts).removesuffix(b"\r"), None
    file.writelines(parts)
    file.seek(0)
    return b"", file


def text_lines(path: File) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without their ends, empty ones too."""
    for number, line in enumerate(lines(path), start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise errors.DataError(
                f"{shown(path)}:{number}: not UTF-8; convert the file."
            ) from error


def head(path: File) -> bytes:
    """The first bytes of the content; raises whatever its decompressor raises."""
    return next(_raw(path, HEAD), b"").removeprefix(BOM)[:HEAD]


def _raw(path: File, size: int) -> Iterator[bytes]:
    """Yield blocks that are not empty."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        yield from filter(None, _zstandard(path))
        return
    with path.open("rb") as file:
        stream = _OPENERS[suffix](file) if suffix in _OPENERS else file
        while block := stream.read(size):
            yield block


def _zstandard(path: File) -> Iterator[bytes]:
    """Blocks of a file of one or more zstandard frames.

    Frame by frame, because the package's own reader takes a truncated file for a whole
    one. Raises EOFError where a frame is cut.
    """
    try:
        import zstandard
    except ModuleNotFoundError:
        raise errors.DataError(
            f"{shown(path)}: reading .zst needs the package zstandard; "
            "`pip install zstandard`, or decompress the file."
        ) from None
    frame = None
    with path.open("rb") as stream:
        while data := stream.read(_PACKED):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    if frame:
        raise EOFError("ends inside a frame")
