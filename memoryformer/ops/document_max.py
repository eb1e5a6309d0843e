"""The largest value of a document so far, or of the whole document, at every token.

As a `shift` of `prefix.prefix` it keeps sums of exponentials within float32. Start at
`so_far`.
"""

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, Float, Int
from memoryformer.ops import collectives
from memoryformer.ops.prefix import PrefixState, fill_padding


def whole(
    x: Float[Array, "B L H"], segment_ids: Int[Array, "B L"]
) -> Float[Array, "B L H"]:
    """Largest x of each token's whole document; padding does not count."""
    past = so_far(x, segment_ids)
    future = so_far(jnp.flip(x, axis=1), jnp.flip(segment_ids, axis=1))
    return jnp.maximum(past, jnp.flip(future, axis=1))


def so_far(
    x: Float[Array, "B L H"],
    segment_ids: Int[Array, "B L"],
    state: PrefixState | None = None,
) -> Float[Array, "B L H"]:
    """Largest x of the document so far, ready to be a `shift`; padding does not count."""
    if state is None:
        before, shift = jnp.zeros_like(segment_ids[:, 0]), jnp.zeros_like(x[:, 0])
    else:
        before, shift = state.segment_ids, state.shift
    if collectives.axis_size(collectives.SEQUENCE_AXIS) > 1:
        last_segment = fill_padding(segment_ids, 0 * before)[:, -1]
        highest = _so_far(x, segment_ids, 0 * before, 0 * shift)[:, -1]
        earlier = collectives.scan_before(
            _larger, (last_segment, highest), collectives.SEQUENCE_AXIS
        )
        before, shift = _larger((before, shift), earlier)
    return _so_far(x, segment_ids, before, shift)


def _larger(left, right):
    """Last document and its largest x of two runs of tokens, from those of each alone."""
    (left_segment, left_max), (right_segment, right_max) = left, right
    same, empty = left_segment == right_segment, right_segment == 0
    highest = jnp.where(same[:, None], jnp.maximum(left_max, right_max), right_max)
    highest = jnp.where(empty[:, None], left_max, highest)
    return jnp.where(empty, left_segment, right_segment), highest


def _so_far(x, segment_ids, before, shift):
    """`before`, `shift`: the document before the first token, and its maximum."""
    segments = fill_padding(segment_ids, before)
    segments = jnp.concatenate([before[:, None], segments], axis=1)
    x = jnp.where((segment_ids != 0)[..., None], x, -jnp.inf)
    x = jnp.concatenate([shift[:, None], x.astype(shift.dtype)], axis=1)
    starts = segments[:, 1:] != segments[:, :-1]
    starts = jnp.concatenate([jnp.ones_like(starts[:, :1]), starts], axis=1)

    def combine(left, right):
        (left_start, left_max), (right_start, right_max) = left, right
        highest = jnp.where(right_start, right_max, jnp.maximum(left_max, right_max))
        return left_start | right_start, highest

    starts = jnp.broadcast_to(starts[..., None], x.shape)
    return jax.lax.associative_scan(combine, (starts, x), axis=1)[1][:, 1:]
