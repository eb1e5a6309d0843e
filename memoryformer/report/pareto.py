"""What a loss costs: variants over training FLOPs, seconds, parameters and bytes in decoding.

A variant is on the front of a cost if none other has both a lower loss and a lower cost.
Start at `spots` and `scatter`.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker

from memoryformer.report import drawing
from memoryformer.report.studies import SPEED, Run, Study

MARKERS = ("o", "s", "^", "D", "v")  # one for each round of the colours
APART = 1.05  # costs that differ by less are one cost
MAX_NAMES = 6  # written into a picture
_MAX_LETTERS = 26


def _flops(run: Run, tokens: float) -> float:
    return tokens * run.cost.training_flops_per_token


def _seconds(run: Run, tokens: float) -> float | None:
    speed = run.last(SPEED)
    return tokens / speed if speed else None


# cost: how it is called, and of a run after so many tokens
COSTS: dict[str, tuple[str, Callable[[Run, float], float | None]]] = {
    "flops": ("training FLOPs", _flops),
    "seconds": ("training seconds, by the median speed", _seconds),
    "parameters": ("parameters", lambda run, _: run.cost.parameters.total),
    "bytes": (
        "bytes read a token in decoding",
        lambda run, _: run.cost.decode_bytes_per_token,
    ),
}


@dataclasses.dataclass(frozen=True)
class Spot:
    """A variant: what it costs, and its loss over seeds (mean, lowest, highest)."""

    name: str
    index: int  # of the variant in its study, which is its colour
    cost: float
    mean: float
    low: float
    high: float


def spots(study: Study, metric: str, cost: str) -> list[Spot]:
    """Place each variant of a study that has the metric and the cost, a name of `COSTS`."""
    placed = []
    for index, (name, runs) in enumerate(study.variants.items()):
        pairs = []
        for run in study.counted(runs):
            x, y = run.series(metric)
            price = COSTS[cost][1](run, float(x[-1])) if len(x) else None
            if price:
                pairs.append((price, float(y[-1])))
        if pairs:
            costs, losses = zip(*pairs, strict=True)
            means = statistics.fmean(costs), statistics.fmean(losses)
            placed.append(Spot(name, index, *means, min(losses), max(losses)))
    return placed


def front(placed: Sequence[Spot]) -> list[Spot]:
    """Return those that no other beats in both, from the cheapest to the dearest."""
    best: list[Spot] = []
    for spot in sorted(placed, key=lambda spot: (spot.cost, spot.mean)):
        if not best or spot.mean < best[-1].mean:
            best.append(spot)
    return best


def differ(placed: Sequence[Spot]) -> bool:
    """Whether there is a picture in it: two spots or more, that do not cost the same."""
    costs = [spot.cost for spot in placed]
    return len(costs) > 1 and max(costs) > APART * min(costs)


@drawing.page_style()
def scatter(placed: Sequence[Spot], x_label: str, y_label: str) -> plt.Figure:
    """Draw a dot for each variant, seeds as a whisker, and the front as a line of steps.

    More than `MAX_NAMES` variants are coloured by kind, what is before the comma of a name, each
    kind with its own front.
    """
    figure, axes = plt.subplots(figsize=(4.6, 3.0))
    groups = _groups(placed)
    for index, (kind, spots_of_kind) in enumerate(groups.items()):
        best = front(spots_of_kind)
        costs, means = ([getattr(s, name) for s in best] for name in ("cost", "mean"))
        look: dict[str, Any] = {"color": drawing.FAINT}
        if kind:
            look = drawing.series_style(index) | {"label": kind}
        axes.step(costs, means, where="post", linewidth=1, zorder=1, **look)
        for spot in spots_of_kind:
            _dot(axes, spot, index if kind else spot.index)
    if "" in groups and len(placed) <= MAX_NAMES:
        _write_names(axes, placed)
    elif "" not in groups:
        axes.legend(fontsize=7)
    low, high = min(s.low for s in placed), max(s.high for s in placed)
    margin = 0.08 * (high - low) or 0.05
    # Room above for the name of the highest.
    axes.set(xlabel=x_label, ylabel=y_label, ylim=(low - margin, high + 2 * margin))
    prices = np.array([spot.cost for spot in placed])
    if prices.max() > 3 * prices.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    return figure


def _groups(placed) -> dict[str, list[Spot]]:
    """The spots by kind; all under '' where they are few or of no kind."""
    groups: dict[str, list[Spot]] = {}
    for spot in placed:
        kind, comma, _ = spot.name.partition(",")
        groups.setdefault(kind if comma else "", []).append(spot)
    if len(placed) <= MAX_NAMES or "" in groups:
        return {"": list(placed)}
    return groups


def _dot(axes, spot, index):
    colour = drawing.series_style(index)["color"]
    marker = MARKERS[index // len(drawing.COLOURS) % len(MARKERS)]
    if spot.high > spot.low:
        axes.plot([spot.cost] * 2, [spot.low, spot.high], color=colour, linewidth=1.2)
    look: dict[str, Any] = {"marker": marker, "color": colour, "linestyle": ""}
    axes.plot([spot.cost], [spot.mean], markersize=5, **look)


def _write_names(axes, placed):
    """Write each name beside its dot, on the side that has room."""
    middle = np.sqrt(min(s.cost for s in placed) * max(s.cost for s in placed))
    for spot in placed:
        right = spot.cost <= middle
        name = spot.name
        if len(name) > _MAX_LETTERS:
            name = name[: _MAX_LETTERS - 2] + ".."
        axes.annotate(
            name,
            (spot.cost, spot.mean),
            xytext=(6 if right else -6, 4),
            textcoords="offset points",
            ha="left" if right else "right",
            parse_math=False,
            fontsize=7,
        )
