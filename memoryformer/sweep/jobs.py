"""Which jobs train a sweep's points, kept with the sweep, and what their schedulers say.

    ROOT/CONFIG/SWEEP/jobs.json    [{"launcher": "slurm", "job": "17",
                                     "points": {"0": "base_seed=0-0f3a9c52", ..}}, ..]

Points are found by the digest in their names, so that one which another sweep has submitted
is seen too. Start at `remember` (writes) and `look`.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from memoryformer.errors import StorageError
from memoryformer.files import atomic, lock
from memoryformer.sweep.launchers import LAUNCHERS
from memoryformer.sweep.launchers.base import ENDED, FAILED, QUEUED, RUNNING, Seen
from memoryformer.sweep.points import Point, Sweep

FILE = "jobs.json"
LOCK = "jobs.lock"
PATIENCE = 60.0  # seconds to wait for another `submit`
# Of several jobs that have had a point, the first of these counts, then the last job's.
_FIRST = (RUNNING, QUEUED)


@contextlib.contextmanager
def alone(sweep: Sweep) -> Iterator[None]:
    """Keep other submissions of the sweep out, which would start the same points."""
    sweep.directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.hold(sweep.directory / LOCK, PATIENCE))
        except lock.HeldError as error:
            raise StorageError(
                f"{sweep.directory}: process {error} submits this sweep; try again later."
            ) from error
        yield


def remember(sweep: Sweep, launcher: str, job: str, points: Sequence[Point]) -> None:
    """Add a job to those of the sweep; raises `StorageError`."""
    path = sweep.directory / FILE
    names = {str(point.index): point.workdir.name for point in points}
    entry = {"launcher": launcher, "job": job, "points": names}
    atomic.write_json(path, [*_read(path), entry], indent=1)


def look(sweep: Sweep) -> dict[int, Seen]:
    """Return {index: what is seen} of points whose jobs a scheduler remembers.

    Raises `ConfigError` where a scheduler cannot be asked, `StorageError` for a damaged
    file.
    """
    entries = [
        entry
        for path in sorted(sweep.directory.parent.glob(f"*/{FILE}"))
        for entry in _read(path)
    ]
    found: dict[str, Seen] = {}  # by digest
    for name, launcher in LAUNCHERS.items():
        ours = [entry for entry in entries if entry["launcher"] == name]
        if not ours:
            continue
        seen = launcher.look([entry["job"] for entry in ours])
        for entry in ours:
            for index, point in entry["points"].items():
                now = seen.get((entry["job"], int(index)))
                before = found.get(point[-8:])
                if now and not (before and before.state in _FIRST):
                    found[point[-8:]] = now
    digests = {point.workdir.name[-8:]: point.index for point in sweep.points}
    return {digests[d]: seen for d, seen in found.items() if d in digests}


def state(from_files: str, seen: Seen | None) -> str:
    """Return a point's state by its files and by its scheduler, which may know more.

    A run writes down how it ended; where the scheduler ended it nothing is written.
    """
    if seen is None or seen.state == ENDED or from_files == "done":
        return from_files
    if seen.state == FAILED and from_files not in ("partial", "new"):
        return from_files
    return seen.state


def _read(path: Any) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            whole = isinstance(entry["launcher"], str) and isinstance(entry["job"], str)
            if not whole or not all(map(str.isdecimal, entry["points"])):
                raise ValueError("an entry is no job's")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(
            f"{path}: cannot be read ({error}); remove it if no job of the sweep is left."
        ) from error
    return entries
