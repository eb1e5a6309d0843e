"""The prefix primitive behind every linear-time mixer.

    o_t = a_t . sum_{s <= t, same document} exp(g_s - g_t) b_s (x) c_s

Kernel attention is one call, (phi(q), phi(k), [v, 1]); attention through a bounded memory is
two, (q, k, w), a softmax over the slots, and (p, w, v). The factor exp(g_s - g_t) is there for
sums too large for float32: g is a running maximum, and a ratio of two sums does not see it.

One kernel trains, prefills and decodes: chunks of the sequence are masked matrix products, and
a running sum [R, F] goes from chunk to chunk and from call to call. The gradient is three
prefix sums, two of them over the reversed sequence, so no sum is stored for any position:

    da = prefix(do, c, b)      db = prefix'(c, do, a)      dc = prefix'(b, a, do)

Where the devices of a `sequence` axis hold consecutive parts of the rows, each sums up its own
part, and gets the sum of all parts before it: a state goes round, and never a token. A state
given there is the one before the row; the one returned is the one after this device's part.

Start at `prefix`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, Float, Int
from memoryformer.ops import collectives

CHUNK_SIZE = 64


class PrefixState(NamedTuple):
    """What a row has seen; its size does not depend on how much that was."""

    sums: Float[Array, "B H R F"]  # sum_s exp(g_s - shift) b_s (x) c_s, of one document
    segment_ids: Int[Array, " B"]  # that document; 0 before the first
    shift: Float[Array, "B H"]  # g of its last token


def init_state(
    batch_size: int,
    num_heads: int,
    width: int,
    features: int,
    dtype: jnp.dtype = jnp.float32,
) -> PrefixState:
    """Return the state before any token: sums [B, H, R = width, F = features]."""
    return PrefixState(
        jnp.zeros((batch_size, num_heads, width, features), dtype),
        jnp.zeros((batch_size,), jnp.int32),
        jnp.zeros((batch_size, num_heads), dtype),
    )


def prefix(
    a: Float[Array, "B L H R"],
    b: Float[Array, "B L H R"],
    c: Float[Array, "B L H F"],
    segment_ids: Int[Array, "B L"],
    state: PrefixState | None = None,
    *,
    shift: Float[Array, "B L H"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "B L H F"], PrefixState]:
    """Read the running sum of b (x) c with a: see the module's equation.

    Args:
      a: what reads.
      b: what is stored, first axis of the sum.
      c: what is stored, second axis of the sum.
      segment_ids: the document of each token, 0 for padding. A document is one run of
        tokens; padding adds nothing, reads zeros, and may stand anywhere, also between
        two calls of the same document.
      state: what earlier calls saw.
      shift: g, never falling within a document. It gets no gradient.
      chunk_size: tokens per matrix product; it does not change the result.

    Returns:
      o in float32 (float64 for float64 inputs), and the state after the last token.
    """
    batch_size, length, num_heads, width = a.shape
    if state is None:
        dtype = jnp.promote_types(a.dtype, jnp.float32)
        state = init_state(batch_size, num_heads, width, c.shape[-1], dtype)
    real = (segment_ids != 0)[..., None, None]
    a, b = jnp.where(real, a, 0), jnp.where(real, b, 0)
    if collectives.axis_size(collectives.SEQUENCE_AXIS) > 1:
        state = _after_earlier_parts(b, c, segment_ids, shift, state)
    segments = fill_padding(segment_ids, state.segment_ids)
    if shift is None:
        last_shift = jnp.zeros_like(state.shift)
    else:
        shift = jax.lax.stop_gradient(shift)
        last_shift = shift[:, -1]
    o, sums = _prefix(
        a, b, c, state.sums, segments, shift, state[1:], min(chunk_size, length)
    )
    return o, PrefixState(sums, segments[:, -1], last_shift)


def _after_earlier_parts(b, c, segment_ids, shift, state):
    """Return the state before this device's part of the row."""
    segments = fill_padding(segment_ids, jnp.zeros_like(segment_ids[:, 0]))
    remains = (segments == segments[:, -1:])[..., None]  # of the last document
    if shift is None:
        weight = remains.astype(state.sums.dtype)
        last_shift = jnp.zeros_like(state.shift)
    else:
        shift = jax.lax.stop_gradient(shift)
        last_shift = jnp.where(segments[:, -1:] != 0, shift[:, -1], 0)
        weight = _masked_exp(remains, shift - shift[:, -1:])
    b, c = (x.astype(state.sums.dtype) for x in (b, c))
    sums = jnp.einsum("bshr,bshf->bhrf", b * weight[..., None], c)
    here = PrefixState(sums, segments[:, -1], last_shift)
    before = collectives.scan_before(_combine, here, collectives.SEQUENCE_AXIS)
    return _combine(state, before)


def _combine(left, right):
    """State after two runs of tokens, from the states after each of them alone."""
    same = (left.segment_ids == right.segment_ids)[:, None]  # [B, 1]
    empty = (right.segment_ids == 0)[:, None]
    keep = _masked_exp(same | empty, jnp.where(empty, 0, left.shift - right.shift))
    return PrefixState(
        left.sums * keep[..., None, None] + right.sums,
        jnp.where(empty[:, 0], left.segment_ids, right.segment_ids),
        jnp.where(empty, left.shift, right.shift),
    )


