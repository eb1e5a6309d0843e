"""A corpus in an object store: its files are read there, and token files are brought here.

    text, JSON lines, parquet    `list_stored`: listed once, read as they are asked for
    prepared data                `prepared`: memory-mapped, so copied to the cache first

Keys, texts and fingerprints are those of the same files on this machine.
"""

import glob
import hashlib
import io
import pathlib
import types
from typing import IO, Any

from memoryformer import errors
from memoryformer.data import blocks, manifest, names
from memoryformer.files import atomic, lock, stores

_BLOCK = 8 << 20  # bytes that are asked for at once


class StoredFile:
    """One object, as a `blocks.File`."""

    def __init__(self, store: stores.Store, name: str, entry: stores.Entry):
        self._store, self._name, self._entry = store, name, entry
        path = pathlib.PurePosixPath(name)
        self.name, self.suffix, self.suffixes = path.name, path.suffix, path.suffixes

    def stat(self) -> Any:
        """What the list said."""
        changed = int(self._entry.modified * 1e9)
        return types.SimpleNamespace(st_size=self._entry.size, st_mtime_ns=changed)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Its bytes, some megabytes at a time; every fault is an `OSError`."""
        return io.BufferedReader(_Raw(self._store, self._name), 1 << 20)

    def __fspath__(self) -> str:
        return f"{self._store.url}/{self._name}"

    def __str__(self) -> str:
        return self.__fspath__()


class _Raw(io.RawIOBase):
    def __init__(self, store: stores.Store, name: str):
        self._store, self._name = store, name
        self._stream: Any = None
        with store.faults("read", name):
            self._stream = store.open(name, _BLOCK)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        with self._store.faults("read", self._name):
            content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        super().close()


def list_stored(url: str, field: str) -> list[tuple[str, blocks.File]]:
    """Return (key, file) of what an object, a folder or a pattern names, sorted by key.

    Hidden files, runs, exported models and prepared data are left out. A name with one of
    * ? [ is a pattern. Raises `ConfigError` for what is no URL, `StorageError`.
    """
    url = stores.checked(url, field, pattern=True)
    parts = url.split("/")  # scheme:, '', bucket, ..
    wild = [i for i, part in enumerate(parts) if glob.has_magic(part)]
    if wild and wild[0] < 3:
        raise errors.ConfigError(f"{field}={url!r}: a bucket's name is no pattern.")
    if not wild and (entry := stores.Store(url, field).entry()):
        store = stores.Store("/".join(parts[:-1]), field)
        return [(names.key(parts[-1:]), StoredFile(store, parts[-1], entry))]
    at = wild[0] if wild else len(parts)
    store = stores.Store("/".join(parts[:at]), field)
    return _fitting(store, tuple(parts[at:]) or ("**",))


def _fitting(
    store: stores.Store, pattern: tuple[str, ...]
) -> list[tuple[str, blocks.File]]:
    pattern += ("*",) if pattern[-1] == "**" else ()
    listed = store.list()
    inside: dict[str, set[str]] = {}  # folder -> what lies in it
    for name in listed:
        for path in (name, *map(str, pathlib.PurePosixPath(name).parents)):
            folder, _, last = path.rpartition("/")
            inside.setdefault(folder, set()).add(last)
    ours = tuple(
        f"{folder}/"
        for folder, held in inside.items()
        if folder and (names.are_ours(held) or {"config.json", "checkpoints"} <= held)
    )
    found: list[tuple[str, blocks.File]] = []
    for name, entry in listed.items():
        parts = tuple(name.split("/"))
        left_out = any(part.startswith(".") for part in parts)
        left_out = left_out or name.startswith(ours)
        if not left_out and names.fits(parts, pattern):
            found.append((names.key(parts), StoredFile(store, name, entry)))
    return sorted(found, key=lambda pair: pair[0])


def prepared(url: str, root: pathlib.Path) -> pathlib.Path:
    """Return the folder, below `root`, with a copy of prepared data, which is memory-mapped.

    Files that are there in their size stay; under another manifest all are brought anew.
    Raises `DataError` where there is no manifest, `StorageError`.
    """
    store = stores.Store(url, "data.path")
    content = store.read(manifest.FILE)
    if content is None:
        raise errors.DataError(
            f"data.path={url!r}: holds no {manifest.FILE}; name a folder that `prepare` made."
        )
    digest = hashlib.sha256(url.encode() + content).hexdigest()[:16]
    folder = root / f"stored-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with lock.hold(folder.with_suffix(".lock")):
        if (folder / manifest.FILE).is_file():
            return folder
        for name, entry in store.list().items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry.size:
                if name != manifest.FILE:
                    store.fetch(name, path)
        atomic.write_bytes(folder / manifest.FILE, content)  # all are there
    return folder
