"""The memory degradation meter over training, of the points of a sweep. Start at `slots_figure`."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt

from memoryformer import errors
from memoryformer.report import drawing
from memoryformer.runs import directory as directory_lib
from memoryformer.sweep import files

PREFIX = "degradation/"
FIGURES = {"cosine": "mean cosine of two slots", "effective_rank": "effective rank"}


def slots_figure(directories: Sequence[pathlib.Path]) -> plt.Figure:
    """Draw cosine and effective rank of each memory of a model: mean and range over seeds.

    directories: of sweeps. Rows of panels are figures, columns memories. Memories of one slot
    are left out: they have no pairs. Raises `DataError` where no run has measured any.
    """
    series = {
        label: seeds for folder in directories for label, seeds in _read(folder).items()
    }
    memories = sorted({name for seeds in series.values() for name in _names(seeds[0])})
    if not memories:
        listed = ", ".join(map(str, directories))
        raise errors.DataError(f"{listed}: no run has figures of a memory's slots.")
    size = (1.2 + 4.0 * len(memories), 6.2)
    figure, all_axes = plt.subplots(
        2, len(memories), figsize=size, sharex=True, sharey="row", squeeze=False
    )
    for row, (key, title) in zip(all_axes, FIGURES.items(), strict=True):
        for axes, memory in zip(row, memories, strict=True):
            for index, (label, seeds) in enumerate(series.items()):
                steps, values = _over_seeds(seeds, f"{PREFIX}{memory}/{key}")
                style = drawing.series_style(index)
                axes.plot(steps, values.mean(0), marker="o", ms=3, label=label, **style)
                low, high = values.min(0), values.max(0)
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15)
            axes.set(title=memory if key == "cosine" else "", xlim=(0, None))
        row[0].set_ylabel(title)
    for axes in all_axes[-1]:
        axes.set_xlabel("step")
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _read(folder: pathlib.Path) -> dict[str, list[list[dict]]]:
    """{variant: rows of each seed} of a sweep's points that have several slots."""
    series: dict[str, list[list[dict]]] = {}
    points = directory_lib.read_json(folder / files.MANIFEST)["points"]
    for name, point in points.items():
        rows = [r for r in files.read_rows(folder / name) if _names([r])]
        ranks = [float(v) for r in rows for k, v in r.items() if k.endswith("_rank")]
        if ranks and max(ranks) > 1 + 1e-4:
            series.setdefault(point["label"], []).append(rows)
    return series


def _names(rows: Sequence[dict]) -> set[str]:
    """Memories that rows have figures of: 'blocks.0.mixer'."""
    keys = {key for row in rows for key in row if key.startswith(PREFIX)}
    return {key.removeprefix(PREFIX).rpartition("/")[0] for key in keys}


def _over_seeds(seeds, metric):
    """(steps [S], values [seeds, S]) at the steps that all seeds have."""
    tables = [
        {r["step"]: float(r[metric]) for r in rows if metric in r} for rows in seeds
    ]
    steps = sorted(set.intersection(*map(set, tables)))
    return np.array(steps), np.array([[table[s] for s in steps] for table in tables])
