"""The prefix primitive against its definition, its gradient and its state.

Mutations tried by hand are named with the test they turn red.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoryformer.ops import document_max, prefix

B, L, H, R, F = 2, 23, 3, 5, 4
SEGMENTS = np.array([[1] * 6 + [0] + [1] * 3 + [2] * 9 + [3] * 4, [0, 0] + [7] * 21])


@functools.cache
def _inputs(with_shift):
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(size=(B, L, H, n)) for n in (R, R, F))
    shift = 0.3 * rng.random((B, L, H)).cumsum(axis=1) if with_shift else None
    return tuple(
        None if x is None else jnp.asarray(x, jnp.float32) for x in (a, b, c, shift)
    )


def _dense(a, b, c, segments, shift):
    """The module's equation in float64, every pair of tokens written out."""
    a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
    g = np.zeros((B, L, H)) if shift is None else np.asarray(shift, np.float64)
    o = np.zeros((B, L, H, F))
    for row in range(B):
        for t in range(L):
            for s in range(t + 1):
                if segments[row, s] == segments[row, t] != 0:
                    weight = np.exp(g[row, s] - g[row, t])
                    weight = weight * np.sum(a[row, t] * b[row, s], axis=-1)
                    o[row, t] += weight[:, None] * c[row, s]
    return o


@functools.partial(jax.jit, static_argnames="chunk_size")
def _jitted(a, b, c, shift, segments, state, chunk_size):
    return prefix.prefix(a, b, c, segments, state, shift=shift, chunk_size=chunk_size)


def _call(a, b, c, shift, segments=SEGMENTS, state=None, chunk_size=4):
    segments = jnp.asarray(segments, jnp.int32)
    return _jitted(a, b, c, shift, segments, state, chunk_size)


def _split_calls(a, b, c, shift, cuts):
    outputs, state = [], prefix.init_state(B, H, R, F)
    edges = [0, *cuts, L]
    for i, j in itertools.pairwise(edges):
        part = None if shift is None else shift[:, i:j]
        o, state = _call(a[:, i:j], b[:, i:j], c[:, i:j], part, SEGMENTS[:, i:j], state)
        outputs.append(o)
    return jnp.concatenate(outputs, axis=1), state


@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_definition(with_shift, chunk_size):
    """Red if a chunk forgets `seen`, `continues` or `remains`, or a sign of the gap."""
    a, b, c, shift = _inputs(with_shift)
    o, _ = _call(a, b, c, shift, chunk_size=chunk_size)
    np.testing.assert_allclose(o, _dense(a, b, c, SEGMENTS, shift), atol=1e-5)


@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize("cuts", [(8,), tuple(range(1, L))])
def test_calls_continue_each_other(with_shift, cuts):
    """Red if the state drops its document (padding at a cut) or its shift."""
    a, b, c, shift = _inputs(with_shift)
    whole, whole_state = _call(a, b, c, shift)
    parts, state = _split_calls(a, b, c, shift, cuts)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), state, whole_state
    )