def total(
    a: Float[Array, "B L H R"],
    b: Float[Array, "B L H R"],
    c: Float[Array, "B L H F"],
    segment_ids: Int[Array, "B L"],
    *,
    chunk_size: int = CHUNK_SIZE,
) -> Float[Array, "B L H F"]:
    """Read the sum over the whole document, past and future, with a; as `prefix`."""
    past, _ = prefix(a, b, c, segment_ids, chunk_size=chunk_size)
    back = [jnp.flip(x, axis=1) for x in (a, b, c, segment_ids)]
    read, _ = prefix(back[0], back[1], back[2], back[3], chunk_size=chunk_size)
    future = jnp.flip(read, axis=1)
    present = jnp.sum(a * b, axis=-1, keepdims=True) * c  # in both of them
    return past + future - jnp.where((segment_ids != 0)[..., None, None], present, 0)


def fill_padding(
    segment_ids: Int[Array, "B L"], before: Int[Array, " B"]
) -> Int[Array, "B L"]:
    """Give padding the id of the document before it (`before`: of the first token)."""
    index = jnp.arange(1, segment_ids.shape[1] + 1, dtype=jnp.int32)[None]
    last = jax.lax.cummax(jnp.where(segment_ids != 0, index, 0), axis=1)
    padded = jnp.concatenate([before[:, None], segment_ids], axis=1)
    return jnp.take_along_axis(padded, last, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _prefix(a, b, c, sums, segments, shift, before, chunk_size):
    """`before`: document and shift of the token before the first; sums are theirs."""
    return _scan_chunks(a, b, c, sums, segments, shift, before, chunk_size)


def _prefix_fwd(*args):
    return _scan_chunks(*args), args[:7]


def _prefix_bwd(chunk_size, operands, cotangents):
    a, b, c, sums, segments, shift, before = operands
    do, dsums = cotangents
    da, _ = _scan_chunks(do, c, b, sums.mT, segments, shift, before, chunk_size)
    # Backwards, the last token comes first, and what it left behind has been seen already.
    ra, rb, rc, rdo = (jnp.flip(x, axis=1) for x in (a, b, c, do))
    after = (segments[:, -1], before[1] if shift is None else -shift[:, -1])
    segments = jnp.flip(segments, axis=1)
    shift = None if shift is None else -jnp.flip(shift, axis=1)
    reverse = (segments, shift, after, chunk_size)
    db, _ = _scan_chunks(rc, rdo, ra, dsums.mT, *reverse)
    dc, total = _scan_chunks(rb, ra, rdo, dsums, *reverse)
    gap = 0 * before[1] if shift is None else before[1] + shift[:, -1]
    same = before[0] == segments[:, -1]
    dstate = total * _masked_exp(same[:, None], gap)[..., None, None]
    grads = (da, jnp.flip(db, axis=1), jnp.flip(dc, axis=1), dstate)
    primals = (a, b, c, sums)
    typed = [g.astype(x.dtype) for g, x in zip(grads, primals, strict=True)]
    return (*typed, None, None, None)


_prefix.defvjp(_prefix_fwd, _prefix_bwd)


def _scan_chunks(a, b, c, sums, segments, shift, before, chunk_size):
    """The sum itself, chunk by chunk: o [B, L, H, F] and the sum after the last token."""
    length = a.shape[1]
    extra = -length % chunk_size

    def split(x, mode):
        if x is None:
            return None
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, extra)
        x = jnp.pad(x, pad, mode=mode)
        x = x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)  # [L / T, B, T, ..]

    chunks = [split(x, "constant") for x in (a, b, c)]  # T tokens to a chunk
    chunks += [split(x, "edge") for x in (segments, shift)]
    (sums, *_), o = jax.lax.scan(_one_chunk, (sums, *before), tuple(chunks))
    o = jnp.moveaxis(o, 0, 1).reshape(a.shape[0], -1, *o.shape[3:])
    return o[:, :length], sums


def _one_chunk(carry, chunk):
    sums, last_segment, last_shift = carry
    a, b, c, segments, shift = chunk
    a, b, c = (x.astype(sums.dtype) for x in (a, b, c))
    index = jnp.arange(a.shape[1])
    seen = (index[:, None] >= index[None])[None]
    seen &= segments[:, :, None] == segments[:, None, :]  # [B, T, S]
    continues = segments == last_segment[:, None]  # [B, T]
    remains = segments == segments[:, -1:]
    keeps = last_segment == segments[:, -1]  # [B]
    if shift is None:
        within, read, write, keep = seen[:, None], continues, remains, keeps
        read, write, keep = read[..., None], write[..., None], keep[:, None]
        within, read, write, keep = (
            x.astype(sums.dtype) for x in (within, read, write, keep)
        )
    else:
        by_head = jnp.moveaxis(shift, 1, 2)  # [B, H, T]
        gap = by_head[:, :, None, :] - by_head[:, :, :, None]  # [B, H, T, S]
        within = _masked_exp(seen[:, None], gap)
        read = _masked_exp(continues[..., None], last_shift[:, None] - shift)
        write = _masked_exp(remains[..., None], shift - shift[:, -1:])
        keep = _masked_exp(keeps[:, None], last_shift - shift[:, -1])
        last_shift = shift[:, -1]
    scores = jnp.einsum("bthr,bshr->bhts", a, b) * within
    o = jnp.einsum("bhts,bshf->bthf", scores, c)
    o += jnp.einsum("bthr,bhrf->bthf", a * read[..., None], sums)
    sums *= keep[..., None, None]
    sums += jnp.einsum("bshr,bshf->bhrf", b * write[..., None], c)
    return (sums, segments[:, -1], last_shift), o


def _masked_exp(mask, x):
    """exp(x) where the mask allows it, and exactly 0 elsewhere, however large x is."""
    return jnp.exp(jnp.where(mask, x, -jnp.inf))
