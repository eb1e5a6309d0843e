"""Sides of a comparison, each at its own best learning rate. Start at `table`.

A side is what points share but for that field and their seeds: `softmax, 1000 steps`, of the
points `softmax, 1000 steps, lr=0.016`, `... lr=0.032` and so on.
"""

import dataclasses
import math
import statistics
from collections.abc import Hashable, Sequence

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.sweep import files, kinds, points
from memoryformer.sweep import statistics as statistics_lib
from memoryformer.sweep.kinds import SEEDS
from memoryformer.sweep.points import Point, Sweep


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run, as far as it matters here."""

    side: Hashable  # what it shares with the others of its side
    variant: str  # its name: parts between commas, those of its side among them
    value: float  # of the field that each side has its own best of
    state: str  # as `files.State` has it
    metric: float = math.nan  # lower is better


@dataclasses.dataclass(frozen=True)
class Side:
    """What was tried of one side, and the best of it."""

    variants: Sequence[str]
    tried: Sequence[float]  # whose seeds have all ended, done or failed; sorted
    unfit: Sequence[float]  # values of which a seed has failed or not ended
    best: float  # of those that are fit, that of the lowest mean; nan if there is none
    summary: statistics_lib.Summary  # of the side at its best, under the side's name

    @property
    def edge(self) -> str:
        """Where the best one lies among those tried: '' between others."""
        if len(self.tried) < 2:
            return "only one tried"
        ends = {self.tried[0]: "lowest tried", self.tried[-1]: "highest tried"}
        return ends.get(self.best, "")


def sides(trials: Sequence[Trial]) -> list[Side]:
    """Group trials by side, in order, and choose the best value of each.

    A value counts when all its seeds are done: were one left out that diverged, the mean
    of the others would flatter it.
    """
    groups: dict[Hashable, dict[float, list[Trial]]] = {}
    for trial in trials:
        groups.setdefault(trial.side, {}).setdefault(trial.value, []).append(trial)
    return [_side(values) for values in groups.values()]


def _side(values: dict[float, list[Trial]]) -> Side:
    means = {
        value: statistics.fmean(trial.metric for trial in seeds)
        for value, seeds in values.items()
        if all(t.state == "done" and math.isfinite(t.metric) for t in seeds)
    }
    best = min(means, key=means.__getitem__, default=math.nan)
    variants = list(
        dict.fromkeys(t.variant for seeds in values.values() for t in seeds)
    )
    name = _shared(variants) or variants[0]
    summary = statistics_lib.Summary(name, 0, math.nan, math.nan)
    if means:
        metrics = [trial.metric for trial in values[best]]
        summary = statistics_lib.summarise(name, metrics)
    unfit = sorted(values.keys() - means.keys())
    return Side(variants, _ended(values), unfit, best, summary)


def _ended(values: dict[float, list[Trial]]) -> list[float]:
    """The values of which every seed has ended, sorted."""
    ended = ("done", "failed")
    return sorted(
        value
        for value, seeds in values.items()
        if all(trial.state in ended for trial in seeds)
    )


def _shared(variants: Sequence[str]) -> str:
    """What all names say: 'a', if they are 'a, lr=1' and 'a, lr=2'."""
    parts = [variant.split(", ") for variant in variants]
    common = [part for part in parts[0] if all(part in other for other in parts)]
    return ", ".join(common)


def table(sweep: Sweep, field: str = "", baseline: str = "") -> list[str]:
    """Return Markdown lines: each side at its best, against the first or `baseline`'s side.

    `field` is '' for the learning rate, and no lines if no side has several. The metric is
    the sweep's first one. Raises `ConfigError` for a field that does not vary.
    """
    rate = kinds.learning_rate(sweep.points[0].run)
    trials = [_trial(p, field or rate, sweep.metrics[0]) for p in sweep.points]
    numbers = all(isinstance(t.value, (int, float)) for t in trials)
    several = len({(t.side, t.value) for t in trials}) > len({t.side for t in trials})
    if field and not (several and numbers):
        known = sorted({key for p in sweep.points for key in p.overrides} - {*SEEDS})
        reason = "no side has several of it" if numbers else "its values are no numbers"
        listed = ", ".join(known) or "nothing"
        raise ConfigError(f"--best_over={field!r}: {reason}; the sweep sets {listed}.")
    name = (field or rate).split(".")[-1]
    return _lines(sides(trials), sweep.metrics[0], name, baseline) if several else []


def _trial(point: Point, field: str, metric: str) -> Trial:
    flat = config_lib.flatten(kinds.as_dict(point.run))
    value = files.values(point.workdir, [metric]).get(metric, math.nan)
    side = points.identity(point, without=(field, *SEEDS))
    state = files.state(point).name
    return Trial(side, point.variant, flat.get(field, math.nan), state, value)


def _lines(
    compared: Sequence[Side], metric: str, name: str, baseline: str
) -> list[str]:
    ready = [side for side in compared if side.summary.count]
    if not ready:
        return [f"{metric} at the best {name}: no side has one with all seeds done."]
    base = next((side for side in ready if baseline in side.variants), ready[0])
    pooled = statistics_lib.pooled_deviation([side.summary for side in ready])
    lines = [
        f"| {metric} at the best {name} | {name} | seeds | mean ± s.d. "
        "| difference ± s.e. | |",
        "|---|---|---|---|---|---|",
    ]
    for side in ready:
        edge = f" ({side.edge})" if side.edge else ""
        cells = statistics_lib.cells(side.summary, base.summary, pooled)
        lines.append(f"| {side.summary.variant} | {side.best:g}{edge} | {cells}")
    lines.append(f"\n{statistics_lib.noise_floor(pooled, ' over these rows')}")
    unfit = [f"{s.summary.variant} at {v:g}" for s in compared for v in s.unfit]
    if unfit:
        lines.append(f"left out, as not all seeds are done: {'; '.join(unfit)}")
    return lines
