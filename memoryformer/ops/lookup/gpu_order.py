"""The tokens of each table in the order of their codes, for `gpu.backward`.

Start at `sort_by_code`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, Codes, Int

MAX_KEYS = 1 << 31  # of a sort: code * N + n is an int32
RUN = 256  # tokens of one backward block: bounds what a popular row costs


class Order(NamedTuple):
    """The tokens of each table sorted by code, and cut into runs of one code each."""

    tokens: Int[Array, "K N"]  # token indices; by code, and within a code by index
    rows: Int[Array, "K R"]  # the code of each run; every code has at least one run
    starts: Int[Array, "K R"]  # a run is tokens[starts:ends]; empty past the last run
    ends: Int[Array, "K R"]
    first_runs: Int[Array, "K C+1"]  # runs of code c: first_runs[c] : first_runs[c + 1]


def sort_by_code(codes: Codes, num_buckets: int, run: int = RUN) -> Order:
    """Sort [N, K] codes by table and cut them into R = C + N // run runs a table."""
    num_tokens = codes.shape[0]
    if num_buckets * num_tokens >= MAX_KEYS:
        raise ValueError(
            f"{num_tokens} tokens of {num_buckets} codes: code * N + n does not fit 31 "
            "bits; look up fewer tokens at a time."
        )
    codes = by_table(codes, num_buckets)
    # One key holds code and token: all differ, so no sort can order them in two ways.
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    keys = jnp.sort(codes * num_tokens + index[None], axis=1, stable=False)
    edges = jnp.arange(num_buckets + 1, dtype=jnp.int32) * num_tokens
    edges = _search(keys, edges, "left")
    counts = edges[:, 1:] - edges[:, :-1]
    runs = jnp.maximum(1, -(-counts // run))  # an unread row needs its zeros
    first_runs = jnp.pad(jnp.cumsum(runs, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    number = jnp.arange(num_buckets + num_tokens // run, dtype=jnp.int32)

    rows = _search(first_runs, number, "right") - 1  # num_buckets past the last run
    used = rows < num_buckets
    rows = jnp.minimum(rows, num_buckets - 1)

    def at_row(a):
        return jnp.take_along_axis(a, rows, axis=1)

    starts = at_row(edges) + run * (number[None] - at_row(first_runs))
    ends = jnp.minimum(starts + run, at_row(edges[:, 1:]))
    ends = jnp.where(used, ends, starts)
    return Order(keys % num_tokens, rows, starts, ends, first_runs)


def _search(rows, values, side):
    """Where each value goes in each of the sorted rows: [K, A], [B] -> int32 [K, B]."""

    def one_row(row):  # unrolled: one kernel, where a loop is many
        return jnp.searchsorted(row, values, side=side, method="scan_unrolled")

    return jax.vmap(one_row)(rows).astype(jnp.int32)


def by_table(codes: Codes, num_buckets: int) -> Int[Array, "K N"]:
    """[N, K] -> int32 [K, N], none of which reads outside its table."""
    return jnp.clip(codes.astype(jnp.int32), 0, num_buckets - 1).T
