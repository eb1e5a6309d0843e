"""The best tables for what a layer puts out, given the codes and scores of its inputs.

    min over T, b   sum_n |y_n - b - sum_k s[n, k] T_k[h[n, k]]|^2 + ridge |T|^2

All tables are fitted together, with an output bias b that costs nothing. `ridge` is chosen, from
multiples of the mean diagonal of the normal equations, by what is left of the variance of tokens
that the fit has not seen:

    unexplained = sum |y - y_fitted|^2 / sum |y - mean(y)|^2

A row that no token reads is not in the equations. It becomes the mean of the rows one bit away,
weighted by how often they were read, or of its table where those were never read either.
Start at `fit_tables`.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from memoryformer.convert.memorise import gradients, normal
from memoryformer.convert.memorise.observations import Observations, design
from memoryformer.errors import ConfigError
from memoryformer.notation import Float, Int

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)  # times the mean diagonal, from the largest
MOST_EXACT_ROWS = 16_384  # K C, up to which the equations are solved as they stand
MAX_ITERATIONS = 300  # of conjugate gradients
SOLVERS = ("auto", "exact", "gradients")


@dataclasses.dataclass(frozen=True)
class Fit:
    """Tables [K, C, F] and bias [F] in float64, and how they came about.

    ridge: a multiple of the mean diagonal.  unexplained: of the held-out tokens.
    unexplained_by_ridge: of all that were tried.  iterations, residual: of conjugate
    gradients, the largest relative residual of a column; 0 for the exact solution.
    """

    tables: Float[np.ndarray, "K C F"]
    bias: Float[np.ndarray, " F"]
    ridge: float
    unexplained: float
    unexplained_by_ridge: dict[float, float]
    unread_rows: float  # as a share of all
    num_tokens: int
    solver: str
    iterations: int = 0
    residual: float = 0.0


def fit_tables(
    batches: Iterable[Observations],
    held_out: Observations,
    num_buckets: int,
    *,
    ridges: Sequence[float] = RIDGES,
    solver: str = "auto",
    tolerance: float = 1e-5,
    max_iterations: int = MAX_ITERATIONS,
    folder: str | None = None,
    told: Callable[[int], None] = lambda iteration: None,
) -> Fit:
    """Fit tables [K, C, F] to a stream of observations, which is read once.

    Args:
      batches: what is fitted to. Memory does not grow with their number.
      held_out: tokens that choose the ridge, in memory at once.
      num_buckets: C.
      ridges: multiples of the mean diagonal to choose from, the largest first; they are tried
        until one leaves more than the one before.
      solver: exact, gradients, or auto: exact up to `MOST_EXACT_ROWS` rows K C.
      tolerance: of conjugate gradients, |residual| / |right-hand side| of every column.
      max_iterations: of conjugate gradients, for each ridge.
      folder: where codes and scores are kept for conjugate gradients, None: a temporary one.
      told: called with each iteration of conjugate gradients, from 1 on for each ridge.

    Raises `ConfigError` if there is no token to fit to.
    """
    num_tables = held_out.codes.shape[1]
    rows = num_tables * num_buckets
    if solver == "auto":
        solver = "exact" if rows <= MOST_EXACT_ROWS else "gradients"
    seen = _Seen(num_tables, num_buckets)
    with tempfile.TemporaryDirectory(dir=folder) as spool:
        system: normal.NormalEquations | gradients.LargeSystem
        if solver == "exact":
            system = normal.NormalEquations(num_tables, num_buckets)
        else:
            sizes = (num_tables, num_buckets, spool)
            system = gradients.LargeSystem(*sizes, tolerance, max_iterations, told)
        for observations in batches:
            seen.add(observations.codes)
            system.add(observations)
        if not seen.num_tokens:
            raise ConfigError("no token to fit tables to: give more text or tokens.")
        fits = _solutions(system, held_out, seen, ridges)
        best = min(fits, key=lambda fit: fit.unexplained)
        tried = {fit.ridge: fit.unexplained for fit in fits}
    return dataclasses.replace(best, unexplained_by_ridge=tried, solver=solver)


def fill_unread(
    tables: Float[np.ndarray, "K C F"], counts: Int[np.ndarray, "K C"]
) -> Float[np.ndarray, "K C F"]:
    """Put into rows with a count of 0 the mean of those one bit away, or of their table."""
    num_buckets = tables.shape[1]
    weighted = counts[..., None] * tables
    total, weight = np.zeros_like(tables), np.zeros(counts.shape)
    for bit in range(num_buckets.bit_length() - 1):
        neighbour = np.arange(num_buckets) ^ (1 << bit)
        total += weighted[:, neighbour]
        weight += counts[:, neighbour]
    of_table = weighted.sum(1, keepdims=True)
    of_table /= np.maximum(counts.sum(1), 1)[:, None, None]
    near = total / np.maximum(weight, 1)[..., None]
    filling = np.where(weight[..., None] > 0, near, of_table)
    return np.where(counts[..., None] > 0, tables, filling)


def unexplained(outputs: Float[np.ndarray, "N F"], fitted: np.ndarray) -> float:
    """sum |y - y_fitted|^2 / sum |y - mean(y)|^2."""
    outputs = outputs.astype(np.float64)
    left = np.square(outputs - fitted).sum()
    whole = np.square(outputs - outputs.mean(0)).sum()
    return float(left / whole) if whole else float(left > 0)


class _Seen:
    """How often each row was read."""

    def __init__(self, num_tables, num_buckets):
        self.counts = np.zeros((num_tables, num_buckets), np.int64)
        self.num_tokens = 0

    def add(self, codes):
        num_tables, num_buckets = self.counts.shape
        places = (codes + num_buckets * np.arange(num_tables)).ravel()
        counts = np.bincount(places, minlength=self.counts.size)
        self.counts += counts.reshape(self.counts.shape)
        self.num_tokens += len(codes)


def _solutions(system, held_out, seen, ridges) -> list[Fit]:
    matrix = design(held_out, seen.counts.shape[1])
    fits = []
    for ridge in ridges:
        solution = system.solve(ridge)
        shape = (*seen.counts.shape, -1)
        tables = fill_unread(solution.weights.reshape(shape), seen.counts)
        fitted = matrix @ tables.reshape(matrix.shape[1], -1) + solution.bias
        fits.append(
            Fit(
                tables,
                solution.bias,
                ridge=ridge,
                unexplained=unexplained(held_out.outputs, fitted),
                unexplained_by_ridge={},
                unread_rows=float(np.mean(seen.counts == 0)),
                num_tokens=seen.num_tokens,
                solver="",
                iterations=solution.iterations,
                residual=solution.residual,
            )
        )
        if len(fits) > 1 and fits[-1].unexplained > fits[-2].unexplained:
            break  # smaller ridges leave still more
    return fits
