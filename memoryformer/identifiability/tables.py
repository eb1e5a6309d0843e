"""When are the best tables of a memory layer unique?

Given the codes and scores of its inputs a memory layer is linear in its tables,

    y = A T        A [N, M], row i has s(z_k) in column (k, h(z_k)), one for each of K tables

M being the buckets that are visited: no data can say what the others should hold. The second
moment A^T A / N decides. Where it has full rank, one T has the least square error. Otherwise

* With score `constant` the columns of each table add up to 1. A row can be added to all of one
  table and taken from all of another, and nothing changes: rank <= M - (K - 1), which is
  K (2^tau - 1) + 1 where all buckets are visited. A bias is one more such table, of one bucket.
* Any other null vector t of A changes the function on inputs whose combination of buckets is new.

So the layer is determined on all combinations of visited buckets exactly if the rank is
M - (K - 1) with constant scores and no bias; weighted scores leave no such freedom, and the
rank must be M. Ours, by the argument of "Learning Linear Attention in Polynomial Time".

NumPy in float64. Start at `certificate`.
"""

import numpy as np

from memoryformer.identifiability import moments
from memoryformer.notation import Float, Int

Codes = Int[np.ndarray, "N K"]
Scores = Float[np.ndarray, "N K"]


def features(
    codes: Codes, scores: Scores, num_buckets: int
) -> tuple[Codes, Scores, Int[np.ndarray, " M"]]:
    """Return A as (column, value) of its K entries a row, and the buckets its columns stand for.

    codes, scores: [N, K]. Columns are numbered over visited buckets k * num_buckets + code.
    """
    flat = np.arange(codes.shape[1]) * num_buckets + np.asarray(codes)
    visited, columns = np.unique(flat, return_inverse=True)
    return columns.reshape(flat.shape), np.asarray(scores, np.float64), visited


def second_moment(
    columns: Codes, values: Scores, unknowns: int
) -> Float[np.ndarray, "M M"]:
    """Return A^T A / N of the entries that `features` returns."""
    moment = np.zeros((unknowns, unknowns))
    for column, value in zip(columns.T, values.T, strict=True):
        np.add.at(moment, (column[:, None], columns), value[:, None] * values)
    return moment / len(columns)


def certificate(
    codes: Codes, scores: Scores, num_buckets: int, *, bias: bool = False
) -> moments.Certificate:
    """Return the rank and smallest eigenvalues of the second moment of a layer's features.

    codes, scores: [N, K]. bias: whether the layer adds one. Unknowns are the visited buckets,
    and a bias. Takes M^2 memory and M^3 time.
    """
    if codes.ndim != 2 or codes.shape != scores.shape or not codes.size:
        raise ValueError(
            f"codes {codes.shape}, scores {scores.shape}: expected [N, K]."
        )
    columns, values, visited = features(codes, scores, num_buckets)
    if bias:
        columns = np.pad(columns, [(0, 0), (0, 1)], constant_values=len(visited))
        values = np.pad(values, [(0, 0), (0, 1)], constant_values=1.0)
    moment = second_moment(columns, values, len(visited) + bias)
    # With one score for all inputs, the columns of each table add up to the same vector.
    freedom = columns.shape[1] - 1 if np.ptp(scores) == 0 else 0
    return moments.certificate(np.linalg.eigvalsh(moment), len(codes), freedom)
