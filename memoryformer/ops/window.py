"""The last W tokens of each token's document, for filters, over calls and devices.

A filter is causal if `ahead` is 0. A window never crosses a document, padding takes no place
in one, and a call begins where the tail of the one before it ends. Where the devices of a
`sequence` axis hold consecutive parts of the rows, the tails go round. Start at `slide`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, Int
from memoryformer.ops import collectives

Taps = list[
    tuple[Array, Array]
]  # of each place of a window: rows [B, L, ..], is it in?


class Tail(NamedTuple):
    """The last W - 1 tokens seen; empty places stand first, with segment id 0."""

    rows: Array  # [B, W - 1, ..]
    segment_ids: Int[Array, "B W"]


def init_tail(batch_size: int, width: int, *shape: int) -> Tail:
    """Return the tail before any token: rows [B, W - 1, *shape] in float32."""
    rows = jnp.zeros((batch_size, width - 1, *shape), jnp.float32)
    return Tail(rows, jnp.zeros((batch_size, width - 1), jnp.int32))


def slide(
    function: Callable[[Taps], Array],
    rows: Array,
    segment_ids: Int[Array, "B L"],
    tail: Tail | None = None,
    *,
    width: int,
    ahead: int = 0,
) -> tuple[Array, Tail]:
    """Apply a filter of W tokens to rows [B, L, ..]: (its results [B, L, ..], the next tail).

    Args:
      function: makes a result of every token out of W taps, the earliest first; `inside`,
        [B, L], says whether a tap lies in the token's document.
      rows: what is filtered; of padding, results mean nothing.
      segment_ids: the document of each token, 0 for padding, which may stand anywhere.
      tail: what earlier calls saw last.
      width: W.
      ahead: how many of the W tokens follow the token itself; whole rows only.
    """
    batch_size, length = segment_ids.shape
    if tail is None:
        tail = init_tail(batch_size, width, *rows.shape[2:])
    tail = Tail(tail.rows.astype(rows.dtype), tail.segment_ids)
    # Padding may stand between two calls of one document, so it takes no place here.
    real = segment_ids != 0
    order = jnp.argsort(~real, axis=1, stable=True)
    place = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    last = jnp.sum(real, axis=1, keepdims=True) + jnp.arange(width - 1)[None]
    new = take_rows(rows, order), take_rows(segment_ids, order)
    if collectives.axis_size(collectives.SEQUENCE_AXIS) > 1:
        empty = jax.tree.map(jnp.zeros_like, tail)
        here = Tail(*(take_rows(x, last) for x in _joined(empty, new)))
        before = collectives.scan_before(later_tail, here, collectives.SEQUENCE_AXIS)
        tail = later_tail(tail, before)
    rows, segments = _joined(tail, new)
    tail = Tail(take_rows(rows, last), take_rows(segments, last))
    own = segments[:, width - 1 :]
    rows = jnp.pad(rows, [(0, 0), (0, ahead)] + [(0, 0)] * (rows.ndim - 2))
    segments = jnp.pad(segments, [(0, 0), (0, ahead)])
    taps = []
    for first in range(ahead, width + ahead):
        tap = jax.lax.slice_in_dim(rows, first, first + length, axis=1)
        taps.append((tap, segments[:, first : first + length] == own))
    return take_rows(function(taps), place), tail


def later_tail(left: Tail, right: Tail) -> Tail:
    """Tail of two runs of tokens, from those of each alone."""
    size = left.segment_ids.shape[1]
    count = jnp.sum(right.segment_ids != 0, axis=1, keepdims=True)
    place = jnp.arange(size)[None]
    index = jnp.where(place < size - count, place + count, place + size)
    return Tail(*(take_rows(x, index) for x in _joined(left, right)))


def take_rows(x: Array, index: Int[Array, "B N"]) -> Array:
    """Rows of each batch entry: [B, L, ..], [B, N] -> [B, N, ..]."""
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _joined(left, right):
    return tuple(jnp.concatenate(both, 1) for both in zip(left, right, strict=True))
