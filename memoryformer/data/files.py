"""Local files to documents: which files a path names, and what each one holds.

A document is a plain-text file, or one line of a JSON-lines file (.jsonl, .json,
.ndjson). Either may be compressed (.gz, .xz, .bz2; .zst if `zstandard` is installed).
Every fault of a file is a one-line `DataError` that names the file, and the line.

Start at `list_files` and `read_documents`.
"""

import bz2
import glob
import gzip
import hashlib
import json
import lzma
import pathlib
import sysconfig
import zlib
from collections.abc import Iterable, Iterator

from memoryformer import errors, paths

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
SMALL_CORPUS = 256 << 20  # bytes up to which a fingerprint reads every file
_HEAD = 8192  # bytes in which a zero byte tells a binary file
_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}

Files = list[tuple[str, pathlib.Path]]


def stdlib_files() -> Files:
    """The standard library's `*.py` files as (relative posix path, path), sorted.

    Tests are left out because distributions split or delete them; so are installed
    packages, which are not the standard library.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _STDLIB_SKIPPED & set(relative.parts):
            found.append((relative.as_posix(), path))
    if not found:
        raise errors.DataError(
            f"data.source='stdlib': no sources under {root} (a zipped or stripped "
            "Python?); use data.source='text' with data.path=FOLDER."
        )
    return sorted(found)


def list_files(
    path: str, *, json_only: bool = False, field: str = "data.path"
) -> Files:
    """The files that `path` (a file, a folder or a glob) names, sorted by key.

    The key of a file is its path relative to the folder, so it does not depend on where
    the corpus lies. Hidden files are skipped; with `json_only` so is everything that is
    not JSON lines. Raises `DataError` if nothing is left.
    """
    base = paths.local(path, field)
    if base.is_file():
        return [(base.name, base)]
    if base.is_dir():
        candidates = base.rglob("*")
    elif glob.has_magic(str(base)):
        candidates = [pathlib.Path(p) for p in glob.glob(str(base), recursive=True)]
        parts = base.parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base = pathlib.Path(*parts[:fixed])
    else:
        raise errors.DataError(f"{field}={path!r}: there is no such file or folder.")
    found = []
    for file in candidates:
        key = file.relative_to(base)
        hidden = any(part.startswith(".") for part in key.parts)
        if file.is_file() and not hidden and (not json_only or _is_json(file)):
            found.append((key.as_posix(), file))
    if not found:
        kind = "JSON-lines files (*.jsonl, *.json[.gz])" if json_only else "files"
        raise errors.DataError(f"{field}={path!r}: holds no {kind}.")
    return sorted(found)


def without_text(path: pathlib.Path) -> str:
    """'empty' or 'binary' for a file that holds no document, else ''.

    It looks at the beginning only. A damaged file has ''; `read_documents` says what is
    wrong with it.
    """
    if path.stat().st_size == 0:
        return "empty"
    if _is_json(path):
        return ""
    try:
        head = _head(path)
    except Exception:  # of whatever kind its decompressor raises
        return ""
    return "binary" if b"\0" in head else "" if head else "empty"


def fingerprint(files: Files) -> str:
    """sha256 over keys and contents; over keys, sizes and times for a large corpus.

    It decides whether a prepared directory may be used again, nothing else: what a
    checkpoint records is the manifest's fingerprint, which is of contents only.
    """
    stats = [path.stat() for _, path in files]
    small = sum(stat.st_size for stat in stats) <= SMALL_CORPUS
    digest = hashlib.sha256()
    for (key, path), stat in zip(files, stats, strict=True):
        if small:
            content = hashlib.sha256(_read_bytes(path)).hexdigest()
        else:
            content = f"{stat.st_size} {stat.st_mtime_ns}"
        digest.update(f"{key}\0{content}\n".encode())
    return digest.hexdigest()


def read_documents(
    files: Files, text_field: str, piece_chars: int = 0
) -> Iterator[tuple[str, str, int]]:
    """Yield (unique key, text, index of its file) for every document of `files`.

    `piece_chars` > 0 cuts plain-text files at line ends into documents of about that
    many characters. Raises `DataError` naming file and line for anything unreadable.
    """
    for index, (key, path) in enumerate(files):
        if _is_json(path):
            for line, text in _json_lines(path, text_field):
                yield f"{key}:{line}", text, index
        elif piece_chars:
            for number, piece in enumerate(_cut(_read_text(path), piece_chars)):
                yield f"{key}#{number}", piece, index
        else:
            yield key, _read_text(path), index


def lone_text_piece(files: Files, validation_every: int) -> int:
    """Characters per document for a corpus that is one text file, else 0.

    A lone file would be a single document, with nothing to hold out; about five pieces
    of it go to validation instead.
    """
    if len(files) != 1 or _is_json(files[0][1]):
        return 0
    return max(256, files[0][1].stat().st_size // (5 * validation_every))


def in_validation(key: str, every: int) -> bool:
    """Whether the document with this key is held out: sha256(key) mod every == 0."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % every == 0


