"""Object stores: the objects below a URL such as s3://bucket/runs/a, and five verbs.

    list      names below the URL, with their sizes
    read      the bytes of an object
    write     an object from bytes, or from a file: whoever reads sees old or new, whole
    fetch     an object to a file
    remove    an object

An object is put in one request, or in parts of which nothing is seen before the last: S3,
Google Cloud Storage and Azure promise both, and that a list has what was put before it.
Nothing is appended to, renamed or locked. fsspec and the package of the scheme do the work, and
take keys and endpoints from where they always do. Start at `Store`; `is_store` tells a URL
from a path.
"""

import contextlib
import dataclasses
import datetime
import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator
from typing import IO, Any

from memoryformer.errors import ConfigError, StorageError, first_line
from memoryformer.files import atomic, paths

# Scheme -> the package that fsspec needs for it; memory:// lives and dies with a process.
SCHEMES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "memory": "",
}
_URL = re.compile(rf"({'|'.join(SCHEMES)})://(.*)", re.DOTALL)


def is_store(path: str | os.PathLike) -> bool:
    """Whether `path` names a place in an object store."""
    return isinstance(path, str) and _URL.match(path) is not None


def checked(url: str, name: str, *, pattern: bool = False) -> str:
    """Return `url` without the slashes at its end; `name` is the flag or field it is from.

    Raises `ConfigError` where it names no bucket or holds what no name can, (unless
    `pattern`) one of * ? [ \\, and where the package of its scheme is not installed.
    """
    where = f"{name}={paths.shown(url)}"
    match = _URL.match(url)
    if match is None or not match[2].strip("/"):
        raise ConfigError(f"{where}: names no bucket; write SCHEME://BUCKET/FOLDER.")
    paths.refuse_unprintable(url, where)
    if not pattern and (sign := paths.PATTERN.search(url)):
        raise ConfigError(
            f"{where}: holds {sign[0]!r}, which stands for other names in a store; name "
            "a folder without * ? [ and backslash."
        )
    for package in ("fsspec", SCHEMES[match[1]]):
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{where}: needs the package {package}; `pip install {package}`, or "
                "mount the store and give the path without its scheme."
            )
    return url.rstrip("/")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a list says of an object: bytes, and when it was last put (0: not said)."""

    size: int
    modified: float


class Store:
    """The objects below a URL; a name is relative to it. Every fault is a `StorageError`."""

    def __init__(self, url: str, name: str = "--workdir"):
        self.url = checked(url, name)
        self._scheme, _, self._root = self.url.partition("://")
        if self._scheme == "memory":
            self._root = f"/{self._root}"  # as it names its objects
        self._files, self._process = None, 0

    def list(self, below: str = "") -> dict[str, Entry]:
        """Return what lies below the folder `below`, by name; nothing where there is none."""
        with self.faults("listed", below):
            listed = self.files().find(self._at(below), detail=True)
        begin = f"{self._root}/"
        return {
            path.removeprefix(begin): Entry(int(facts["size"]), _modified(facts))
            for path, facts in sorted(listed.items())
            if path.startswith(begin) and facts["type"] == "file"
        }

    def entry(self) -> Entry | None:
        """Return what is said of the object that the URL itself names; None if it names none."""
        with self.faults("read", ""), contextlib.suppress(FileNotFoundError):
            facts = self.files().info(self._root)
            if facts["type"] == "file":
                return Entry(int(facts["size"]), _modified(facts))
        return None

    def open(self, name: str, block_size: int) -> IO[bytes]:
        """Open an object to read, so many bytes in a request."""
        return self.files().open(self._at(name), "rb", block_size=block_size)

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, None where there is none."""
        with self.faults("read", name):
            try:
                return self.files().cat_file(self._at(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes | pathlib.Path) -> None:
        """Put an object: bytes, or those of a file however large."""
        with self.faults("written", name):
            if isinstance(content, bytes):
                self.files().pipe_file(self._at(name), content)
            else:
                self.files().put_file(os.fspath(content), self._at(name))

    def fetch(self, name: str, path: pathlib.Path) -> None:
        """Write an object to a file of this machine, whole."""
        with atomic.replacing(path) as temporary, self.faults("read", name):
            self.files().get_file(self._at(name), os.fspath(temporary))

    def remove(self, name: str) -> None:
        """Delete an object, which need not be there."""
        with self.faults("removed", name):
            with contextlib.suppress(FileNotFoundError):
                self.files().rm_file(self._at(name))

    def files(self) -> Any:
        """Return fsspec's file system, one for all threads of a process; no list is kept."""
        # What was opened before a fork is the parent's.
        if self._process != os.getpid():
            import fsspec

            self._files = fsspec.filesystem(self._scheme, use_listings_cache=False)
            self._process = os.getpid()
        return self._files

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def faults(self, verb: str, name: str) -> Iterator[None]:
        """Tell whatever a store's package raises in a line."""
        try:
            yield
        except (StorageError, MemoryError):
            raise
        except Exception as error:
            where = f"{self.url}/{name}" if name else self.url
            raise StorageError(
                f"{where}: cannot be {verb} ({type(error).__name__}: {first_line(error)})."
            ) from error


def _modified(facts: dict[str, Any]) -> float:
    """Seconds; the packages have several names and types for it."""
    for name in ("LastModified", "mtime", "updated", "last_modified", "created"):
        value = facts.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.datetime.fromisoformat(value)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
    return 0.0
