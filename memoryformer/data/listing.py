"""Which files a path names: one file, a folder and all below it, or a pattern.

A folder is the pattern `FOLDER/**`. Links to folders are followed, and every folder is
read once, however many ways lead to it: folders come before links to them, and links in
the order of their names. Hidden files are left out, and so are the folders of runs, exported
models and prepared data.

Start at `list_files`.
"""

import glob
import os
import pathlib
import re
import sysconfig
from collections.abc import Callable, Iterator

from memoryformer import errors
from memoryformer.data import blocks, stored_files
from memoryformer.data.names import are_ours, counted, fits, key, shown
from memoryformer.files import paths, stores

_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_EVERYTHING = ("**", "*")

Files = list[tuple[str, blocks.File]]
Note = Callable[[str], None]


def stdlib_files() -> Files:
    """The standard library's `*.py` files as (relative posix path, path), sorted.

    Tests are left out because distributions split or delete them; so are installed
    packages, which are not the standard library.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    sources: Files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _STDLIB_SKIPPED & set(relative.parts):
            sources.append((relative.as_posix(), path))
    if not sources:
        raise errors.DataError(
            f"data.source='stdlib': no sources under {root} (a zipped or stripped "
            "Python?); use data.source='text' with data.path=FOLDER."
        )
    return sorted(sources)


def list_files(
    path: str,
    *,
    json_only: bool = False,
    field: str = "data.path",
    note: Note = lambda text: None,
) -> Files:
    """The files that `path` (a file, a folder or a pattern) names, sorted by key.

    The key of a file is its path relative to the folder, as UTF-8, so it does not depend
    on where the corpus lies. With `json_only` only JSON lines and parquet count. `note` is told what
    was followed and what was left out. Raises `DataError` if nothing is left, or a folder
    cannot be read.
    """
    try:
        if stores.is_store(path):
            return _of_kind(
                stored_files.list_stored(path, field), path, json_only, field
            )
        base = paths.local(path, field)
        if base.is_file():
            return [(key([base.name]), base)]
        pattern: tuple[str, ...] = _EVERYTHING
        if not base.is_dir():
            base, pattern = _split(base)
        files: Files = sorted(_Walk(base, pattern).run(note)) if pattern else []
    except OSError as error:
        where = shown(getattr(error, "filename", None) or path)
        reason = getattr(error, "strerror", None) or error
        raise errors.DataError(
            f"{field}: {where}: cannot be read ({reason})."
        ) from error
    if not pattern:
        what = "there is no such file or folder"
        if base.exists():
            what = "it is neither file nor folder"
        raise errors.DataError(f"{field}={path!r}: {what}.")
    return _of_kind(files, path, json_only, field)


def _of_kind(files: Files, path: str, json_only: bool, field: str) -> Files:
    """The files that count; raises `DataError` if none does."""
    if json_only:
        files = [(name, file) for name, file in files if blocks.has_fields(file)]
    if not files:
        what = (
            "JSON-lines files (*.jsonl, *.json[.gz]), nor *.parquet"
            if json_only
            else "files"
        )
        raise errors.DataError(f"{field}={path!r}: holds no {what}.")
    return files


def _split(path: pathlib.Path) -> tuple[pathlib.Path, tuple[str, ...]]:
    """(folder, pattern below it); the pattern is () if the path has no wildcard.

    A part that exists as it is written is no pattern, whatever signs it holds.
    """
    for i, part in enumerate(path.parts):
        if glob.has_magic(part) and not pathlib.Path(*path.parts[: i + 1]).exists():
            files = ("*",) if path.parts[-1] == "**" else ()
            return pathlib.Path(*path.parts[:i]), path.parts[i:] + files
    return path, ()


class _Walk:
    """One walk over the folders below `base` that a pattern can reach."""

    def __init__(self, base: pathlib.Path, pattern: tuple[str, ...]):
        self._pattern = pattern
        self._folders: list[tuple[pathlib.Path, tuple[str, ...]]] = [(base, ())]
        self._links: list[tuple[pathlib.Path, tuple[str, ...]]] = []
        self._read: set[str] = set()  # real paths
        self._followed: list[str] = []
        self._again: list[str] = []
        self._dangling: list[str] = []
        self._ours: list[str] = []

    def run(self, note: Note) -> Iterator[tuple[str, pathlib.Path]]:
        """Yield (key, path) of every file; then say what was special."""
        while self._folders or self._links:
            if self._folders:
                yield from self._folder(*self._folders.pop())
                continue
            self._links.sort(key=lambda link: link[1])
            folder, names = self._links.pop(0)
            known = os.path.realpath(folder) in self._read
            (self._again if known else self._followed).append("/".join(names))
            self._folders.append((folder, names))
        for links, what in (
            (self._followed, "link to folders followed"),
            (self._again, "link to folders that are read already"),
            (self._dangling, "link to nothing"),
            (self._ours, "folder of a run, a model or prepared data left out"),
        ):
            if links:
                note(counted(links, what))

    def _folder(
        self, folder: pathlib.Path, names: tuple[str, ...]
    ) -> Iterator[tuple[str, pathlib.Path]]:
        real = os.path.realpath(folder)
        if real in self._read or not os.path.isdir(folder):
            return
        self._read.add(real)
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        if names and _is_ours(folder, {entry.name for entry in listed}):
            self._ours.append("/".join(names))
            return
        for entry in listed:
            inner, link = (*names, entry.name), entry.is_symlink()
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if path.is_dir() if link else entry.is_dir():
                if fits(inner, self._pattern, begins=True):
                    (self._links if link else self._folders).append((path, inner))
            elif not fits(inner, self._pattern):
                continue
            elif path.is_file() if link else entry.is_file():
                yield key(inner), path
            elif link:
                self._dangling.append("/".join(inner))


def _is_ours(folder: pathlib.Path, names: set[str]) -> bool:
    """Whether this package made the folder: a run changes while it is read."""
    if are_ours(names):
        return True
    if "lock" not in names:
        return False
    try:
        with (folder / "lock").open("rb") as file:
            return re.fullmatch(rb"\d+ on \S+\n", file.read(400)) is not None
    except OSError:
        return False
