"""How a run ended, in one small file of its workdir: what a sweep skips, resumes or lists.

    workdir/outcome.json    {"state": "done"}
                            {"state": "failed", "exit_code": 44, "error": "step 12: ..."}

It is there from the moment a run ends until it is started again. A run that was killed,
stopped (exit code 42) or hung (43) leaves none: it is to be started again.
Start at `recorded` (writes) and `read`.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from memoryformer.cluster import processes
from memoryformer.errors import ConfigError, HangError, Preempted, StorageError, as_ours
from memoryformer.files import atomic
from memoryformer.runs import directory

FILE = "outcome.json"


@contextlib.contextmanager
def recorded(workdir: str | os.PathLike) -> Iterator[None]:
    """Write down how the block ended; process 0 alone does.

    Raises `StorageError` where what the last run wrote down cannot be taken away.
    """
    path = pathlib.Path(workdir) / FILE
    if not processes.is_chief():
        yield
        return
    before = read(workdir)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error}.") from error
    try:
        yield
    except (Preempted, HangError):
        raise
    except Exception as error:
        if isinstance(error, ConfigError) and (before or _has_begun(path.parent)):
            if before:  # refused: the run that is there stays what it was
                _write(path, before)
            raise
        ours = as_ours(error)  # as the process will end
        code = ours.exit_code if ours else 1
        text = str(ours) if ours else f"{type(error).__name__}: {error}"
        _write(path, {"state": "failed", "exit_code": code, "error": text})
        raise
    _write(path, {"state": "done"})


def _has_begun(workdir: pathlib.Path) -> bool:
    """Whether a run lies there that was killed, so that it has no outcome."""
    return any((workdir / "checkpoints").glob("[0-9]*"))


def read(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Return what the last run in `workdir` wrote down; None if nothing that makes sense."""
    try:
        facts = directory.read_json(pathlib.Path(workdir) / FILE)
    except StorageError:
        return None
    if facts.get("state") == "done":
        return facts
    failed = facts.get("state") == "failed" and isinstance(facts.get("exit_code"), int)
    return facts if failed and isinstance(facts.get("error"), str) else None


def _write(path: pathlib.Path, facts: dict[str, Any]) -> None:
    # A full disk is no reason to hide what ended the run.
    with contextlib.suppress(StorageError):
        atomic.write_json(path, facts)
