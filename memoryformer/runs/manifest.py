"""Manifests: what makes a checkpoint directory whole, and proof that it still is.

A manifest lists every file of a directory with its size and SHA-256, beside any facts
worth keeping. It is written last and moved into place in one step, so a directory with a
manifest was complete; a directory without one is not whole. Its first line is the SHA-256
of the rest: a flipped bit in the manifest is found like one in the data.

A ledger lists the directories that are whole, so that one which loses its manifest later is
known to be damaged, not taken for one that was never finished. It is of the same form.
"""

import concurrent.futures
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Collection
from typing import Any

from memoryformer.errors import StorageError
from memoryformer.files import atomic
from memoryformer.runs import old_configs

MANIFEST = "MANIFEST"
LEDGER = "LEDGER"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class DamagedError(StorageError):
    """A file is missing, cut short or changed since its manifest was written."""


def write(directory: pathlib.Path, facts: dict[str, Any]) -> None:
    """Hash every file under `directory`, flush it to the disk and write the manifest.

    A file system that delays allocation reports a full disk only at the flush, so the
    flush comes before anything older may be deleted on the strength of this manifest.
    """
    files = {
        name: [(directory / name).stat().st_size, _sha256(directory / name, flush=True)]
        for name in _files(directory)
    }
    _seal(directory / MANIFEST, {"facts": facts, "files": files})


def versions() -> dict[str, str]:
    """Return the packages that decide what a checkpoint holds, with their versions."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def amend(directory: pathlib.Path, **facts: Any) -> None:
    """Write the manifest again with these facts changed, in one step."""
    manifest = _read(directory)
    _seal(
        directory / MANIFEST,
        {"facts": manifest["facts"] | facts, "files": manifest["files"]},
    )


def exists(directory: pathlib.Path) -> bool:
    """Whether the directory was complete once."""
    return (directory / MANIFEST).is_file()


def facts(directory: pathlib.Path) -> dict[str, Any]:
    """Return the facts of the manifest. Raises `DamagedError`; looks at no other file."""
    return _read(directory)["facts"]


def verify(directory: pathlib.Path) -> dict[str, Any]:
    """Return the facts of the manifest after reading and comparing every file.

    Raises `DamagedError` naming the first file that is missing, shorter or different.
    """
    manifest = _read(directory)
    files = manifest["files"]
    for name, (size, _) in files.items():
        try:
            actual = (directory / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{directory / name}: missing.") from error
        if actual != size:
            raise DamagedError(f"{directory / name}: {actual} bytes, was {size}.")

    def differs(item: tuple[str, list]) -> bool:
        name, (_, digest) = item
        try:
            return _sha256(directory / name) != digest
        except OSError:
            return True  # unreadable is damaged, whatever the reason

    # hashlib lets other threads run: several files are read at once.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for name, bad in zip(files, pool.map(differs, files.items()), strict=True):
            if bad:
                raise DamagedError(f"{directory / name}: changed since it was written.")
    return manifest["facts"]


def write_ledger(parent: pathlib.Path, steps: Collection[int]) -> None:
    """Write down which steps under `parent` are whole: after a manifest, before a deletion."""
    _seal(parent / LEDGER, sorted(steps))


def read_ledger(parent: pathlib.Path) -> set[int]:
    """Return the steps of the ledger; none where there is none, of before there were any.

    Raises `DamagedError`.
    """
    path = parent / LEDGER
    steps = _unsealed(path) if path.exists() else []
    if not isinstance(steps, list) or not all(type(step) is int for step in steps):
        raise DamagedError(f"{path}: is no list of steps.")
    return set(steps)


def remove(directory: pathlib.Path) -> None:
    """Delete a directory; killed in the middle, what is left is no longer whole."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory)


def size(directory: pathlib.Path) -> int:
    """Return the bytes of all files under `directory`; 0 where it does not exist."""
    return sum((directory / name).stat().st_size for name in _files(directory))


def _read(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / MANIFEST
    manifest = _unsealed(path)
    parts = manifest if isinstance(manifest, dict) else {}
    if not all(isinstance(parts.get(name), dict) for name in ("facts", "files")):
        raise DamagedError(f"{path}: is no manifest.")
    if isinstance(parts["facts"].get("config"), dict):
        stored = parts["facts"]["config"]
        facts = parts["facts"] | {"config": old_configs.upgraded(stored)}
        if retired := old_configs.retired(stored):  # lost from there
            facts["retired"] = retired
        return parts | {"facts": facts}
    return manifest


def _seal(path: pathlib.Path, value: Any) -> None:
    """Write JSON behind a line with its SHA-256."""
    body = json.dumps(value, sort_keys=True).encode()
    atomic.write_bytes(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _unsealed(path: pathlib.Path) -> Any:
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise DamagedError(f"{path}: missing or unreadable.") from error
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedError(f"{path}: changed since it was written.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is no JSON.") from error


def _files(directory: pathlib.Path) -> list[str]:
    paths = (p for p in directory.rglob("*") if p.is_file())
    paths = (p for p in paths if not p.match(atomic.TEMPORARY))
    names = (p.relative_to(directory).as_posix() for p in paths)
    return sorted(n for n in names if n != MANIFEST)


def _sha256(path: pathlib.Path, *, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
