"""Write a file whole: whoever reads it, and whenever the writer is killed, sees old or new.

A temporary file beside it is written, flushed to the disk and moved into its place. A file
system that delays allocation reports a full disk only at the flush. Every function makes
the folder if need be, and raises `StorageError` with the file before still in place.

Start at `write_json`; `replacing` is for what is written in parts or by another library.
"""

import contextlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

from memoryformer.errors import StorageError

TEMPORARY = ".*.tmp"  # glob of what a killed writer leaves


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a temporary path to write to; it becomes `path` at the end of the block."""
    path = pathlib.Path(path)
    # A name of its own for each writer: other processes, other machines, a.json and a.txt.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk has not even room for half
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError(f"{path}: cannot be written: {error}.") from error
        raise


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file of bytes whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file of UTF-8 text whole."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, value: Any, **style: Any) -> None:
    """Write a JSON file whole; `style` is that of `json.dumps`."""
    write_text(path, json.dumps(value, **style) + "\n")


def flush(path: pathlib.Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
