"""Rows split over a `sequence` axis: ring attention, and sums over the past, as on one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx
from jax.sharding import PartitionSpec as P

from memoryformer import sharding
from memoryformer.model import mixers, transformer
from memoryformer.ops import attention, document_max, prefix, ring, window

B, L, H, E = 2, 32, 2, 4
SPEC = P(None, "sequence")


@functools.cache
def inputs(dtype="float32"):
    """q, k, v, a cotangent, and packed documents with padding inside and at the end."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(B, L, H, E)), dtype) for _ in range(4)]
    segments = np.array(
        [[1] * 13 + [2] * 6 + [0] * 2 + [3] * 11, [4] * 3 + [5] * 21 + [0] * 8],
        np.int32,
    )
    positions = toy.positions(segments)
    return *arrays, jnp.asarray(segments), jnp.asarray(positions)


def dense(q, k, v, segments, causal):
    index = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
    mask = attention.causal_mask(index, segments, index, segments, causal=causal)
    return attention.softmax(q, k, v, mask)


def over(mesh, function, *arrays):
    """Run `function` on the parts of arrays [B, L, ..], tokens as the mesh deals them."""
    dealt = {str(i): np.asarray(x) for i, x in enumerate(arrays)}
    placed = mesh.put_batch(dealt).values()
    mapped = mesh.shard_map(function, (SPEC,) * len(arrays), SPEC)
    with mesh.activate():
        results = toy.quick_jit(mapped)(*placed)
    order = mesh._dealt(np.arange(L)[None])[0]
    return jax.tree.map(lambda x: np.asarray(x)[:, np.argsort(order)], results)


def gradient(function):
    """(arrays, cotangent) -> the value and the gradients, for `value_and_grad` inside."""

    def run(*arrays):
        *arrays, dy = arrays
        y, back = jax.vjp(function, *arrays)
        return y, *back(dy)

    return run


@pytest.mark.parametrize(
    "size, striped, causal, tile",
    [
        (4, True, True, 3),
        (8, True, True, 512),
        (4, False, True, 2),
        (4, True, False, 3),
    ],
)
def test_ring_is_attention(size, striped, causal, tile):
    """Values and gradients, dealt out in turn or in parts; the tile need not divide.

    Mutations: `shrink` left out; `log_sum` of another row's maximum; gradients of keys
    not sent home; the last `_read` left out; key marks that stay behind.
    """
    q, k, v, dy, segments, positions = inputs()
    mesh = sharding.make(
        f"sequence:sequence={size}", jax.devices()[:size], striped=striped
    )

    def parts(q, k, v, segments, positions, dy):
        read = functools.partial(ring.attend, causal=causal, tile=tile)
        return gradient(lambda *x: read(*x, segments, positions))(q, k, v, dy)

    ours = over(mesh, parts, q, k, v, segments, positions, dy)
    theirs = gradient(lambda *x: dense(*x, segments, causal))(q, k, v, dy)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)


def test_ring_in_float64():
    """The formulas themselves. Mutation: `delta` without the weighted values."""
    with jax.enable_x64(True):
        q, k, v, dy, segments, positions = inputs("float64")
        read = gradient(lambda *x: ring.attend(*x, segments, positions, tile=5))
        theirs = gradient(lambda *x: dense(*x, segments, True))(q, k, v, dy)
        for x, y in zip(read(q, k, v, dy), theirs, strict=True):
            assert x.dtype == jnp.float64
            np.testing.assert_allclose(x, y, atol=1e-13)


def test_what_the_ring_sends():
    """Keys, values and their marks in the first round; their gradients too in the second.

    Nothing is gathered, and nothing as long as a row crosses. Mutation: `all_gather` of
    the segment ids.
    """
    q, k, v, dy, segments, positions = inputs()
    mesh = sharding.make("sequence:sequence=4", jax.devices()[:4])

    def parts(q, k, v, segments, positions, dy):
        read = gradient(lambda *x: ring.attend(*x, segments, positions))
        return read(q, k, v, dy)

    mapped = mesh.shard_map(parts, (SPEC,) * 6, SPEC)
    with mesh.activate():
        arrays = [np.asarray(x) for x in (q, k, v, segments, positions, dy)]
        placed = mesh.put_batch(dict(enumerate(arrays))).values()
        lowered = jax.jit(mapped).lower(*placed)
        text = lowered.compile().as_text()
    kinds = "collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all"
    found = re.findall(rf"= (\S+?)\{{\S* ({kinds})(?:-start)?\(", text)
    part, marks = f"f32[1,{B},{L // 4},{H},{E}]", f"s32[1,{B},{L // 4},2]"
    # A round is a loop; XLA may unroll it, so the shapes are what is asserted.
    assert {kind for _, kind in found} == {"collective-permute"}
    assert {shape for shape, _ in found} == {part, marks}
    assert len(found) <= 3 + 5 + 2  # two loops, and the gradients' way home


