"""Where a run lies: on this machine, or in an object store, behind a copy on this machine.

    MEMORYFORMER_CACHE/stores/written-../NAME   while the run NAME is trained; then removed
    MEMORYFORMER_CACHE/stores/read-../NAME      for those who read it, with the steps they read

The store is the truth: a run begins with what is there, not with what an earlier copy held.
One process writes there (`files.lease`). Start at `opened` (training) and `copied`
(everything else); `folder` says what is sent, and when.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax

from memoryformer.cluster import processes
from memoryformer.errors import ConfigError, StorageError
from memoryformer.files import lease, lock, paths, stores
from memoryformer.runs import directory
from memoryformer.runs import steps as run_steps
from memoryformer.runs.folder import Copy, Folder

_CONFIG = "config.json"


@contextlib.contextmanager
def opened(workdir: str | os.PathLike, patience: float = 0.0) -> Iterator[Folder]:
    """Yield the folder to train in; in a store it is a copy, sent once more at the end.

    Raises `ConfigError` for a place that no run can be written to, `OccupiedError` if
    another process writes to the store, `StorageError` if it cannot be used.
    """
    if not stores.is_store(workdir):
        yield Folder(paths.workdir(workdir))
        return
    store = stores.Store(os.fspath(workdir))
    if jax.process_count() > 1:
        raise ConfigError(
            f"--workdir={store.url}: {jax.process_count()} processes write one checkpoint "
            "together, which needs a folder that all see; mount the store (gcsfuse, s3fs, "
            "...) and give the path without its scheme."
        )
    with contextlib.ExitStack() as stack:
        try:
            waiting = _say_waiting(store.url)
            held = stack.enter_context(lease.hold(store, patience, waiting))
        except lock.HeldError as error:
            raise directory.OccupiedError(
                f"--workdir={store.url}: process {error} trains there; wait until it has "
                "ended, stop it, or name another directory."
            ) from error
        copy = Copy(store, _place("written", store.url), held)
        shutil.rmtree(copy.path, ignore_errors=True)
        copy.refresh()
        try:
            yield copy
        except BaseException:
            try:
                copy.end()
            except StorageError as error:  # never hide what ended the run
                processes.say(f"error: {error}")
            raise
        copy.end()


def copied(
    workdir: str | os.PathLike,
    step: int | None = None,
    name: str = "--workdir",
    *,
    params: bool = True,
) -> pathlib.Path:
    """Return the folder of a run to read: of one in a store, a copy with a step of it.

    step: None for the newest.  params: without, the copy has no step, only what is small.
    A copy stays for the next reader, which brings only what has changed. Raises
    `StorageError` if there is nothing, or no such step.
    """
    if not stores.is_store(workdir):
        return paths.local(workdir, name)
    store = stores.Store(os.fspath(workdir), name)
    copy = Copy(store, _place("read", store.url))
    if store.read(_CONFIG) is None:
        raise StorageError(
            f"{name}: {store.url} holds no run, for it has no {_CONFIG}."
        )
    copy.path.mkdir(parents=True, exist_ok=True)
    with lock.hold(copy.path.parent / "lock"):
        copy.refresh()
        if params:
            target = run_steps.existing(copy.path / run_steps.FOLDER, step)
            copy.fetch(int(target.name))
    return copy.path


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """Return the config.json of a run; raises `StorageError` if there is none to be read."""
    if not stores.is_store(workdir):
        return directory.read_json(pathlib.Path(workdir) / _CONFIG)
    content = stores.Store(os.fspath(workdir)).read(_CONFIG)
    return directory.parsed_json(content or b"", f"{workdir}/{_CONFIG}")


def output(path: str | None, workdir: str | os.PathLike, name: str) -> pathlib.Path:
    """Return --output's `path`, or else `name` in the run's folder.

    Raises `ConfigError` without a path for a run in a store.
    """
    if not path and stores.is_store(workdir):
        raise ConfigError(
            f"--output: missing; {workdir} is in a store, and what is made of a run there "
            "goes to a folder of this machine."
        )
    return pathlib.Path(path or paths.local(workdir, "--workdir") / name)


def _place(kind: str, url: str) -> pathlib.Path:
    """Where the copy of a run lies."""
    root = os.environ.get("MEMORYFORMER_CACHE") or "~/.cache/memoryformer"
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = paths.local(root, "MEMORYFORMER_CACHE") / "stores"
    return folder / f"{kind}-{digest}" / url.rpartition("/")[2]


def _say_waiting(url: str) -> Callable[[str], None]:
    def waiting(holder: str) -> None:
        processes.say(
            f"{url}: process {holder} was writing there; waiting up to "
            f"{lease.LEASE:.0f} s for a sign of it."
        )

    return waiting
