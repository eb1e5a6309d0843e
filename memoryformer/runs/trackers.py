"""Trackers: TensorBoard and Weights & Biases, which show the rows of `metrics.jsonl` too.

Start at `chosen`, `tensorboard` and `wandb`.
"""

import contextlib
import functools
import importlib
import importlib.util
import pathlib
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from memoryformer.errors import ConfigError
from memoryformer.files import atomic


def chosen(text: str) -> dict[str, str]:
    """'tensorboard,wandb:mine' -> {'tensorboard': '', 'wandb': 'mine'}; raises `ConfigError`."""
    projects = {}
    for word in filter(None, map(str.strip, text.split(","))):
        name, _, project = word.partition(":")
        if name not in ("tensorboard", "wandb") or bool(project) != (name == "wandb"):
            raise ConfigError(
                f"metrics.trackers={text!r}: there is no {word!r}; name tensorboard, "
                "wandb:PROJECT, both with a comma between, or nothing."
            )
        projects[name] = project
    return projects


def tensorboard(workdir: pathlib.Path, start_step: int) -> list["Tracker"]:
    """Return the tracker that writes `workdir/tensorboard`; none without tensorboardX."""
    if not importlib.util.find_spec("tensorboardX"):
        return []
    return [Tracker("TensorBoard", functools.partial(_Board, workdir, start_step))]


def wandb(
    workdir: pathlib.Path, project: str, run_config: Mapping[str, Any] | None
) -> list["Tracker"]:
    """Return the tracker of a Weights & Biases project."""
    start = functools.partial(_Wandb, workdir, project, run_config)
    return [Tracker("Weights & Biases", start)]


class Tracker:
    """Another place for the rows, which the run can do without.

    What it raises (no network, no login, a full disk) is one line on standard error, and it
    gets no more rows: `metrics.jsonl` has them all.
    """

    def __init__(self, name: str, start: Callable[[], "_Board | _Wandb"]):
        self._name = name
        self._target: _Board | _Wandb | None = None
        with self._forgiven():
            self._target = start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass a row on."""
        if self._target is not None:
            with self._forgiven():
                self._target.log(row)

    def close(self) -> None:
        """End it."""
        if self._target is not None:
            with self._forgiven():
                self._target.close()

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._target = None
            reason = " ".join(str(error).split())[:200] or "no reason given"
            print(
                f"{self._name} gets no more metrics ({type(error).__name__}: {reason}); "
                "metrics.jsonl has them all.",
                file=sys.stderr,
                flush=True,
            )


class _Board:
    def __init__(self, workdir: pathlib.Path, start_step: int):
        board = importlib.import_module("tensorboardX")
        self._writer = board.SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=start_step + 1 if start_step else None,
            flush_secs=10,
            # A full disk ends the thread that empties the queue, and who finds it full
            # waits for ever. Long before that `metrics.jsonl` says that the disk is full.
            max_queue=500,
        )
        self.close = self._writer.close

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                self._writer.add_scalar(name, value, row["step"])


class _Wandb:
    """Start or continue the run whose id is kept in the workdir."""

    def __init__(self, workdir: pathlib.Path, project: str, run_config: Any):
        if not importlib.util.find_spec("wandb"):
            raise ConfigError(
                f"metrics.trackers='wandb:{project}': wandb is not installed; "
                "`pip install wandb`, or leave it out."
            )
        wandb = importlib.import_module("wandb")
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            atomic.write_text(id_file, secrets.token_hex(4))
        run = wandb.init(
            project=project,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(workdir),
            config=dict(run_config or {}),
        )
        # Rows carry their own step: the tracker's counter may not go back after a restart.
        run.define_metric("*", step_metric="step")
        self.log, self.close = run.log, run.finish