@pytest.mark.parametrize("with_shift", [False, True])
def test_gradient(with_shift):
    """Of both outputs, to all inputs, against autodiff of the definition.

    Red if `dsums` does not enter the reversed sums, if `dstate` forgets the document, or if
    the reversed shift keeps its sign.
    """
    a, b, c, shift = _inputs(with_shift)
    rng = np.random.default_rng(1)
    sums = jnp.asarray(rng.normal(size=(B, H, R, F)), jnp.float32)
    before = jnp.zeros((B, H)) if shift is None else shift[:, 0] - 0.2
    segment_ids = jnp.asarray([4, 7], jnp.int32)  # another document; the same
    do = jnp.asarray(rng.normal(size=(B, L, H, F)), jnp.float32)
    dsums = jnp.asarray(rng.normal(size=(B, H, R, F)), jnp.float32)

    def ours(a, b, c, sums):
        state = prefix.PrefixState(sums, segment_ids, before)
        o, state = _call(a, b, c, shift, state=state)
        return jnp.sum(o * do) + jnp.sum(state.sums * dsums)

    def dense(a, b, c, sums):
        g = jnp.zeros((B, L, H)) if shift is None else shift
        g = jnp.concatenate([before[:, None], g], axis=1)
        real = jnp.asarray(SEGMENTS != 0)[..., None, None]
        filled = prefix.fill_padding(jnp.asarray(SEGMENTS), segment_ids)
        filled = jnp.concatenate([segment_ids[:, None], filled], axis=1)
        past = jnp.arange(L + 1)[:, None] >= jnp.arange(L + 1)[None]
        mask = past[None] & (filled[:, :, None] == filled[:, None])
        gap = g[:, None] - g[:, :, None]  # [B, t, s, H]
        weight = jnp.exp(jnp.where(mask[..., None], gap, -jnp.inf))
        outer = jnp.einsum("bshr,bshf->bshrf", b * real, c)
        outer = jnp.concatenate([sums[:, None], outer], axis=1)
        states = jnp.einsum("btsh,bshrf->bthrf", weight, outer)
        o = jnp.einsum("bthr,bthrf->bthf", a * real, states[:, 1:])
        return jnp.sum(o * do) + jnp.sum(states[:, -1] * dsums)

    got, want = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(a, b, c, sums)
        for loss in (ours, dense)
    )
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def _recurrence(a, b, c, decay, sums, segment_ids):
    """S_t = exp(d_t) S_{t-1} + b_t (x) c_t, token by token: o and the last sums."""
    outputs, last = [], segment_ids
    for t in range(L):
        segment = SEGMENTS[:, t]
        real = jnp.asarray(segment != 0)[:, None, None, None]
        sums = jnp.where(
            jnp.asarray((segment != last) & (segment != 0))[:, None, None, None],
            0,
            sums,
        )
        new = jnp.exp(decay[:, t])[..., None, None] * sums
        new = new + b[:, t][..., None] * c[:, t][:, :, None]
        sums = jnp.where(real, new, sums)
        outputs.append(
            jnp.where(real[..., 0], jnp.einsum("bhr,bhrf->bhf", a[:, t], sums), 0)
        )
        last = np.where(segment != 0, segment, last)
    return jnp.stack(outputs, axis=1), sums


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_decay_is_the_recurrence(chunk_size):
    """In float64, to 1e-12: both outputs, and the gradient to every input with a state before it.

    The rows' first documents: another than the state's; the same one, after padding. Mutations:
    the decay of padding kept; `_next_backwards` that does not move it; no state in the gradient
    of the decay; a shift that is carried from chunk to chunk.
    """
    rng = np.random.default_rng(2)
    shapes = [(B, L, H, R), (B, L, H, R), (B, L, H, F), (B, L, H), (B, H, R, F)]
    before, weights = np.array([4, 7]), (rng.normal(size=(B, L, H, F)), 1)
    inputs = [rng.normal(size=shape) for shape in shapes]
    inputs[3] = -np.exp(inputs[3])

    def ours(a, b, c, decay, sums):
        segments = jnp.asarray(SEGMENTS, jnp.int32)
        state = prefix.PrefixState(
            sums, jnp.asarray(before, jnp.int32), jnp.zeros((B, H))
        )
        o, state = prefix.prefix(
            a, b, c, segments, state, decay=decay, chunk_size=chunk_size
        )
        assert o.dtype == state.shift.dtype == jnp.float64
        return o, state.sums

    def theirs(*inputs):
        return _recurrence(*inputs, before)

    def outputs_and_gradients(function, *inputs):
        def loss(*inputs):
            outputs = function(*inputs)
            return sum(
                jnp.sum(w * x**2) for w, x in zip(weights, outputs, strict=True)
            ), outputs

        return jax.grad(loss, argnums=tuple(range(5)), has_aux=True)(*inputs)

    with jax.enable_x64(True):
        got, want = (
            jax.jit(functools.partial(outputs_and_gradients, function))(*inputs)
            for function in (ours, theirs)
        )
        for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * (1 + np.abs(y).max()))
    with pytest.raises(ValueError, match="a shift or a decay, not both"):
        _, _, c, shift = _inputs(True)
        segments = jnp.asarray(SEGMENTS, jnp.int32)
        prefix.prefix(c, c, c, segments, shift=shift, decay=-shift)


def test_decay_of_a_long_row():
    """Nothing is summed over the row: float32 stays exact, where what is forgotten adds up.

    One token is read 2 tokens later, near the end of a row that forgets 8192 e-folds.
    Mutation: one cumulative sum of the decays of the row.
    """
    length, decay = 8192, np.float32(-0.3)
    decays = np.full((1, length, 1), -1.0, np.float32)
    decays[:, -2:] = decay
    ones = np.ones((1, length, 1, 1), np.float32)
    b = ones * (np.arange(length) == length - 3)[None, :, None, None]
    segments = np.ones((1, length), np.int32)
    o, _ = jax.jit(lambda *x: prefix.prefix(*x[:4], decay=x[4]))(
        ones, b, ones, segments, decays
    )
    np.testing.assert_allclose(o[0, -1, 0, 0], np.exp(2 * np.float64(decay)), rtol=1e-5)


def test_no_sum_is_stored_for_every_token():
    """Red without the custom gradient: autodiff keeps [.., R, F] for every chunk."""
    length, width = 512, 64
    a = jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32)
    segments = jnp.ones((1, length), jnp.int32)

    def loss(a, b, c):
        return jnp.sum(prefix.prefix(a, b, c, segments, chunk_size=1)[0])

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(a, a, a).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * length * width * width / 2


def test_running_max_restarts_with_a_document_and_skips_padding():
    """Red if padding counts, or if a state's maximum enters another document."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, H)), jnp.float32)
    segments = jnp.asarray(SEGMENTS, jnp.int32)
    running_max = jax.jit(document_max.so_far)
    got = running_max(x, segments)
    for row in range(B):
        for t in range(L):
            if SEGMENTS[row, t]:
                same = SEGMENTS[row, : t + 1] == SEGMENTS[row, t]
                want = np.asarray(x)[row, : t + 1][same].max(axis=0)
                np.testing.assert_array_equal(got[row, t], want)
    cut = 8
    state = prefix.PrefixState(None, segments[:, cut - 1], got[:, cut - 1])
    rest = running_max(x[:, cut:], segments[:, cut:], state)
    np.testing.assert_array_equal(rest, got[:, cut:])


def test_bfloat16_inputs_are_summed_in_float32():
    """Red if the sums take the inputs' type: a bf16 sum of ones stops at 256."""
    ones = jnp.ones((1, 1000, 1, 1), jnp.bfloat16)
    o, state = prefix.prefix(ones, ones, ones, jnp.ones((1, 1000), jnp.int32))
    assert o.dtype == state.sums.dtype == jnp.float32
    assert o[0, -1, 0, 0] == 1000
