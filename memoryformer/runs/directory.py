"""The directory of a run: one process at a time trains in it, and its small files appear whole.

    workdir/lock    the process that trains here, or was the last to: "4711 on node17"

Start at `only_one`.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from memoryformer.cluster import processes
from memoryformer.errors import ConfigError, StorageError

LOCK = "lock"
# What file systems say that cannot lock: there, nobody is kept out.
# What makes a folder a run or an exported model: lost, nothing else in it can be read.
_OWN_FILES = (
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "reader.py",
    "metrics.jsonl",
    "outcome.json",
    LOCK,
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class OccupiedError(StorageError):
    """Another process trains in the directory."""


@contextlib.contextmanager
def only_one(workdir: str | os.PathLike, patience: float = 0.0) -> Iterator[None]:
    """Keep other runs out of `workdir`, made if need be; process 0 alone does.

    The lock ends with the process, however that ends. Raises `OccupiedError` if another
    process still holds it after `patience` seconds, `StorageError` if nothing can be
    written there.
    """
    if not processes.is_chief():
        yield
        return
    with _held(pathlib.Path(workdir), time.monotonic() + patience):
        yield


def refuse_foreign(workdir: str | os.PathLike) -> None:
    """Raise `ConfigError` if the config.json in `workdir` is no run's: an export's, say."""
    path = pathlib.Path(workdir) / "config.json"
    try:
        config = read_json(path)
    except StorageError:  # none, or damaged: a run writes its own anew
        return
    if not {"model", "data", "train"} <= config.keys():
        raise ConfigError(
            f"--workdir={workdir}: {path} is of another model, which training would "
            "write over; name another directory."
        )


def check_output(
    output: str | os.PathLike,
    files: Iterable[str | os.PathLike] = (),
    folders: Iterable[str | os.PathLike] = (),
) -> None:
    """Raise `ConfigError` if writing to `output` would lose what the command reads.

    files: those that it reads.  folders: runs and exported models, for which their own
    files count. Links are followed.
    """
    own = [pathlib.Path(folder, name) for folder in folders for name in _OWN_FILES]
    for read in (*map(pathlib.Path, files), *own):
        same = os.path.realpath(output) == os.path.realpath(read)
        if not same and os.path.exists(output) and read.exists():
            same = os.path.samefile(output, read)
        if same:
            raise ConfigError(
                f"--output={output}: is {read}, which would be written over; name "
                "another file."
            )


def write_json(path: pathlib.Path, value: Mapping[str, Any], **style: Any) -> None:
    """Write a JSON file, its directory too; killed halfway, the file before stays.

    Raises `StorageError`.
    """
    # Of this file and process alone: a.json and a.txt, or two evaluations, at once.
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(value, **style) + "\n", encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a full disk has not even room for half
            fresh.unlink()
        raise StorageError(f"{path}: cannot be written: {error}.") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises `StorageError` if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    # Neither UTF-8 nor JSON: ValueErrors; nested too deep to be read: RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path}: cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path}: cannot be read: it holds no JSON object.")
    return value


def _held(workdir: pathlib.Path, deadline: float) -> TextIO:
    """Return the lock file, locked until it is closed."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"--workdir={workdir}: cannot be used: {error}.") from error
    try:
        _lock(file, workdir, deadline)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except BaseException as error:
        with contextlib.suppress(OSError):  # what could not be flushed
            file.close()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            reason = f"{workdir / LOCK}: cannot be written: {error}."
            raise StorageError(reason) from error
        raise
    return file


def _lock(file: TextIO, workdir: pathlib.Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                file.seek(0)
                who = file.read().strip() or "unknown"
                raise OccupiedError(
                    f"--workdir={workdir}: process {who} trains there; wait until it has "
                    "ended, stop it, or name another directory."
                ) from error
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise
        time.sleep(0.2)
