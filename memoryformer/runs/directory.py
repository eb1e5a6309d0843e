"""The directory of a run: one process at a time trains in it.

    workdir/lock    the process that trains here, or was the last to: "4711 on node17"

Start at `only_one`.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from memoryformer.cluster import processes
from memoryformer.errors import ConfigError, StorageError
from memoryformer.files import lock

LOCK = "lock"
# What makes a folder a run or an exported model: lost, nothing else in it can be read.
_RUN_FILES = (
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "reader.py",
    "metrics.jsonl",
    "outcome.json",
    LOCK,
)


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
    with contextlib.ExitStack() as stack:
        try:
            pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.hold(pathlib.Path(workdir) / LOCK, patience))
        except lock.HeldError as error:
            raise OccupiedError(
                f"--workdir={workdir}: process {error} trains there; wait until it has "
                "ended, stop it, or name another directory."
            ) from error
        except OSError as error:
            raise StorageError(
                f"--workdir={workdir}: cannot be used: {error}."
            ) from error
        yield


def refuse_foreign(
    workdir: str | os.PathLike, sections: Iterable[str] = ("model", "data", "train")
) -> None:
    """Raise `ConfigError` if the config.json in `workdir` lacks a run's sections: an export's, say."""
    path = pathlib.Path(workdir) / "config.json"
    try:
        config = read_json(path)
    except StorageError:  # none, or damaged: a run writes its own anew
        return
    if not set(sections) <= config.keys():
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
    read_too = [pathlib.Path(folder, name) for folder in folders for name in _RUN_FILES]
    for read in (*map(pathlib.Path, files), *read_too):
        same = os.path.realpath(output) == os.path.realpath(read)
        if not same and os.path.exists(output) and read.exists():
            same = os.path.samefile(output, read)
        if same:
            raise ConfigError(
                f"--output={output}: is {read}, which would be written over; name "
                "another file."
            )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises `StorageError` if it holds none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}.") from error
    return parsed_json(content, path)


def parsed_json(content: bytes, name: str | os.PathLike) -> dict[str, Any]:
    """Return the JSON object that a file holds; raises `StorageError` if it is none."""
    try:
        value = json.loads(content.decode("utf-8"))
    # Neither UTF-8 nor JSON: ValueErrors; nested too deep to be read: RecursionError.
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{name}: cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise StorageError(f"{name}: cannot be read: it holds no JSON object.")
    return value
