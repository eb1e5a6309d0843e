"""How a run ended, in one small file of its workdir: what a sweep skips, resumes or lists.

    workdir/outcome.json    {"state": "done"}
                            {"state": "failed", "exit_code": 44, "error": "step 12: ..."}

It is there from the moment a run ends until it is started again. A run that was killed,
stopped (exit code 42) or hung (43) leaves none: it is to be started again.
Start at `recorded` (writes) and `read`.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from memoryformer import processes
from memoryformer.errors import ConfigError, HangError, MemoryFormerError, Preempted

FILE = "outcome.json"


@contextlib.contextmanager
def recorded(workdir: str | os.PathLike) -> Iterator[None]:
    """Write down how the block ended; process 0 alone does."""
    path = pathlib.Path(workdir) / FILE
    if not processes.is_chief():
        yield
        return
    before = read(workdir)
    path.unlink(missing_ok=True)
    try:
        yield
    except (Preempted, HangError):
        raise
    except Exception as error:
        if before and isinstance(error, ConfigError):
            _write(path, before)  # refused: the run that is there stays what it was
            raise
        code = error.exit_code if isinstance(error, MemoryFormerError) else 1
        text = f"{type(error).__name__}: {error}" if code == 1 else str(error)
        _write(path, {"state": "failed", "exit_code": code, "error": text})
        raise
    _write(path, {"state": "done"})


def read(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Return what the last run in `workdir` wrote down, or None."""
    try:
        return json.loads((pathlib.Path(workdir) / FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _write(path: pathlib.Path, facts: dict[str, Any]) -> None:
    # A full disk is no reason to hide what ended the run.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".json.tmp")
        fresh.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        os.replace(fresh, path)
