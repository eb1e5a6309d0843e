"""The folder of a run on this machine: the run's own, or a copy of one in an object store.

    checkpoints/<step>/..        sent once the step is whole here: its files, then its MANIFEST
    checkpoints/LEDGER           sent after the manifests, and before anything is removed
    config.json, metrics.jsonl   sent whole, before the step whose rows they hold

So what a kill leaves in the store at any moment is what it would leave on a disk: `checkpoint`
skips a step without its manifest, or whose files do not agree with it. Start at `Folder`.
"""

import concurrent.futures
import contextlib
import itertools
import pathlib
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable

from memoryformer.cluster import processes
from memoryformer.errors import StorageError
from memoryformer.files import atomic, lease, stores
from memoryformer.runs import directory, manifest, retention
from memoryformer.runs import steps as run_steps

_STEP = re.compile(rf"{run_steps.FOLDER}/(\d+)/(.+)")
_LEDGER = f"{run_steps.FOLDER}/{manifest.LEDGER}"
_AT_ONCE = 8  # objects that are sent or fetched together


class Folder:
    """The folder of a run on this machine, for a run that lives there: nothing to send."""

    def __init__(self, path: pathlib.Path, name: str = ""):
        self.path = path
        self.name = name or str(path)  # as the user knows it

    def fetch(self, step: int) -> None:
        """Bring the files of a step, before they are read."""

    def publish(self) -> None:
        """Make what is whole in the folder the truth."""


class Copy(Folder):
    """The folder of this machine that stands for one in a store."""

    def __init__(
        self,
        store: stores.Store,
        path: pathlib.Path,
        held: lease.Lease | None = None,  # None: to read only
    ):
        super().__init__(path, store.url)
        self._store, self._held = store, held
        self._there: dict[str, int] = {}  # what the store holds: name -> bytes
        # Files as they were sent or fetched: bytes, and when they were changed.
        self._same: dict[str, tuple[int, int]] = {}
        self._turn = threading.Lock()
        self._begun = False

    def refresh(self) -> None:
        """Bring what is small, and a folder for each step; the store is the truth."""
        listed = self._store.list()
        self._there = {
            name: entry.size
            for name, entry in listed.items()
            if not name.startswith(f"{lease.FOLDER}/") and name != directory.LOCK
        }
        steps = {step for name in self._there if (step := _step(name))}
        folder = self.path / run_steps.FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for old in {path.name for path in folder.iterdir() if path.is_dir()} - steps:
            shutil.rmtree(folder / old)
        for path in self.path.iterdir():
            if path.is_file() and path.name not in self._there:
                path.unlink()
        for step in steps:
            self._renew(step)
        self._fetch(name for name in self._there if "/" not in name or name == _LEDGER)

    def fetch(self, step: int) -> None:
        """Bring what is not here; `manifest.verify` compares it."""
        names = [name for name in self._there if _step(name) == str(step)]
        self._fetch(name for name in names if not self._is_here(name))

    def publish(self) -> None:
        """Send what has changed and remove what is gone, in the order that is told above."""
        with self._turn:
            here = self._whole()
            changed = [name for name in here if self._same.get(name) != here[name]]
            if changed and not self._begun:
                processes.say(f"{self.name}: written through a copy in {self.path}")
                self._begun = True
            for _, names in itertools.groupby(sorted(changed, key=_rank), _rank):
                self._each(self._send, names)
            gone = [name for name in self._there if self._is_gone(name, here)]
            # A manifest goes before the files that it speaks for.
            for _, names in itertools.groupby(sorted(gone, key=_rank)[::-1], _rank):
                self._each(self._remove, names)

    def end(self) -> None:
        """Send what is left, and remove the copy; it stays where it could not be sent."""
        try:
            self.publish()
        except StorageError as error:
            kept = self.path.with_name(
                f"unsent-{self.path.name}-{secrets.token_hex(4)}"
            )
            self.path.rename(kept)
            raise StorageError(f"{error} What was not sent lies in {kept}.") from error
        shutil.rmtree(self.path, ignore_errors=True)

    def _renew(self, step: str) -> None:
        """Make the folder of a step; its files are there only if they were before."""
        name = f"{run_steps.FOLDER}/{step}/{manifest.MANIFEST}"
        content = self._store.read(name) if name in self._there else None
        path = self.path / name
        if content is None or not path.exists() or path.read_bytes() != content:
            shutil.rmtree(path.parent, ignore_errors=True)
            path.parent.mkdir()
            about = [n for n in self._there if path.parent == (self.path / n).parent]
            self._fetch(about)  # what Orbax looks for in every step, too

    def _fetch(self, names: Iterable[str]) -> None:
        self._each(self._fetch_one, names)

    def _fetch_one(self, name: str) -> None:
        self._store.fetch(name, self.path / name)
        self._same[name] = _stat(self.path / name)

    def _send(self, name: str) -> None:
        self._check()
        before = _stat(self.path / name)
        # Files beside the checkpoints may grow: their bytes now, not as they come.
        grows = _step(name) is None
        self._store.write(
            name, (self.path / name).read_bytes() if grows else self.path / name
        )
        self._same[name], self._there[name] = before, before[0]

    def _remove(self, name: str) -> None:
        self._check()
        self._store.remove(name)
        self._there.pop(name)
        self._same.pop(name, None)

    def _each(self, do: Callable[[str], None], names: Iterable[str]) -> None:
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(do, names):
                pass

    def _check(self) -> None:
        if self._held is not None:
            self._held.check()

    def _is_here(self, name: str) -> bool:
        path = self.path / name
        return path.is_file() and path.stat().st_size == self._there[name]

    def _is_gone(self, name: str, here: dict[str, tuple[int, int]]) -> bool:
        """Whether an object is to be removed, since its file or its step was."""
        gone = name in self._same and name not in here
        if step := _step(name):
            folder = self.path / run_steps.FOLDER / step
            return not folder.is_dir() or (gone and manifest.exists(folder))
        return gone

    def _whole(self) -> dict[str, tuple[int, int]]:
        """What may be sent: not the lock, nor what is being written, nor half a step."""
        steps = self.path / run_steps.FOLDER
        skipped = {path.name for path in retention.unfinished(steps)}
        skipped |= {
            str(n)
            for n in run_steps.numbered(steps)
            if not manifest.exists(steps / str(n))
        }
        found = {}
        for path in self.path.rglob("*"):
            name = path.relative_to(self.path).as_posix()
            half = name.startswith(f"{run_steps.FOLDER}/") and name.split("/")[1]
            if half in skipped or name == directory.LOCK or path.is_symlink():
                continue
            if path.is_file() and not path.match(atomic.TEMPORARY):
                with contextlib.suppress(FileNotFoundError):  # moved meanwhile
                    found[name] = _stat(path)
        return found


def _step(name: str) -> str | None:
    match = _STEP.fullmatch(name)
    return match[1] if match else None


def _rank(name: str) -> int:
    """In which turn an object is put; objects are removed in the opposite order."""
    if name == _LEDGER:
        return 3
    if _step(name) is None:
        return 0
    return 2 if name.endswith(f"/{manifest.MANIFEST}") else 1


def _stat(path: pathlib.Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns
