"""The prefix primitive behind every linear-time mixer.

    o_t = a_t . sum_{s <= t, same document} exp(g_s - g_t) b_s (x) c_s

Kernel attention is one call, (phi(q), phi(k), [v, 1]); attention through a bounded memory is
two, (q, k, w), a softmax over the slots, and (p, w, v). The factor exp(g_s - g_t) is there for
sums too large for float32: g is a running maximum, and a ratio of two sums does not see it.
A sum may also forget, each token multiplying what lies before it by its own exp(d_t) <= 1:

    o_t = a_t . S_t,     S_t = exp(d_t) S_{t-1} + b_t (x) c_t,     S = 0 before a document

which is the first equation with g_t = -(d_1 + .. + d_t). Here d is learned and so has a
gradient, and g is summed anew in each chunk: over a long row its differences would be lost.

One kernel trains, prefills and decodes: chunks of the sequence are masked matrix products, and
a running sum [R, F] goes from chunk to chunk and from call to call. The gradient is three
prefix sums, two of them over the reversed sequence, so no sum is stored for any position:

    da = prefix(do, c, b)      db = prefix'(c, do, a)      dc = prefix'(b, a, do)
    dd_t = sum_{s < t, same document} <b_s, db_s> - <a_s, da_s>

(a pair, which d_{s+1} to d_t multiply, is in db_s and da_t: in the sum after s, out after t).

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
    shift: Float[Array, "B H"]  # g of its last token; 0 where sums decay


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
    decay: Float[Array, "B L H"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "B L H F"], PrefixState]:
    """Read the running sum of b (x) c with a: see the module's equations.

    Args:
      a: what reads.
      b: what is stored, first axis of the sum.
      c: what is stored, second axis of the sum.
      segment_ids: the document of each token, 0 for padding. A document is one run of
        tokens; padding adds nothing, reads zeros, and may stand anywhere, also between
        two calls of the same document.
      state: what earlier calls saw.
      shift: g, never falling within a document. It gets no gradient.
      decay: d <= 0, with a gradient; instead of a shift.
      chunk_size: tokens per matrix product; it does not change the result.

    Returns:
      o in float32 (float64 for float64 inputs), and the state after the last token.
    """
    if shift is not None and decay is not None:
        raise ValueError("prefix takes a shift or a decay, not both.")
    batch_size, length, num_heads, width = a.shape
    if state is None:
        dtype = jnp.promote_types(a.dtype, jnp.float32)
        state = init_state(batch_size, num_heads, width, c.shape[-1], dtype)
    real = (segment_ids != 0)[..., None, None]
    a, b = jnp.where(real, a, 0), jnp.where(real, b, 0)
    if decay is not None:
        decay = jnp.where(real[..., 0], decay, 0).astype(state.sums.dtype)
    if collectives.axis_size(collectives.SEQUENCE_AXIS) > 1:
        state = _after_earlier_parts(b, c, segment_ids, shift, decay, state)
    segments = fill_padding(segment_ids, state.segment_ids)
    last_shift = jnp.zeros_like(state.shift)
    if shift is not None:
        shift = jax.lax.stop_gradient(shift)
        last_shift = shift[:, -1]
    o, sums = _prefix(
        a, b, c, state.sums, decay, segments, shift, state[1:], min(chunk_size, length)
    )
    return o, PrefixState(sums, segments[:, -1], last_shift)


def _after_earlier_parts(b, c, segment_ids, shift, decay, state):
    """Return the state before this device's part of the row."""
    segments = fill_padding(segment_ids, jnp.zeros_like(segment_ids[:, 0]))
    remains = (segments == segments[:, -1:])[..., None]  # of the last document
    if decay is not None:
        inside = jnp.where(remains, decay, 0)
        later = jnp.flip(jnp.cumsum(jnp.flip(inside, axis=1), axis=1), axis=1)
        weight, last_shift = _masked_exp(remains, later - decay), -later[:, 0]
    elif shift is None:
        weight = remains.astype(state.sums.dtype)
        last_shift = jnp.zeros_like(state.shift)
    else:
        shift = jax.lax.stop_gradient(shift)
        last_shift = jnp.where(segments[:, -1:] != 0, shift[:, -1], 0)
        weight = _masked_exp(remains, shift - shift[:, -1:])
    b, c = (x.astype(state.sums.dtype) for x in (b, c))
    sums = jnp.einsum("bshr,bshf->bhrf", b * weight[..., None], c)
    here = PrefixState(sums, segments[:, -1], last_shift)
    combine = functools.partial(_combine, anew=decay is not None)
    before = collectives.scan_before(combine, here, collectives.SEQUENCE_AXIS)
    state = combine(state, before)
    return state if decay is None else state._replace(shift=jnp.zeros_like(last_shift))


