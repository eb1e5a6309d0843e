"""How every picture is drawn: colours, smoothing, and a figure as a file or as SVG text."""

import contextlib
import html
import io
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import cycler
import matplotlib
import numpy as np

from memoryformer import errors

matplotlib.use("Agg")  # no display needed; before pyplot is imported
from matplotlib import pyplot as plt

# Okabe and Ito's colours with a grey for their black, told apart by every kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b")
INK, FAINT, RULE = "#1b1b1a", "#6a6a66", "#dededa"
STYLE: dict[Any, Any] = {  # Any: matplotlib wants its own literals as keys
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
# In a page: text stays text, and equal figures are equal to the byte.
PAGE_STYLE = STYLE | {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color"), FAINT),
    **dict.fromkeys(("xtick.color", "ytick.color"), FAINT),
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "grid.alpha": 1.0,
    "grid.color": RULE,
    "svg.fonttype": "none",
    "svg.hashsalt": "memoryformer",
}
# The page's style sheet knows these, light and dark.
VARIABLES = {colour: f"--c{i}" for i, colour in enumerate(COLOURS)}
VARIABLES |= {INK: "--ink", FAINT: "--faint", RULE: "--rule"}


def series_style(index: int) -> dict[str, Any]:
    """Colour and line style of series `index`; from the eighth on lines are dashed."""
    line = "-" if index < len(COLOURS) else "--"
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": line}


@contextlib.contextmanager
def page_style() -> Iterator[None]:
    """Draw as pages do: a context manager, and a decorator."""
    with plt.rc_context(PAGE_STYLE):
        yield


def running_mean(
    x: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Average x [N] and values [.., N] over neighbours; returns also how many those are.

    2 % of the points make one mean; there are fewer means than points, none of fewer values.
    """
    window = max(1, len(x) // 50)
    kernel = np.full(window, 1 / window)

    def mean(row):
        return np.convolve(row, kernel, mode="valid") if len(row) else row

    return mean(x), np.apply_along_axis(mean, -1, values), window


def after_start(values: np.ndarray) -> float:
    """Return the highest value after the first tenth, which would flatten the others."""
    return float(np.max(values[len(values) // 10 :], initial=-np.inf))


def folder(name: str | os.PathLike) -> pathlib.Path:
    """Return a folder for pictures, made if need be; raises `StorageError`."""
    path = pathlib.Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.StorageError(f"{path}: cannot be made: {error}.") from error
    return path


def save(figure: plt.Figure, path: pathlib.Path) -> None:
    """Write a figure and print its path; raises `StorageError`."""
    try:
        figure.savefig(path)
    except OSError as error:
        raise errors.StorageError(f"{path}: cannot be written: {error}.") from error
    finally:
        plt.close(figure)
    print(path)


def svg(figure: plt.Figure, label: str) -> str:
    """Return a figure as an `<svg>` element that takes its colours from the page.

    `figure` was drawn in `PAGE_STYLE`; `label` is read to those who do not see it.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with page_style():
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    plt.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    width, height = figure.get_size_inches() * 72  # points
    head = (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{html.escape(label)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # of the whole page
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # An id that nothing refers to may not stand twice in one page; the others are hashes.
    used = set(re.findall(r"#(\w+)", text))
    return re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
