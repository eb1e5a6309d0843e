"""The lookup in plain XLA: a scan over groups of tables, and one-hot products.

Residuals are the tables, the codes and the scores. Both gradients come from one pass over
the tables, sums are in the scores' type (float32), nothing of shape [N, K, F] is built, and
the order of every sum is fixed, so the result is deterministic.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, Codes, Float, Int, Scores, Tables

# Tables per scan step. The accumulator is read and written once a step, so more is less
# traffic; far more makes XLA split its fusion and materialise gathered rows.
SCAN_GROUP = 8
# One-hot columns per product: enough to fill a matrix unit, few enough to stay small.
ONEHOT_COLUMNS = 2048


@jax.custom_vjp
def scan_tables(
    tables: Tables | Int[Array, "K C F"], codes: Codes, scores: Scores
) -> Float[Array, "N F"]:
    """Gather and add the rows of a few tables at a time: [K,C,F], [N,K], [N,K] -> [N,F].

    Integer tables are read as they are and have no gradient.
    """

    def add_group(y, group):
        rows, codes_g, scores_g = group  # [g, C, F], [g, N], [g, N]
        for k in range(rows.shape[0]):
            y = y + scores_g[k][:, None] * _take(rows[k], codes_g[k], y.dtype)
        return y, None

    group = largest_divisor(tables.shape[0], SCAN_GROUP)
    y = jnp.zeros((codes.shape[0], tables.shape[2]), scores.dtype)
    operands = [_grouped(a, group) for a in (tables, codes.T, scores.T)]
    return jax.lax.scan(add_group, y, tuple(operands))[0]


def _scan_bwd(residuals, dy):
    tables, codes, scores = residuals
    dy = dy.astype(scores.dtype)

    def one_table(_, operands):
        rows, codes_k, scores_k = operands  # [C, F], [N], [N]
        dscores = jnp.sum(_take(rows, codes_k, dy.dtype) * dy, axis=-1)
        return None, (_scatter_rows(rows, codes_k, scores_k, dy), dscores)

    _, (dtables, dscores) = jax.lax.scan(one_table, None, (tables, codes.T, scores.T))
    return dtables, None, dscores.T


def _scatter_rows(rows, codes, scores, dy):
    """dT_k: add s * dy to the rows that the codes name: [C, F]."""
    num_buckets = rows.shape[0]

    def scatter(codes, scores, dy):  # sequential on CPU, hence deterministic
        zeros = jnp.zeros(rows.shape, dy.dtype)
        return zeros.at[codes].add(scores[:, None] * dy, mode="drop")

    def product(codes, scores, dy):  # a scatter with atomics is not
        weights = jax.nn.one_hot(codes, num_buckets, dtype=dy.dtype)
        weights = weights * scores[:, None]  # [N, C]
        return jnp.einsum("nc,nf->cf", weights, dy, **_EXACT)

    drows = jax.lax.platform_dependent(codes, scores, dy, cpu=scatter, default=product)
    return drows.astype(rows.dtype)


@jax.custom_vjp
def onehot_products(
    tables: Tables, codes: Codes, scores: Scores
) -> Float[Array, "N F"]:
    """Multiply scored one-hot codes with the tables: [K,C,F], [N,K], [N,K] -> [N,F]."""

    def add_group(y, group):
        rows, codes_g, scores_g = group  # [g, C, F], [g, N], [g, N]
        weights = (
            jax.nn.one_hot(codes_g, rows.shape[1], dtype=y.dtype) * scores_g[..., None]
        )
        y = y + jnp.einsum("gnc,gcf->nf", weights, rows.astype(y.dtype), **_EXACT)
        return y, None

    y = jnp.zeros((codes.shape[0], tables.shape[2]), scores.dtype)
    return jax.lax.scan(add_group, y, _onehot_groups(tables, codes, scores))[0]


def _onehot_bwd(residuals, dy):
    tables, codes, scores = residuals
    dy = dy.astype(scores.dtype)

    def one_group(_, group):
        rows, codes_g, scores_g = group
        onehot = jax.nn.one_hot(codes_g, rows.shape[1], dtype=dy.dtype)  # [g, N, C]
        weights = onehot * scores_g[..., None]
        drows = jnp.einsum("gnc,nf->gcf", weights, dy, **_EXACT)
        # All 2^tau candidate scores of a chunk, of which the code's is kept.
        candidates = jnp.einsum("nf,gcf->gnc", dy, rows.astype(dy.dtype), **_EXACT)
        return None, (drows.astype(rows.dtype), jnp.sum(candidates * onehot, axis=-1))

    groups = _onehot_groups(tables, codes, scores)
    _, (dtables, dscores) = jax.lax.scan(one_group, None, groups)
    return dtables.reshape(tables.shape), None, dscores.reshape(codes.T.shape).T


# A one-hot product only selects rows: the matrix unit must not round them.
_EXACT: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST}


def _onehot_groups(tables, codes, scores):
    wanted = max(1, ONEHOT_COLUMNS // tables.shape[1])
    group = largest_divisor(tables.shape[0], wanted)
    return tuple(_grouped(a, group) for a in (tables, codes.T, scores.T))


def _take(rows, codes, dtype):
    # The default mode would add a select that fills rows out of range with NaN.
    return jnp.take(rows, codes, axis=0, mode="clip").astype(dtype)


def _grouped(array, group):
    """[K, ...] -> [K / group, group, ...]."""
    return array.reshape(array.shape[0] // group, group, *array.shape[1:])


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, or 1."""
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)


def _keep_operands(function: Callable) -> Callable:
    def forward(tables, codes, scores):
        return function(tables, codes, scores), (tables, codes, scores)

    return forward


scan_tables.defvjp(_keep_operands(scan_tables), _scan_bwd)
onehot_products.defvjp(_keep_operands(onehot_products), _onehot_bwd)
