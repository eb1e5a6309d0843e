"""Least squares too large for their normal equations: conjugate gradients, all columns at once.

    G T = R,   G = A'A - N a a' + ridge I,   R = A'Y - N a y'

G is never formed. G P is a lookup of P and its gradient, so both run where lookups are fast (the
C++ on a CPU), in float32. Codes and scores lie in a file: 2 and 4 bytes a token and table, so
that memory does not grow with the number of tokens. Outputs are read once, for R.

Every column has its own step, and all are preconditioned by the diagonal of G. The residual of
the result is computed from the definition and told. Start at `LargeSystem`.
"""

import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.convert.memorise.normal import Solution
from memoryformer.convert.memorise.observations import Observations
from memoryformer.notation import Array, Codes, Float, Scores, Tables
from memoryformer.ops import lookup

CHUNK = 8192  # tokens of one lookup


class LargeSystem:
    """Observations kept in `folder`, and the sums of them that R and the bias need."""

    def __init__(
        self,
        num_tables: int,
        num_buckets: int,
        folder: str,
        tolerance: float,
        max_iterations: int,
        told: Callable[[int], None],
    ):
        self._shape = num_tables, num_buckets
        self._codes = pathlib.Path(folder, "codes")
        self._scores = pathlib.Path(folder, "scores")
        self._limits = tolerance, max_iterations
        self._told = told
        self._cross: np.ndarray | float = 0.0  # A'Y [K, C, F]
        self._design_sum = np.zeros(self._shape)
        self._diagonal = np.zeros(self._shape)  # of A'A
        self._output_sum: np.ndarray | float = 0.0
        self._num_tokens = 0
        self._last: np.ndarray | None = None  # where the next ridge starts

    def add(self, observations: Observations) -> None:
        """Add a batch."""
        codes, scores, outputs = observations
        zeros = jnp.zeros((*self._shape, outputs.shape[1]), jnp.float32)
        operands = (codes.astype(np.int32), scores.astype(np.float32), outputs)
        self._cross += np.asarray(_transposed(zeros, *operands), np.float64)
        for sums, values in (
            (self._design_sum, scores.astype(np.float64)),
            (self._diagonal, np.square(scores.astype(np.float64))),
        ):
            np.add.at(sums, (np.arange(self._shape[0]), codes), values)
        self._output_sum += outputs.astype(np.float64).sum(0)
        self._num_tokens += len(codes)
        for path, array, dtype in (
            (self._codes, codes, np.uint16),
            (self._scores, scores, np.float32),
        ):
            with path.open("ab") as file:
                np.ascontiguousarray(array, dtype).tofile(file)

    def solve(self, ridge: float) -> Solution:
        """Solve with a ridge of so many times the mean diagonal of the centred A'A."""
        count = self._num_tokens
        design_mean, output_mean = self._design_sum / count, self._output_sum / count
        diagonal = self._diagonal - count * design_mean**2
        shift = ridge * diagonal.mean()
        right = self._cross - count * design_mean[..., None] * output_mean
        small = jnp.asarray(design_mean, jnp.float32)

        def times(tables):  # G P
            total = shift * tables
            for codes, scores in self._chunks():
                total = total + _gram_product(tables, codes, scores)
            along = jnp.einsum("kc,kcf->f", small, tables)
            return total - count * small[..., None] * along[None, None]

        start = jnp.zeros(right.shape) if self._last is None else self._last
        weights, iterations, residual = conjugate_gradients(
            times,
            jnp.asarray(right, jnp.float32),
            jnp.asarray(diagonal + shift, jnp.float32)[..., None],
            jnp.asarray(start, jnp.float32),
            *self._limits,
            self._told,
        )
        self._last = np.asarray(weights)
        wide = self._last.astype(np.float64).reshape(-1, right.shape[-1])
        bias = output_mean - design_mean.ravel() @ wide
        return Solution(wide, bias, iterations, residual)

    def _chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Codes and scores, CHUNK tokens at a time; the last is filled with scores of 0."""
        shape = (self._num_tokens, self._shape[0])
        codes = np.memmap(self._codes, np.uint16, "r", shape=shape)
        scores = np.memmap(self._scores, np.float32, "r", shape=shape)
        for first in range(0, len(codes), CHUNK):
            chunk = slice(first, first + CHUNK)
            missing = CHUNK - len(codes[chunk])
            padding = ((0, missing), (0, 0))
            part = codes[chunk].astype(np.int32)
            yield np.pad(part, padding), np.pad(scores[chunk], padding)


def conjugate_gradients(
    times: Callable[[Array], Array],
    right: Float[Array, "K C F"],
    diagonal: Float[Array, "K C 1"],
    start: Float[Array, "K C F"],
    tolerance: float,
    max_iterations: int,
    told: Callable[[int], None],
) -> tuple[Array, int, float]:
    """Solve G X = R for every column of R: (X, iterations, the worst |R - G X| / |R|).

    `times` is X -> G X, G symmetric and positive; `diagonal` is that of G. `told` is called with
    each iteration, from 1 on.
    """
    x, residual = start, right - times(start)
    size = jnp.maximum(_norms(right), jnp.finfo(right.dtype).tiny)
    direction = residual / diagonal
    state = x, residual, direction, _dots(residual, direction)
    iterations = 0
    while iterations < max_iterations and jnp.any(_norms(state[1]) > tolerance * size):
        iterations += 1
        told(iterations)
        state = _step(*state, times(state[2]), diagonal)
    worst = float(jnp.max(_norms(right - times(state[0])) / size))
    return state[0], iterations, worst


@jax.jit
def _step(x, residual, direction, energy, image, diagonal):
    """Go along a direction whose image under G is known, and turn it."""
    length = _ratio(energy, _dots(direction, image))
    x, residual = x + length * direction, residual - length * image
    z = residual / diagonal
    energy, before = _dots(residual, z), energy
    return x, residual, z + _ratio(energy, before) * direction, energy


def _dots(a, b):
    return jnp.sum(a * b, axis=(0, 1), keepdims=True)


def _norms(a):
    return jnp.sqrt(_dots(a, a))


def _ratio(a, b):
    """A column that is solved already stands still."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


@jax.jit
def _gram_product(tables: Tables, codes: Codes, scores: Scores) -> Tables:
    """A'A P."""
    y, pull = jax.vjp(lambda t: lookup.lookup(t, codes, scores), tables)
    return pull(y)[0]


@jax.jit
def _transposed(like: Tables, codes: Codes, scores: Scores, y: Array) -> Tables:
    """A'Y, shaped like the tables."""
    _, pull = jax.vjp(lambda t: lookup.lookup(t, codes, scores), like)
    return pull(jnp.asarray(y, like.dtype))[0]