def test_dealt_out_tokens_balance_the_ring():
    """In turn, all devices pass over as many tiles; in parts, the last one over none.

    A tile counts if any of its queries sees any of its keys, as in `ring`. Mutation:
    `_dealt` that returns the rows.
    """
    length, size, tile = 64, 4, 4
    rows = np.arange(length, dtype=np.int32)[None]
    work = {}
    for striped in (False, True):
        mesh = sharding.make("sequence", jax.devices()[:size], striped=striped)
        marks = np.stack([np.ones_like(rows), mesh._dealt(rows)], axis=-1)
        tiles = marks.reshape(size, -1, 1, tile, 2)  # [devices, N, B = 1, T, 2]
        work[striped] = [
            sum(
                bool(ring._mask(queries, keys, True).any())
                for queries in own
                for keys in tiles.reshape(-1, 1, tile, 2)
            )
            for own in tiles
        ]
    assert max(work[True]) - min(work[True]) == 0
    assert work[False] == [10, 26, 42, 58]
    assert work[True] == [40] * size  # and 64 without passing over any


@pytest.mark.parametrize("with_shift", [False, True])
def test_states_of_earlier_parts(with_shift):
    """Sums over the past with the row on 8 devices, values and gradients, as on one.

    Documents begin at the edges of parts, inside them and cover several; a part is
    padding only. Mutations: `_combine` without `keep`, or without `empty`; `_larger`
    without `same`; `scan_before` that stops one round early; padding numbered 1.
    """
    q, k, v, dy, _, _ = inputs()
    segments = np.array(
        [[2] * 4 + [1] * 17 + [3] * 1 + [0] * 2 + [3] * 8,
         [0] * 3 + [4] * 5 + [0] * 6 + [4] * 2 + [5] * 16], np.int32
    )  # fmt: skip
    level = jnp.asarray(np.random.default_rng(1).normal(size=(B, L, H)), jnp.float32)

    def read(q, k, v, segments, level):
        shift = document_max.so_far(level, segments) if with_shift else None
        return prefix.prefix(q, k, v, segments, shift=shift, chunk_size=3)[0]

    def run(q, k, v, segments, level, dy):
        return gradient(lambda *x: read(*x, segments, level))(q, k, v, dy)

    arrays = q, k, v, segments, level, dy
    ours = over(sharding.make("sequence"), run, *arrays)
    for x, y in zip(ours, toy.quick_jit(run)(*arrays), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_tails_of_earlier_parts():
    """What a filter sees of the parts before its own, whatever their padding.

    Mutations: `later_tail` that returns the right tail, or whose places count from 0.
    """
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(B, 12, 1)).astype(np.float32)
    segments = np.array([[1] * 4 + [0] * 2 + [1] + [0] * 4 + [2], [0] * 7 + [3] * 5])

    def tail(first, last, size=3):
        kept = np.zeros((B, size, 1), np.float32), np.zeros((B, size), np.int32)
        for i in range(B):
            real = [t for t in range(first, last) if segments[i, t]][-size:]
            if real:
                kept[0][i, -len(real) :] = rows[i, real]
                kept[1][i, -len(real) :] = segments[i, real]
        return window.Tail(*kept)

    for cut, last in ((4, 7), (6, 12), (3, 11), (7, 7), (0, 5)):
        whole = window.later_tail(tail(0, cut), tail(cut, last))
        for x, y in zip(whole, tail(0, last), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("mixer", ["softmax", "conv_luna", "performer", "mamba2"])
def test_two_devices_are_several(mixer):
    """What looks along a row looks at the other half too, as on one device.

    Mutation: `> 2` for `> 1`, where a mixer or a sum asks how many there are.
    """
    options = {"num_features": 6} if mixer == "performer" else None
    config = toy.model_config("dense", mixer=mixer, seq_len=L, mixer_options=options)
    rngs = nnx.Rngs(0)
    project = functools.partial(transformer.make_projection, config, rngs=rngs)
    made = mixers.MIXERS[mixer](config, project, rngs=rngs, layer=0)
    graph, params = nnx.split(made)
    params = jax.tree.map(np.asarray, params)
    *_, segments, positions = inputs()
    x = np.random.default_rng(3).normal(size=(B, L, config.embed_dim))

    def mix(x, positions, segments):
        seq = mixers.SeqInfo(positions, segments)
        return nnx.merge(graph, params)(x, seq)[0]

    striped = mixers.takes_any_order(config)
    two = sharding.make("sequence", jax.devices()[:2], striped=striped)
    arrays = x.astype(np.float32), positions, segments
    real = segments != 0
    one = np.asarray(toy.quick_jit(mix)(*arrays))[real]
    np.testing.assert_allclose(over(two, mix, *arrays)[real], one, atol=2e-5)
