"""Metrics: an append-only JSON-lines file, optional trackers and one progress line.

`metrics.jsonl` is the truth, one object per line: `step` (updates done when the values
were taken) and named values in full precision. What depends on the wall clock has a name
in `WALL_CLOCK`; everything else is equal bit for bit between two runs of one config
(`comparable`). Values that are not finite are written as strings ("nan", "inf"): the
file stays valid JSON and `float(value)` reads all of them. Start at `MetricsWriter`.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TextIO

import jax

from memoryformer import config as config_lib
from memoryformer.errors import StorageError
from memoryformer.files import atomic
from memoryformer.runs import trackers

MAX_STEP = 2**53  # beyond it a float has no neighbour one step away
WALL_CLOCK = frozenset(
    {
        "train/tokens_per_second",
        "train/step_seconds",
        "train/compile_seconds",
        "train/data_fraction",
        "train/mfu",
        "train/memory_bytes",
        "train/wall_seconds",
        "val/seconds",
    }
)


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go besides `metrics.jsonl`."""

    trackers: str = config_lib.field(
        "nothing",
        "tensorboard",
        local=True,
        doc="tensorboard (if tensorboardX is installed), wandb:PROJECT, both with a comma or ''.",
    )

    def __post_init__(self):
        trackers.chosen(self.trackers)


class MetricsWriter:
    """Write rows of metrics; process 0 alone touches the disk.

    A run that starts again from the checkpoint of step `start_step` (0: from scratch)
    first drops the rows of later steps and a half-written last line, atomically. So the
    rows of step s must be written before the checkpoint of step s is asked for.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: MetricsConfig,
        start_step: int = 0,
        *,
        run_config: Mapping[str, Any] | None = None,
    ):
        self._file: TextIO | None = None
        self._trackers: list[trackers.Tracker] = []
        workdir = pathlib.Path(workdir)
        path = self._path = workdir / "metrics.jsonl"
        if jax.process_index() != 0:
            return
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            _drop_after(path, start_step)
            self._file = path.open("a", encoding="utf-8")
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error}.") from error
        chosen = trackers.chosen(config.trackers)
        if "tensorboard" in chosen:
            self._trackers += trackers.tensorboard(workdir, start_step)
        if "wandb" in chosen:
            self._trackers += trackers.wandb(workdir, chosen["wandb"], run_config)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row. Values are numbers, strings or arrays of one element."""
        if self._file is None:
            return
        row = {"step": int(step)} | {k: _plain(v) for k, v in values.items()}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{self._path}: step {step}: cannot be written: {error}."
            ) from error
        for tracker in self._trackers:
            tracker.log(row)

    def close(self) -> None:
        """Flush and close everything; may be called twice. Raises `StorageError`."""
        file, self._file = self._file, None
        served, self._trackers = self._trackers, []
        try:
            if file is not None:
                file.close()
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written: {error}.") from error
        finally:
            for tracker in served:
                tracker.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: Any, exception: BaseException | None, trace: Any) -> None:
        try:
            self.close()  # flushes once more what a full disk has not taken
        except StorageError:
            if exception is None:
                raise  # else never hide what ended the run


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of `workdir/metrics.jsonl`, half-written and broken lines left out."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    try:
        lines = _lines(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}.") from error
    return [row for row in map(_parse, lines) if row is not None]


def comparable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row without what depends on the wall clock."""
    return {k: v for k, v in row.items() if k not in WALL_CLOCK}


def _drop_after(path: pathlib.Path, start_step: int) -> None:
    """Rewrite `path` without rows after `start_step` (0: all) and without broken ones."""
    if not path.exists():
        return
    lines = _lines(path)
    rows = [(line, _parse(line)) for line in lines]
    kept = [line for line, row in rows if row and 0 < start_step >= row["step"]]
    if len(kept) == len(lines):
        return
    atomic.write_text(path, "".join(kept))


def _lines(path: pathlib.Path) -> list[str]:
    """The lines with their ends, which are \\n alone."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        return file.readlines()


def _parse(line: str) -> dict[str, Any] | None:
    if not line.endswith("\n"):
        return None  # the writer was killed in the middle of this line
    try:
        row = json.loads(line)
        step = row["step"]
        whole = isinstance(step, int) and 0 <= step < MAX_STEP
        whole = whole and all(map(_is_value, row.items()))
    except (ValueError, RecursionError, TypeError, KeyError, OverflowError):
        return None
    return row if whole else None


def _is_value(item: tuple[str, Any]) -> bool:
    """Whether a metric (`train/loss`) is a number, perhaps as text: 'nan'."""
    name, value = item
    if "/" in name:
        float(value)  # TypeError or ValueError
    return True


def _plain(value: Any) -> int | float | str:
    if isinstance(value, str | bool):
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
