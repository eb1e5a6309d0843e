"""The charts of a report page: a metric over tokens or FLOPs, and bars of a speed.

Start at `band`, which turns the runs of a variant into a line, and `lines`, which draws them.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker

from memoryformer.report import drawing
from memoryformer.report.studies import LOSS, Run
from memoryformer.runs import console


@dataclasses.dataclass(frozen=True)
class Band:
    """Mean, lowest and highest over the seeds of one variant; arrays of one length."""

    name: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    marks: bool = False  # a dot at each value


def band(
    name: str, runs: Iterable[Run], metric: str, against: str, *, marks: bool
) -> Band:
    """Return mean and range over the seeds, where all of them have a value.

    A run that is behind (none is done) ends its seeds' line: a mean of fewer would jump.
    """
    series = [run.series(metric, against) for run in runs]
    series = [(x, y) for x, y in series if len(x)]
    if not series:
        empty = np.zeros(0)
        return Band(name, empty, empty, empty, empty, marks)
    common = functools.reduce(np.intersect1d, [x for x, _ in series])
    values = np.stack([y[np.searchsorted(x, common)] for x, y in series])
    if metric == LOSS:
        common, values, _ = drawing.running_mean(common, values)
    return Band(name, common, values.mean(0), values.min(0), values.max(0), marks)


@drawing.page_style()
def lines(
    bands: Sequence[Band], x_label: str, y_label: str, *, log_x: bool = False
) -> plt.Figure:
    """Draw bands over one x axis; the first tenth of each may leave the picture.

    Band i has colour i, and that of its place in `bands` also where others are empty.
    """
    figure, axes = plt.subplots(figsize=(4.6, 3.0))
    for index, one in enumerate(bands):
        style = drawing.series_style(index)
        if not np.array_equal(one.low, one.high):
            axes.fill_between(
                one.x, one.low, one.high, color=style["color"], alpha=0.17, linewidth=0
            )
        dots: dict[str, Any] = {"marker": "o", "markersize": 3} if one.marks else {}
        axes.plot(one.x, one.mean, label=one.name, **style, **dots)
    drawn = [one for one in bands if len(one.x)]
    low = min(float(one.low.min()) for one in drawn)
    high = max(drawing.after_start(one.high) for one in drawn)
    margin = 0.06 * (high - low) or 0.5
    axes.set(xlabel=x_label, ylabel=y_label, ylim=(low - margin, high + margin))
    if log_x:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.grid(axis="x", visible=False)
    return figure


@drawing.page_style()
def bars(
    names: Sequence[str], values: Sequence[tuple[float, float, float]]
) -> plt.Figure:
    """Draw a horizontal bar per name: (low, mean, high), the range as a whisker."""
    figure, axes = plt.subplots(figsize=(4.6, 0.5 + 0.4 * len(names)))
    for index, (name, (low, mean, high)) in enumerate(zip(names, values, strict=True)):
        axes.barh(index, mean, 0.3, color=drawing.series_style(index)["color"])
        axes.plot([low, high], [index, index], color=drawing.INK, linewidth=1.2)
        text = f"{name}: {console.short_number(mean)}"
        axes.text(0, index - 0.25, text, va="bottom", parse_math=False)
    axes.set(ylim=(len(names) - 0.5, -0.8), xlim=(0, None), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    return figure