def _combine(left, right, anew):
    """State after two runs of tokens, from the states after each of them alone.

    anew: the shift of each counts from its own first token.
    """
    same = (left.segment_ids == right.segment_ids)[:, None]  # [B, 1]
    empty = (right.segment_ids == 0)[:, None]
    gap = -right.shift if anew else left.shift - right.shift
    keep = _masked_exp(same | empty, jnp.where(empty, 0, gap))
    start = jnp.where(same, left.shift, 0) if anew else 0
    return PrefixState(
        left.sums * keep[..., None, None] + right.sums,
        jnp.where(empty[:, 0], left.segment_ids, right.segment_ids),
        jnp.where(empty, left.shift, start + right.shift),
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _prefix(a, b, c, sums, decay, segments, shift, before, chunk_size):
    """`before`: document and shift of the token before the first; sums are theirs."""
    return _scan_chunks(a, b, c, sums, decay, segments, shift, before, chunk_size)


def _prefix_fwd(*args):
    return _scan_chunks(*args), args[:8]


def _prefix_bwd(chunk_size, operands, cotangents):
    a, b, c, sums, decay, segments, shift, before = operands
    do, dsums = cotangents
    forward = (segments, shift, before, chunk_size)
    da, _ = _scan_chunks(do, c, b, sums.mT, decay, *forward)
    # Backwards, the last token comes first, and what it left behind has been seen already.
    ra, rb, rc, rdo = (jnp.flip(x, axis=1) for x in (a, b, c, do))
    after = (segments[:, -1], before[1] if shift is None else -shift[:, -1])
    last = jnp.flip(segments, axis=1)
    reverse = (last, None if shift is None else -jnp.flip(shift, axis=1), after)
    next_decay = None if decay is None else _next_backwards(decay)
    db, _ = _scan_chunks(rc, rdo, ra, dsums.mT, next_decay, *reverse, chunk_size)
    dc, dstate = _scan_chunks(rb, ra, rdo, dsums, next_decay, *reverse, chunk_size)
    db, dc = jnp.flip(db, axis=1), jnp.flip(dc, axis=1)
    gap = 0 * before[1] if shift is None else before[1] - shift[:, 0]
    gap = gap if decay is None else decay[:, 0]
    same = before[0] == segments[:, 0]
    dstate *= _masked_exp(same[:, None], gap)[..., None, None]
    ddecay = None
    if decay is not None:
        ddecay = _decay_gradient((a, da), (b, db), (sums, dstate), forward)
    primals, grads = (a, b, c, sums), (da, db, dc, dstate)
    typed = [g.astype(x.dtype) for g, x in zip(grads, primals, strict=True)]
    return (*typed, ddecay, None, None, None)


def _next_backwards(decay):
    """Backwards, the decay between two tokens is that of the one seen before."""
    return jnp.pad(decay, [(0, 0), (0, 1), (0, 0)])[:, :0:-1]


def _decay_gradient(reads, writes, before, forward):
    """Sum what is written and not yet read, over the tokens before each: [B, L, H]."""
    (a, da), (b, db), (sums, dsums) = reads, writes, before
    change = jnp.sum(b * db, axis=-1) - jnp.sum(a * da, axis=-1)
    change = change.astype(sums.dtype)[..., None]
    start = jnp.sum(sums * dsums, axis=(-2, -1))[..., None, None]
    ones = jnp.ones_like(change)
    through, _ = _scan_chunks(ones, ones, change, start, None, forward[0], None,
                              *forward[2:])  # fmt: skip
    return (through - change)[..., 0]


_prefix.defvjp(_prefix_fwd, _prefix_bwd)


def _scan_chunks(a, b, c, sums, decay, segments, shift, before, chunk_size):
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

    chunks = [split(x, "constant") for x in (a, b, c, decay)]  # T tokens to a chunk
    chunks += [split(x, "edge") for x in (segments, shift)]
    (sums, *_), o = jax.lax.scan(_one_chunk, (sums, *before), tuple(chunks))
    o = jnp.moveaxis(o, 0, 1).reshape(a.shape[0], -1, *o.shape[3:])
    return o[:, :length], sums


def _one_chunk(carry, chunk):
    sums, last_segment, last_shift = carry
    a, b, c, decay, segments, shift = chunk
    a, b, c = (x.astype(sums.dtype) for x in (a, b, c))
    if decay is not None:
        shift, last_shift = -jnp.cumsum(decay, axis=1), jnp.zeros_like(last_shift)
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
