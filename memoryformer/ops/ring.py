"""Ring attention: softmax attention over a sequence whose parts lie on a ring of devices.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(E)) v_j,   j in i's document and not ahead of i

Every device keeps its queries; keys and values go round the ring, one neighbour a step, the
next ones under way while the present ones are read. What a query has read so far is a
running maximum, a sum of weights and a weighted sum of values (online softmax), in float32:
no device ever holds the logits of more than one tile, or the keys of more than two parts.

The gradient is a second round: weights are formed again from the stored log-sums, and the
gradients of keys and values travel with them, home again after n steps.

What a query may see follows from segment ids and positions, which travel along, so any order
of the tokens over the devices gives the same result. Tiles in which no query sees any key are
passed over (other documents, the future): with tokens dealt out in turn, device r holding
tokens r, r + n, r + 2n, .. ("striped", Brandon et al. 2023), every device passes over as
many, and the ring does half the work. `sharding.Sharding.put_batch` deals them out.

Start at `attend`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, Float, Int
from memoryformer.ops import collectives, remat

TILE = 512  # tokens


class Sums(NamedTuple):
    """What the queries of a tile, or of all tiles [N, ..], have read so far."""

    highest: Float[Array, "B H T"]  # largest logit
    weight: Float[Array, "B H T"]  # sum of exp(logit - highest)
    values: Float[Array, "B T H E"]  # sum of exp(logit - highest) v


def attend(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B L H E"],
    v: Float[Array, "B L H E"],
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    *,
    causal: bool = True,
    tile: int = TILE,
) -> Float[Array, "B L H E"]:
    """Attend over the whole row, of which each device of `sequence` holds L tokens.

    `positions` count inside a document. Padding (segment 0) is not seen, and gets zeros.
    """
    length = q.shape[1]
    tile = min(tile, length)
    marks = jnp.stack([segment_ids, positions], axis=-1)  # [B, L, 2]
    parts = (_tiles(x, tile) for x in (q, k, v, marks))
    y = _ring(*parts, causal)
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q, k, v, marks, causal):
    """All [N, B, T, ..]: N tiles of T tokens."""
    return _ring_fwd(q, k, v, marks, causal)[0]


def _ring_fwd(q, k, v, marks, causal):
    num_tiles, batch_size, length, heads, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    shape = (num_tiles, batch_size, heads, length)
    start = Sums(
        jnp.full(shape, jnp.finfo(wide).min, wide),
        jnp.zeros(shape, wide),
        jnp.zeros(q.shape, wide),
    )

    def step(carry, _):
        sums, passing = carry
        following = collectives.rotate(passing, collectives.SEQUENCE_AXIS)
        return (_read(q, marks, passing, sums, causal), following), None

    around = collectives.axis_size(collectives.SEQUENCE_AXIS) - 1
    (sums, passing), _ = jax.lax.scan(step, (start, (k, v, marks)), length=around)
    sums = _read(q, marks, passing, sums, causal)
    seen = sums.weight > 0
    weight = jnp.where(seen, sums.weight, 1)
    y = sums.values / jnp.moveaxis(weight, 2, 3)[..., None]
    log_sum = jnp.where(seen, sums.highest + jnp.log(weight), 0)
    y, log_sum = (remat.name(x, "attended") for x in (y.astype(q.dtype), log_sum))
    return y, (q, k, v, marks, y, log_sum)


def _ring_bwd(causal, residuals, dy):
    q, k, v, marks, y, log_sum = residuals
    wide = log_sum.dtype
    delta = jnp.sum(dy.astype(wide) * y.astype(wide), axis=-1)
    queries = (q, marks, dy, log_sum, jnp.moveaxis(delta, 2, 3))

    def step(carry, _):
        dq, passing, grads = carry
        following = collectives.rotate(passing, collectives.SEQUENCE_AXIS)
        dq, grads = _read_back(queries, passing, dq, grads, causal)
        grads = collectives.rotate(grads, collectives.SEQUENCE_AXIS)
        return (dq, following, grads), None

    around = collectives.axis_size(collectives.SEQUENCE_AXIS) - 1
    zeros = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    carry, _ = jax.lax.scan(step, (zeros[0], (k, v, marks), zeros[1:]), length=around)
    dq, passing, grads = carry
    dq, grads = _read_back(queries, passing, dq, grads, causal)
    dk, dv = collectives.rotate(grads, collectives.SEQUENCE_AXIS)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _read(q, marks, passing, sums, causal):
    """Let every tile of queries read every tile of the keys that are here now."""

    def one_key_tile(q, marks, sums, keys):
        k, v, key_marks = keys
        mask = _mask(marks, key_marks, causal)
        update = functools.partial(_update, q, k, v, mask)
        return jax.lax.cond(jnp.any(mask), update, lambda sums: sums, sums), None

    def one_query_tile(_, inputs):
        q, marks, sums = inputs
        step = functools.partial(one_key_tile, q, marks)
        return None, jax.lax.scan(step, sums, passing)[0]

    return jax.lax.scan(one_query_tile, None, (q, marks, sums))[1]


def _update(q, k, v, mask, sums):
    logits = jnp.where(mask, _logits(q, k), jnp.finfo(sums.highest.dtype).min)
    highest = jnp.maximum(sums.highest, jnp.max(logits, axis=-1))
    # Where nothing has been seen yet, `highest` is the lowest number: mask once more.
    weights = jnp.where(mask, jnp.exp(logits - highest[..., None]), 0)
    shrink = jnp.exp(sums.highest - highest)  # [B, H, T]
    wide = sums.values.dtype
    read = jnp.einsum(
        "bhts,bshe->bthe", weights.astype(v.dtype), v, preferred_element_type=wide
    )
    values = sums.values * jnp.moveaxis(shrink, 1, 2)[..., None] + read
    weight = sums.weight * shrink + jnp.sum(weights, axis=-1)
    return Sums(highest, weight, values)


def _read_back(queries, passing, dq, grads, causal):
    """Add to dq, and to the gradients of the keys and values that are here now."""

    def one_key_tile(query, dq, inputs):
        k, v, key_marks, dk, dv = inputs
        q, marks, dy, log_sum, delta = query
        mask = _mask(marks, key_marks, causal)
        update = functools.partial(_update_back, q, dy, log_sum, delta, k, v, mask)
        grads = dq, dk, dv
        dq, dk, dv = jax.lax.cond(jnp.any(mask), update, lambda grads: grads, grads)
        return dq, (dk, dv)

    def one_query_tile(grads, inputs):
        *query, dq = inputs
        step = functools.partial(one_key_tile, query)
        dq, grads = jax.lax.scan(step, dq, (*passing, *grads))
        return grads, dq

    grads, dq = jax.lax.scan(one_query_tile, grads, (*queries, dq))
    return dq, grads


def _update_back(q, dy, log_sum, delta, k, v, mask, grads):
    dq, dk, dv = grads
    dot = functools.partial(jnp.einsum, preferred_element_type=dq.dtype)
    logits = jnp.where(mask, _logits(q, k) - log_sum[..., None], -jnp.inf)
    weights = jnp.exp(logits)  # [B, H, T, S]
    dlogits = weights * (dot("bthe,bshe->bhts", dy, v) - delta[..., None])
    dlogits = (dlogits * q.shape[-1] ** -0.5).astype(q.dtype)
    return (
        dq + dot("bhts,bshe->bthe", dlogits, k),
        dk + dot("bhts,bthe->bshe", dlogits, q),
        dv + dot("bhts,bthe->bshe", weights.astype(dy.dtype), dy),
    )


def _logits(q, k):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bthe,bshe->bhts", q, k, preferred_element_type=wide)
    return logits * q.shape[-1] ** -0.5


def _mask(marks, key_marks, causal):
    """True where a query may look: [B, 1, T, S]; see `attention.causal_mask`."""
    segments, positions = (marks[..., i][:, None, :, None] for i in (0, 1))
    key_segments, key_positions = (key_marks[..., i][:, None, None] for i in (0, 1))
    mask = (key_segments == segments) & (key_segments != 0)
    return mask & (key_positions <= positions) if causal else mask


def _tiles(x, tile):
    """[B, L, ..] -> [N, B, T, ..], padded with zeros: segment 0."""
    extra = -x.shape[1] % tile
    x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, tile, *x.shape[2:]), 1, 0)
