"""The law of a kind of model over sizes and tokens: L = E + A / N^a + B / D^b.

N is the parameters of a run, D its training tokens, L its last loss. A kind is what stands
before the first comma of a variant's label: 'memory, D=80, 2000 steps'. It is fitted where it
has three sizes and three token counts or more; the interval of a number is from fits to runs
drawn again with replacement (a percentile bootstrap). Hoffmann et al. (arXiv:2203.15556) have
the form; the squares summed here are of log L.

Start at `laws`; `equal` compares kinds at equal cost, without a law.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker
from scipy import optimize

from memoryformer.notation import Float
from memoryformer.report import drawing, pareto
from memoryformer.report.studies import Run, Study

NAMES = ("E", "A", "a", "B", "b")
DRAWS = 200  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percent
LEAST = 3  # sizes, and token counts, of a fit
# E and both parts at the middle size and count, in the loss's unit; then a and b.
_LOWEST, _HIGHEST = (0.0, 0.0, 0.0, 0.01, 0.01), (np.inf, np.inf, np.inf, 3.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Observation:
    """One run: its parameters, its training tokens, its last loss."""

    parameters: float
    tokens: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Law:
    """A fit: E, A, a, B, b, an interval (low, high) of each, and the runs it is of."""

    values: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    residual: float  # root mean square of log L - log fit
    observations: Sequence[Observation]

    def __call__(self, parameters: float, tokens: np.ndarray) -> np.ndarray:
        """Return the loss of models of a size after so many tokens."""
        e, scale_n, a, scale_d, b = self.values
        return e + scale_n * parameters**-a + scale_d * np.asarray(tokens) ** -b


def laws(study: Study, metric: str) -> dict[str, Law]:
    """Fit each kind of a study that has enough sizes and token counts: {kind: law}."""
    fitted = {}
    for kind, runs in kinds(study).items():
        seen = [o for o in (_observe(run, metric) for run in runs) if o]
        sizes = {o.parameters for o in seen}
        counts = {o.tokens for o in seen}
        if min(len(sizes), len(counts)) >= LEAST and len(seen) > len(NAMES):
            fitted[kind] = fit(seen)
    return fitted


def kinds(study: Study) -> dict[str, list[Run]]:
    """Group the runs that count by what stands before the comma of their labels."""
    groups: dict[str, list[Run]] = {}
    for label, runs in study.variants.items():
        kind, comma, _ = label.partition(",")
        if comma:
            groups.setdefault(kind, []).extend(study.counted(runs))
    return groups


def fit(observations: Sequence[Observation], seed: int = 0) -> Law:
    """Fit the law by least squares of log L, from several starts; see the module."""
    n, d, loss = _columns(observations)
    middle = np.exp(np.mean(np.log(n))), np.exp(np.mean(np.log(d)))
    starts = [
        (share * loss.min(), *((1 - share) * loss.min() / 2,) * 2, power, power)
        for share in (0.2, 0.5, 0.8)
        for power in (0.2, 0.6)
    ]
    best = min((_least(n, d, loss, middle, s) for s in starts), key=lambda r: r.cost)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(DRAWS):
        rows = rng.integers(len(loss), size=len(loss))
        again = _least(n[rows], d[rows], loss[rows], middle, best.x)
        drawn.append(_natural(again.x, middle))
    low, high = np.percentile(drawn, INTERVAL, axis=0)
    return Law(
        _natural(best.x, middle),
        tuple(zip(low.tolist(), high.tolist(), strict=True)),
        float(np.sqrt(2 * best.cost / len(loss))),
        tuple(observations),
    )


def _observe(run, metric):
    tokens, losses = run.series(metric)
    if not len(tokens):
        return None
    size = run.cost.parameters.total
    return Observation(float(size), float(tokens[-1]), float(losses[-1]))


def _columns(observations) -> tuple[Float[np.ndarray, " R"], ...]:
    rows = [dataclasses.astuple(o) for o in observations]
    n, d, loss = np.array(rows, np.float64).T
    return n, d, loss


def _least(n, d, loss, middle, start):
    log_n, log_d = np.log(n / middle[0]), np.log(d / middle[1])

    def residuals(x):
        e, of_n, of_d, a, b = x
        value = e + of_n * np.exp(-a * log_n) + of_d * np.exp(-b * log_d)
        return np.log(np.maximum(value, 1e-12)) - np.log(loss)

    inside = np.clip(start, np.add(_LOWEST, 1e-9), np.subtract(_HIGHEST, 1e-9))
    return optimize.least_squares(residuals, inside, bounds=(_LOWEST, _HIGHEST))


def _natural(x, middle):
    e, of_n, of_d, a, b = map(float, x)
    return e, of_n * middle[0] ** a, a, of_d * middle[1] ** b, b


def equal(study: Study, metric: str, cost: str) -> list[tuple[float, dict[str, float]]]:
    """Compare kinds at equal cost, a name of `pareto.COSTS`: [(cost, {kind: loss})].

    A kind's loss at a cost lies on the line between the neighbours on its front, over the
    logarithm of the cost. Costs are four over what the fronts of all kinds share.
    """
    placed = pareto.spots(study, metric, cost)
    fronts: dict[str, list[pareto.Spot]] = {}
    for kind in kinds(study):
        of_kind = [s for s in placed if s.name.partition(",")[0] == kind]
        if best := pareto.front(of_kind):
            fronts[kind] = best
    if len(fronts) < 2:
        return []
    low = max(best[0].cost for best in fronts.values())
    high = min(best[-1].cost for best in fronts.values())
    if high <= low:
        return []
    return [(c, _losses(fronts, c)) for c in np.geomspace(low, high, 4).tolist()]


def _losses(
    fronts: Mapping[str, Sequence[pareto.Spot]], cost: float
) -> dict[str, float]:
    losses = {}
    for kind, best in fronts.items():
        costs, means = [s.cost for s in best], [s.mean for s in best]
        losses[kind] = float(np.interp(np.log(cost), np.log(costs), means))
    return losses


@drawing.page_style()
def picture(law: Law, y_label: str) -> plt.Figure:
    """Draw loss over tokens: dots of runs, a line of the law for each size."""
    figure, axes = plt.subplots(figsize=(4.6, 3.0))
    by_size: dict[float, list[Observation]] = {}
    for one in law.observations:
        by_size.setdefault(one.parameters, []).append(one)
    for index, (size, seen) in enumerate(sorted(by_size.items())):
        style = drawing.series_style(index)
        tokens = sorted({one.tokens for one in seen})
        means = [
            statistics.fmean(o.loss for o in seen if o.tokens == count)
            for count in tokens
        ]
        dense = np.geomspace(tokens[0], tokens[-1], 40)
        axes.plot(dense, law(size, dense), **style, linewidth=1.2)
        name = f"{ticker.EngFormatter(sep='')(size)} parameters"
        axes.plot(tokens, means, "o", color=style["color"], markersize=4, label=name)
    axes.set(xlabel="training tokens", ylabel=y_label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.legend(fontsize=7)
    return figure
