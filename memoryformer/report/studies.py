"""Runs and groups of them, from their files alone. Start at `load`."""

import dataclasses
import functools
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memoryformer import accounting
from memoryformer import config as config_lib
from memoryformer.errors import ConfigError, DataError, StorageError
from memoryformer.model import ModelConfig
from memoryformer.report import about as about_lib
from memoryformer.runs import compatibility, outcome
from memoryformer.runs import directory as directory_lib
from memoryformer.sweep import files, points
from memoryformer.sweep import statistics as statistics_lib
from memoryformer.training import experiment

LOSS, BITS, VALIDATION = "train/loss", "val/bits_per_byte", "val/loss"
SPEED = "train/tokens_per_second"
NAMES = {
    BITS: "validation, bits per byte",
    VALIDATION: "validation loss, nats per token",
    LOSS: "training loss, nats per token",
    SPEED: "tokens per second",
}
MAX_DEPTH = 4  # folders below a named one in which runs are looked for

Series = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory."""

    workdir: pathlib.Path
    config: Mapping[str, Any]  # flat, as JSON has it
    rows: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)
    label: str = ""  # what a sweep calls it
    state: str = "partial"  # 'done', 'failed' or 'partial'; see `outcome`

    @property
    def seed(self) -> int:
        """Of parameters and data."""
        return self.config.get("train.seed", 0)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.config["train.batch_size"] * self.config["model.seq_len"]

    @functools.cached_property
    def cost(self) -> accounting.Accounting:
        """FLOPs and parameters of its model."""
        section = config_lib.nest(self.config)["model"]
        return accounting.count(ModelConfig.from_config(section))

    def series(self, metric: str, against: str = "tokens") -> Series:
        """Return a metric over tokens, FLOPs or steps; what is not finite is left out."""
        points = [(r["step"], float(r[metric])) for r in self.rows if metric in r]
        points = [(step, value) for step, value in points if np.isfinite(value)]
        steps = np.array([step for step, _ in points], float)
        tokens = steps * self.tokens_per_step
        x = {
            "steps": steps,
            "tokens": tokens,
            "flops": tokens * self.cost.training_flops_per_token,
        }[against]
        return x, np.array([value for _, value in points])

    def last(self, metric: str) -> float | None:
        """Return the last finite value of a metric, the median of a speed."""
        values = self.series(metric)[1]
        if not len(values):
            return None
        if metric in files.MEDIANS:
            return statistics.median(values.tolist())
        return float(values[-1])


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs that are compared with each other; the first variant is the baseline."""

    name: str
    runs: Sequence[Run]
    about: about_lib.About = about_lib.NOTHING

    @property
    def title(self) -> str:
        """What a person called it, else the name of its sweep."""
        return self.about.title or self.name

    @functools.cached_property
    def varying(self) -> list[str]:
        """The fields in which runs differ, but for seeds and bookkeeping."""
        same = {*points.SEEDS, *points.bookkeeping()}
        return [field for field in differing(self.runs) if field not in same]

    @functools.cached_property
    def variants(self) -> dict[str, list[Run]]:
        """Runs by what they have in common, but for their seeds, in order."""
        groups: dict[tuple, list[Run]] = {}
        for run in self.runs:
            key = tuple(str(run.config.get(field)) for field in self.varying)
            groups.setdefault(key, []).append(run)
        named: dict[str, list[Run]] = {}
        for key, runs in groups.items():
            fields = dict(zip(self.varying, key, strict=True))
            label = runs[0].label or points.describe(fields) or runs[0].workdir.name
            while label in named:
                label += "'"
            named[label] = runs
        return named

    @property
    def provisional(self) -> bool:
        """Whether no run has ended, so that all there are stand in for results."""
        return all(run.state == "partial" for run in self.runs)

    def counted(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs that results are of: those that are done."""
        return [run for run in runs if self.provisional or run.state == "done"]

    @property
    def drawn(self) -> dict[str, list[Run]]:
        """The variants as counted; those of which nothing is done as far as they are."""
        return {k: self.counted(runs) or runs for k, runs in self.variants.items()}

    def summaries(self, metric: str) -> list[statistics_lib.Summary]:
        """Mean and spread of a metric's last values, of the variants that have it."""
        summaries = []
        for label, variant in self.variants.items():
            runs = self.counted(variant)
            values = [v for v in (run.last(metric) for run in runs) if v is not None]
            if values:
                summaries.append(statistics_lib.summarise(label, values))
        return summaries

    @property
    def headline(self) -> str:
        """The metric to compare: bits per byte where all that count have it, else a loss."""
        runs = self.counted(self.runs) or self.runs
        for metric in (BITS, VALIDATION, LOSS):
            if all(run.last(metric) is not None for run in runs):
                return metric
        return BITS


def load(directories: Sequence[pathlib.Path]) -> list[Study]:
    """Read every run in or below `directories`: a study per sweep, one of all others.

    Damaged ones are left out, each told in a line. Raises `DataError` where there is none,
    `StorageError` where all are damaged.
    """
    studies, others, seen = [], [], set()
    damaged: list[StorageError] = []
    for directory in directories:
        if not directory.is_dir():
            raise DataError(f"{directory}: there is no such directory.")
        for manifest in _below(directory, files.MANIFEST):
            sweep = manifest.parent
            of_points = _of_sweep(sweep, damaged)
            seen |= {(sweep / name).resolve() for name in of_points}
            runs = [run for run in of_points.values() if run]
            if runs:
                studies.append(Study(sweep.name, runs, _about(sweep, damaged)))
        for path in _below(directory, "metrics.jsonl"):
            if path.parent.resolve() not in seen:
                seen.add(path.parent.resolve())
                others.append(_run(path.parent, damaged))
    runs = [run for run in others if run is not None]
    if runs:
        studies.append(Study("runs", runs))
    if damaged and not studies:
        raise damaged[0]
    for error in damaged:
        print(f"note: left out: {error}", file=sys.stderr, flush=True)
    if not studies:
        listed = ", ".join(map(str, directories))
        raise DataError(f"{listed}: holds no run (config.json and metrics.jsonl).")
    return studies


def _about(folder: pathlib.Path, damaged: list[StorageError]) -> about_lib.About:
    """What a person wrote of a sweep; else the docstring of its function, kept with it."""
    try:
        written = about_lib.read(folder)
        titles = directory_lib.read_json(folder / files.MANIFEST).get("titles", ())
    except StorageError as error:
        damaged.append(error)
        return about_lib.NOTHING
    if written.title or not titles:
        return written
    return about_lib.About(str(titles[0]))


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the fields that are not the same in all runs."""
    fields = sorted(set().union(*(run.config for run in runs)))
    return [f for f in fields if len({str(run.config.get(f)) for run in runs}) > 1]


def _below(directory: pathlib.Path, name: str) -> list[pathlib.Path]:
    patterns = ("*/" * depth + name for depth in range(MAX_DEPTH + 1))
    return [path for pattern in patterns for path in sorted(directory.glob(pattern))]


def _of_sweep(
    directory: pathlib.Path, damaged: list[StorageError]
) -> dict[str, Run | None]:
    """The runs of a sweep by the name of their folder, None for one that cannot be read."""
    path = directory / files.MANIFEST
    try:
        points = directory_lib.read_json(path)["points"]
        labels = {str(name): str(point["label"]) for name, point in points.items()}
    except StorageError as error:
        damaged.append(error)
        return {}
    except (AttributeError, KeyError, TypeError):
        damaged.append(StorageError(f"{path}: is no list of a sweep's points."))
        return {}
    return {
        name: _run(directory / name, damaged, label) for name, label in labels.items()
    }


def _run(
    workdir: pathlib.Path, damaged: list[StorageError], label: str = ""
) -> Run | None:
    """Read a run; None where there is none, or, `damaged`, none that can be read."""
    path = workdir / "config.json"
    try:
        rows = files.read_rows(workdir)
        if not path.exists() or not rows:
            return None
        config = experiment.complete(directory_lib.read_json(path))
    except StorageError as error:
        damaged.append(error)
        return None
    except ConfigError as error:
        damaged.append(StorageError(f"{path}: {error}"))
        return None
    ended = outcome.read(workdir) or {"state": "partial"}
    flat = config_lib.flatten(compatibility.plain(config))
    return Run(workdir, flat, rows, label, ended["state"])
