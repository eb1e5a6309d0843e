"""What a layer reads and puts out, token by token, and the matrix in which tables are linear."""

from typing import NamedTuple

import numpy as np
import scipy.sparse

from memoryformer.notation import Float, Int


class Observations(NamedTuple):
    """Some tokens: codes [N, K], scores [N, K], the layer's outputs [N, F]."""

    codes: Int[np.ndarray, "N K"]
    scores: Float[np.ndarray, "N K"]
    outputs: Float[np.ndarray, "N F"]


def design(observations: Observations, num_buckets: int) -> scipy.sparse.csr_matrix:
    """Return A [N, K C] in float64: row n holds score s[n, k] at k C + h[n, k]."""
    codes, scores, _ = observations
    num_tokens, num_tables = codes.shape
    columns = codes.astype(np.int64) + num_buckets * np.arange(num_tables)
    starts = np.arange(0, num_tokens * num_tables + 1, num_tables)
    parts = (scores.astype(np.float64).ravel(), columns.ravel(), starts)
    return scipy.sparse.csr_matrix(parts, shape=(num_tokens, num_tables * num_buckets))
