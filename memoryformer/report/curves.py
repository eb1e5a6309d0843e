"""Losses of one or more runs over their training. Start at `curves_figure`."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker

from memoryformer import errors
from memoryformer.report import drawing
from memoryformer.runs import metrics

METRICS = ("train/loss", "train/tokens", "val/loss", "val/bits_per_byte")
MARKS = {"marker": "o", "markersize": 4}
WITHIN = 3  # lines of a legend that leave room for the curves; more stand below
LINE_HEIGHT = 0.23  # of a legend, inches

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]  # metric -> steps, values


def curves_figure(workdirs: Sequence[pathlib.Path]) -> plt.Figure:
    """Draw training and validation loss, and bits per byte, of one or more runs.

    The x axis is tokens if every run logs `train/tokens`, else steps. Raises
    `StorageError` for a run without `metrics.jsonl`, `DataError` for one without losses.
    """
    runs = {name: _read(workdir) for name, workdir in _names(workdirs).items()}
    by_tokens = all(len(curves["train/tokens"][0]) for curves in runs.values())
    with_bytes = any(len(curves["val/bits_per_byte"][0]) for curves in runs.values())
    columns = 1 + with_bytes
    size = (1.0 + 5.4 * columns, 4.2)
    figure, all_axes = plt.subplots(1, columns, figsize=size, squeeze=False)
    loss_axes, bytes_axes = all_axes[0, 0], all_axes[0, -1]
    tops = [
        _draw_losses(loss_axes, name, curves, by_tokens, drawing.series_style(index))
        for index, (name, curves) in enumerate(runs.items())
    ]
    if np.isfinite(max(tops)):
        loss_axes.set_ylim(top=1.05 * max(tops))
    loss_axes.set(ylabel="loss (nats per token)", title="Loss")
    if with_bytes:
        for index, (name, curves) in enumerate(runs.items()):
            x, y = _against(curves, "val/bits_per_byte", by_tokens)
            label = f"{name}, validation: {y[-1]:.3f} at the end" if len(x) else ""
            style = drawing.series_style(index) | MARKS
            bytes_axes.plot(x, y, label=label or None, **style)
        bytes_axes.set(ylabel="bits per byte", title="Bits per byte of validation text")
    for axes in all_axes.flat:
        axes.set(xlabel="training tokens" if by_tokens else "step", xlim=(0, None))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    below = max(map(_legend, all_axes.flat))
    figure.set_figheight(size[1] + LINE_HEIGHT * below)
    return figure


def _draw_losses(
    axes: plt.Axes, name: str, curves: Curves, by_tokens: bool, style: dict[str, Any]
) -> float:
    """Draw a run's losses and return the highest that the picture should show."""
    x, y = _against(curves, "train/loss", by_tokens)
    mean_x, mean_y, window = drawing.running_mean(x, y)
    label = f"{name}, train"
    if window > 1:
        label += f" (mean of {window})"
        axes.plot(x, y, color=style["color"], alpha=0.25, linewidth=0.8)
    axes.plot(mean_x, mean_y, label=label, **style)
    x, y = _against(curves, "val/loss", by_tokens)
    if len(x):
        dashed = style | MARKS | {"linestyle": "--"}
        axes.plot(x, y, label=f"{name}, validation", **dashed)
    return max(drawing.after_start(mean_y), float(np.max(y, initial=-np.inf)))


def _read(workdir: pathlib.Path) -> Curves:
    """Steps and values of each metric; what is not a finite number is left out."""
    points: dict[str, dict[int, float]] = {name: {} for name in METRICS}
    for row in metrics.read(workdir):
        for name in METRICS:
            if name in row and np.isfinite(float(row[name])):
                points[name][row["step"]] = float(row[name])
    if not points["train/loss"] and not points["val/loss"]:
        raise errors.DataError(f"{workdir}/metrics.jsonl: holds no loss yet.")
    curves = {}
    for name, values in points.items():
        steps = sorted(values)
        curves[name] = (np.array(steps), np.array([values[step] for step in steps]))
    return curves


def _against(
    curves: Curves, name: str, by_tokens: bool
) -> tuple[np.ndarray, np.ndarray]:
    steps, values = curves[name]
    if not by_tokens or not len(steps):
        return steps, values
    # Validation rows need not say how many tokens were trained on; their step does.
    return np.interp(steps, *curves["train/tokens"]), values


def _names(workdirs: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Label each run by as much of the end of its path as tells it from the others."""
    resolved = list(dict.fromkeys(workdir.resolve() for workdir in workdirs))
    depth = 1
    while len({w.parts[-depth:] for w in resolved}) < len(resolved):
        depth += 1
    return {os.path.join(*w.parts[-depth:]): w for w in resolved}


def _legend(axes: plt.Axes) -> int:
    """Show the label of every line that was given one, as it is; return how many stand below.

    Matplotlib leaves out labels that begin with `_`, and reads `$` as a formula.
    """
    unnamed = re.compile(r"_child\d+")  # what it calls lines without a label
    lines = [x for x in axes.get_lines() if not unnamed.fullmatch(str(x.get_label()))]
    below = len(lines) if len(lines) > WITHIN else 0
    legend = axes.legend(lines, list(map(str, range(len(lines)))))
    if below:
        legend.set_loc("upper center")
        legend.set_bbox_to_anchor((0.5, -0.16), axes.transAxes)
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)
        text.set_text(line.get_label())
    return below
