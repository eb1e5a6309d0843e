"""Least squares by their normal equations, summed over batches and solved exactly.

    min over T, b   |Y - 1 b' - A T|^2 + ridge |T|^2
    (A'A - N a a' + ridge I) T = A'Y - N a y',    b = y - T' a,    a, y the means of rows

A [N, R] is sparse, A'A is kept whole: 8 R^2 bytes, and as much again while it is solved.
Start at `NormalEquations`.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg

from memoryformer.convert.memorise.observations import Observations, design
from memoryformer.notation import Float


class Solution(NamedTuple):
    """Weights [R, F] and bias [F]; iterations and the worst relative residual, if iterated."""

    weights: Float[np.ndarray, "R F"]
    bias: Float[np.ndarray, " F"]
    iterations: int = 0
    residual: float = 0.0


class NormalEquations:
    """The sums over batches, in float64."""

    def __init__(self, num_tables: int, num_buckets: int):
        num_rows = num_tables * num_buckets
        self._num_buckets = num_buckets
        self._gram = np.zeros((num_rows, num_rows))  # A'A
        self._cross: np.ndarray | float = 0.0  # A'Y
        self._design_sum = np.zeros(num_rows)
        self._output_sum: np.ndarray | float = 0.0
        self._num_tokens = 0

    def add(self, observations: Observations) -> None:
        """Add a batch."""
        outputs = observations.outputs.astype(np.float64)
        matrix = design(observations, self._num_buckets)
        transposed = matrix.T.tocsr()
        products = (transposed @ matrix).tocoo()  # no place twice
        self._gram[products.row, products.col] += products.data
        self._cross += transposed @ outputs
        self._design_sum += np.asarray(matrix.sum(0)).ravel()
        self._output_sum += outputs.sum(0)
        self._num_tokens += len(outputs)

    def solve(self, ridge: float) -> Solution:
        """Solve with a ridge of so many times the mean diagonal of the centred A'A.

        Raises numpy's LinAlgError if that is singular, which no ridge above 0 is.
        """
        count = self._num_tokens
        design_mean, output_mean = self._design_sum / count, self._output_sum / count
        right = self._cross - count * np.outer(design_mean, output_mean)
        # In place, on one triangle: LAPACK's columns are the rows of a symmetric matrix.
        matrix = self._gram.copy().T
        scipy.linalg.blas.dsyr(-count, design_mean, a=matrix, overwrite_a=True)
        diagonal = np.einsum("ii->i", matrix)
        diagonal += ridge * diagonal.mean()
        factor = scipy.linalg.cho_factor(matrix, overwrite_a=True, check_finite=False)
        weights = scipy.linalg.cho_solve(factor, right, check_finite=False)
        return Solution(weights, output_mean - design_mean @ weights)
