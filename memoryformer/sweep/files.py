"""What the files of a point say: its state, its numbers. Start at `state` and `values`."""

import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

from memoryformer.files import atomic
from memoryformer.runs import metrics, outcome
from memoryformer.sweep.points import Point, Sweep

STATES = ("done", "failed", "partial", "new")
MEDIANS = ("train/tokens_per_second", "train/step_seconds")  # of all rows
MANIFEST = "sweep.json"


@dataclasses.dataclass(frozen=True)
class State:
    """How far a point is: 'done', 'failed', 'partial' (to be resumed) or 'new'."""

    name: str
    step: int = 0  # of the last row
    loss: float | None = None  # of the last training row
    exit_code: int = 0  # of a failed one
    error: str = ""
    age: float | None = None  # seconds since the last row


def state(point: Point) -> State:
    """Read a point's state from its directory, whoever ran it and wherever."""
    rows = read_rows(point.workdir)
    step = rows[-1]["step"] if rows else 0
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    loss = float(losses[-1]) if losses else None
    ended = outcome.read(point.workdir)
    if ended and ended["state"] == "done":
        return State("done", step, loss)
    if ended:
        return State("failed", step, loss, ended["exit_code"], ended["error"])
    if not rows and not any((point.workdir / "checkpoints").glob("[0-9]*")):
        return State("new")
    path = point.workdir / "metrics.jsonl"
    age = time.time() - path.stat().st_mtime if rows else None
    return State("partial", step, loss, age=age)


def values(workdir: pathlib.Path, names: Sequence[str]) -> dict[str, float]:
    """Return each metric's last value, or its median where rows are samples of it."""
    rows = read_rows(workdir)
    last = {}
    for name in names:
        seen = [float(row[name]) for row in rows if name in row]
        if seen:
            last[name] = statistics.median(seen) if name in MEDIANS else seen[-1]
    return last


def read_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, none if there is no such file yet."""
    if not (pathlib.Path(workdir) / "metrics.jsonl").exists():
        return []
    return metrics.read(workdir)


def write_manifest(sweep: Sweep) -> None:
    """Write the sweep's points into its directory, for those who see only files."""
    points = {
        os.path.relpath(point.workdir, sweep.directory): {
            "label": point.variant,
            "overrides": dict(point.overrides),
        }
        for point in sweep.points
    }
    path = sweep.directory / MANIFEST
    facts = {
        "config": sweep.config,
        "sweeps": sweep.names,
        "titles": sweep.titles,  # of these sweeps
        "points": points,
    }
    atomic.write_json(path, facts, indent=1)