def _is_json(path: pathlib.Path) -> bool:
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in (".gz", ".xz", ".bz2", ".zst"):
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in JSON_SUFFIXES


def _lines(path: pathlib.Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zstandard_lines(path)
        return
    with _OPENERS.get(path.suffix, open)(path, "rb") as stream:
        yield from stream


def _head(path: pathlib.Path) -> bytes:
    if path.suffix == ".zst":
        return next(_zstandard_lines(path), b"")[:_HEAD]
    with _OPENERS.get(path.suffix, open)(path, "rb") as stream:
        return stream.read(_HEAD)


def _zstandard_lines(path: pathlib.Path) -> Iterator[bytes]:
    """Lines of a file of one or more zstandard frames.

    Frame by frame, because the package's own reader takes a truncated file for a whole
    one. Raises EOFError where a frame is cut.
    """
    try:
        import zstandard
    except ModuleNotFoundError:
        raise errors.DataError(
            f"{path}: reading .zst needs the package zstandard; "
            "`pip install zstandard`, or decompress the file."
        ) from None
    frame, rest = None, b""
    with path.open("rb") as stream:
        while data := stream.read(1 << 20):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                *whole, rest = (rest + frame.decompress(data)).split(b"\n")
                yield from (line + b"\n" for line in whole)
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    if frame:
        raise EOFError("ends inside a frame")
    if rest:
        yield rest


def _checked_lines(path: pathlib.Path) -> Iterator[bytes]:
    """The lines of a file, decompressed; its faults as `DataError`."""
    if path.stat().st_size == 0:
        raise errors.DataError(f"{path}: the file is empty.")
    try:
        yield from _lines(path)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise errors.DataError(f"{path}: damaged or truncated ({error}).") from error
    except OSError as error:
        reason = error.strerror or error
        raise errors.DataError(f"{path}: cannot be read ({reason}).") from error
    except Exception as error:  # zstandard may not be there to name its error
        if type(error).__name__ != "ZstdError":
            raise
        raise errors.DataError(f"{path}: damaged or truncated ({error}).") from error


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise errors.DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _read_text(path: pathlib.Path) -> str:
    data = b"".join(_checked_lines(path))
    if not data:
        raise errors.DataError(f"{path}: the file is empty.")
    if b"\0" in data[:_HEAD]:
        raise errors.DataError(
            f"{path}: a binary file, not text; give data.path a glob that skips it."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise errors.DataError(
            f"{path}:{line}: not UTF-8 (byte {error.start}); convert the file."
        ) from error


def _json_lines(path: pathlib.Path, text_field: str) -> Iterator[tuple[int, str]]:
    empty = True
    for number, line in enumerate(_checked_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise errors.DataError(f"{where}: not UTF-8; convert the file.") from error
        except ValueError as error:
            reason = getattr(error, "msg", error)
            raise errors.DataError(f"{where}: not a JSON line ({reason}).") from error
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            fields = ", ".join(record) if isinstance(record, dict) else "no object"
            raise errors.DataError(
                f"{where}: no text in field {text_field!r} (found: {fields}); "
                "set data.text_field."
            )
        text = record[text_field]
        if not _encodable(text):
            raise errors.DataError(f"{where}: a lone surrogate, which is not text.")
        empty = False
        yield number, text
    if empty:
        raise errors.DataError(f"{path}: holds no JSON lines.")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _cut(text: str, size: int) -> Iterable[str]:
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            stops = (text.find(mark, end, end + size) for mark in "\n ")
            end = next((stop for stop in stops if stop >= 0), end - 1) + 1
        yield text[start:end]
        start = end
