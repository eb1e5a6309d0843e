"""Layers and the small operations beside the lookup: rotary, attention, collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryformer.model import codes, layers, losses
from memoryformer.ops import attention, collectives, hashing, rotary


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(got, expected, tolerance=2e-6):
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


def memory_layer(features=(3, 6), score="softmax", **fields):
    fields = {"use_bias": True, "bias_std": 0.3, "table_std": 0.5} | fields
    return layers.MemoryLayer(
        12, features, code_bits=4, score=score, rngs=nnx.Rngs(0), **fields
    )


@pytest.mark.parametrize("score", hashing.SCORES)
def test_memory_layer(score):
    """Several feature axes share one hash and one bias; beta and gamma are used.

    Mutations: the bias left out; the learned score's `learned` not passed on; the axes
    of `features` swapped in the reshape.
    """
    layer = memory_layer(score=score, temperature=0.7)
    learned = {}
    if score == "learned":
        np.testing.assert_allclose(layer.beta[...], 2 / 0.7, rtol=1e-6)
        assert layer.gamma[...] == 1
        layer.beta[...], layer.gamma[...] = jnp.float32(1.1), jnp.float32(0.6)
        learned = {"beta": 1.1, "gamma": 0.6}
    x = normal((2, 5, 12))
    y = layer(jnp.asarray(x))
    tables, bias = (np.asarray(a[...], np.float64) for a in (layer.tables, layer.bias))
    assert tables.shape == (3, 16, 3, 6) and y.shape == (2, 5, 3, 6)
    expected = oracle.memory_layer(
        x.reshape(10, 12), tables, bias, score, 0.7, **learned
    )
    close(y, expected.reshape(2, 5, 3, 6))


def test_memory_layer_in_bfloat16():
    """Computed in bfloat16 over float32 parameters, to bfloat16's precision.

    Mutation: `self.dtype` ignored at the end.
    """
    layer = memory_layer(dtype=jnp.bfloat16)
    x = jnp.asarray(normal((7, 12)), jnp.bfloat16)
    y = layer(x)
    assert y.dtype == jnp.bfloat16 and layer.tables.dtype == jnp.float32
    tables, bias = (np.asarray(a[...], np.float64) for a in (layer.tables, layer.bias))
    expected = oracle.memory_layer(np.asarray(x, np.float64), tables, bias, "softmax")
    close(np.asarray(y, np.float64), expected, 1e-2)


def test_kept_codes():
    """Of the last call, once asked for. Mutation: kept without being asked."""
    layer, x = memory_layer(), jnp.asarray(normal((3, 12)))
    layer(x)
    assert codes.taken(layer) == {}
    codes.ask(layer)
    layer(jnp.zeros_like(x))
    layer(x)
    expected = oracle.codes(np.asarray(x).reshape(3, 3, 4))
    np.testing.assert_array_equal(codes.taken(layer)[""], expected)


def test_norms():
    """Statistics in float32, from bfloat16 too; eps where each norm has it.

    Mutations: eps inside the root of RMSNorm; the mean not subtracted.
    """
    x = 3 * normal((4, 5, 8)) + 1
    rms, layer = layers.RMSNorm(8, eps=0.1), layers.LayerNorm(8, eps=0.1)
    for norm in (rms, layer):
        norm.scale[...] = jnp.asarray(normal((8,), 1))
    layer.bias[...] = jnp.asarray(normal((8,), 2))
    for dtype, tolerance in (("float32", 2e-6), ("bfloat16", 1e-2)):
        cast = jnp.asarray(x, dtype)
        wide = np.asarray(cast, np.float64)
        expected = oracle.rms_norm(wide, normal((8,), 1), 0.1)
        close(rms(cast).astype(jnp.float32), expected, tolerance)
        expected = oracle.layer_norm(wide, normal((8,), 1), normal((8,), 2), 0.1)
        close(layer(cast).astype(jnp.float32), expected, tolerance)
        assert rms(cast).dtype == layer(cast).dtype == dtype


def test_dense_and_head():
    """x W + b over several feature axes, with inputs split or not; float32 logits.

    Mutation: the bias left out.
    """
    x = normal((2, 3, 8))
    for split_inputs, features in ((False, (3, 4)), (True, 4)):
        dense = layers.Dense(
            8, features, split_inputs=split_inputs, kernel_std=1.0, rngs=nnx.Rngs(0)
        )
        dense.bias[...] = jnp.asarray(normal(dense.bias.shape, 4))
        kernel, bias = np.asarray(dense.kernel[...]), np.asarray(dense.bias[...])
        close(dense(jnp.asarray(x)), np.tensordot(x, kernel, axes=1) + bias)
    head = layers.Head(8, 11, std=1.0, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits = head(jnp.asarray(x))
    assert logits.dtype == jnp.float32
    close(logits, x @ np.asarray(head.kernel[...]), 2e-2)


def test_embedding():
    """Rows by id; an id outside the vocabulary is NaN, never another token's row.

    Mutation: `mode="clip"`.
    """
    embed = layers.Embed(5, 4, std=1.0, rngs=nnx.Rngs(0))
    rows = np.asarray(embed.embedding[...])
    got = np.asarray(embed(jnp.asarray([[4, 0, 5, 1]])))
    np.testing.assert_array_equal(got[0, [0, 1, 3]], rows[[4, 0, 1]])
    assert np.isnan(got[0, 2]).all()
    close(embed.attend(jnp.asarray(normal((3, 4)))), normal((3, 4)) @ rows.T)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6, 1.0])
def test_rotary(fraction):
    """Turns pairs by position, as complex numbers; the rest of a head stays.

    Mutations: pairs (2i, 2i + 1); frequency base^(-i / R); sin with the other sign.
    """
    x, positions = normal((2, 6, 3, 8)), np.array([[0, 1, 2, 0, 1, 99]] * 2)
    got = rotary.rotate(jnp.asarray(x), jnp.asarray(positions), fraction, 100.0)
    close(got, oracle.rotary(x, positions, fraction, 100.0))


def test_attention():
    """Inside documents and never ahead; padding gets zeros and is not looked at.

    Mutations: `<` for `<=`; no scale; no check of segment 0.
    """
    q, k, v = (normal((2, 7, 2, 4), seed) for seed in range(3))
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 4, 4, 4, 4, 4, 4]])
    index = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
    mask = attention.causal_mask(index, segments, index, segments)
    got = attention.softmax(*(jnp.asarray(a) for a in (q, k, v)), mask)
    close(got, oracle.attention(*(a.astype(np.float64) for a in (q, k, v)), segments))
    assert not got[0, 5:].any() and not got[1, 0].any()


def test_token_nats():
    """-log softmax at the target, also of logits in the thousands.

    Mutation: the maximum not subtracted.
    """
    logits = normal((2, 5, 9)) * np.array([1.0, 3000.0], np.float32)[:, None, None]
    targets = np.random.default_rng(0).integers(0, 9, (2, 5))
    expected = oracle.token_nats(logits.astype(np.float64), targets)
    got = losses.token_nats(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# name -> (function, what it gives of the parts [8, 2, 3] that eight devices hold)
COLLECTIVES = {
    "psum": (collectives.psum, lambda x: np.broadcast_to(x.sum(0), (8, 2, 3))),
    "pmax": (collectives.pmax, lambda x: np.broadcast_to(x.max(0), (8, 2, 3))),
    "all_gather": (
        functools.partial(collectives.all_gather, dim=-1),
        lambda x: np.broadcast_to(np.concatenate(list(x), axis=-1), (8, 2, 24)),
    ),
    "reduce_scatter": (
        functools.partial(collectives.reduce_scatter, dim=-1),
        lambda x: np.stack(np.split(x.sum(0), 3, axis=-1)),
    ),
    "mean": (
        collectives.mean,
        lambda x: np.broadcast_to(x.mean((0, 2))[None, :, None], (8, 2, 1)),
    ),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives(name):
    """The identity where there is no such axis, the collective where there is.

    Mutations: `_present` always False; `mean` divided by its own part's size alone.
    """
    function, expected = COLLECTIVES[name]
    devices = 3 if name == "reduce_scatter" else 8  # the parts' last axis is 3
    x = jnp.asarray(normal((devices, 2, 3)))
    alone = x.mean(-1, keepdims=True) if name == "mean" else x
    np.testing.assert_allclose(function(x, "model"), alone, rtol=1e-6)
    mesh = jax.make_mesh((devices,), ("model",), devices=jax.devices()[:devices])
    spread = jax.shard_map(
        lambda part: function(part[0], "model")[None],
        mesh=mesh,
        in_specs=P("model"),
        out_specs=P("model"),
        check_vma=False,
    )
    parts = jax.device_put(x, NamedSharding(mesh, P("model")))
    with jax.set_mesh(mesh):
        close(spread(parts), expected(np.asarray(x)))
    assert (collectives.axis_size("model"), collectives.axis_index("model")) == (1, 0)


def test_what_a_layer_is_unless_asked_otherwise():
    """Standard deviations, biases and eps. Mutations: any default of a layer."""
    rngs = nnx.Rngs(0)
    memory = layers.MemoryLayer(64, 32, code_bits=8, rngs=rngs)
    dense = layers.Dense(64, 32, rngs=rngs)
    embed, head = layers.Embed(64, 32, rngs=rngs), layers.Head(64, 32, rngs=rngs)
    for weights in (memory.tables, dense.kernel, embed.embedding, head.kernel):
        assert abs(np.std(np.asarray(weights[...])) / 0.02 - 1) < 0.1
        assert weights[...].dtype == jnp.float32
    assert memory.bias is None and not dense.bias[...].any()
    assert (memory.score, memory.temperature) == ("softmax", 1.0)
    assert memory.implementation == "auto"
    biased = layers.MemoryLayer(64, 32, code_bits=8, use_bias=True, rngs=rngs)
    assert biased.bias[...].shape == (32,) and not biased.bias[...].any()
    assert (dense.split_inputs, dense.kernel.get_metadata()["spec"]) == (
        False,
        "columns",
    )
    assert (layers.RMSNorm(4).eps, layers.LayerNorm(4).eps) == (1e-8, 1e-5)
    x, positions = jnp.asarray(normal((1, 3, 2, 16))), jnp.arange(3)[None]
    np.testing.assert_array_equal(
        rotary.rotate(x, positions), rotary.rotate(x, positions, 0.25, 10_000.0)
    )


@pytest.mark.parametrize("code_bits, small", [(8, "uint8"), (9, "uint16")])
def test_codes_are_sent_in_few_bytes(code_bits, small, monkeypatch):
    """And come back as numbers of 32 bits. Mutations: `<` for `<=`; 9 for 8."""
    sent = []

    def all_gather(x, axis, dim):
        sent.append((str(x.dtype), axis, dim))
        return x

    monkeypatch.setattr(layers.collectives, "axis_size", lambda axis: 2)
    monkeypatch.setattr(layers.collectives, "all_gather", all_gather)
    layer = layers.MemoryLayer(
        code_bits, 4, code_bits=code_bits, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    codes = jnp.array([[(1 << code_bits) - 1]])
    got, _ = layer._from_all_devices(codes, jnp.ones((1, 1)))
    assert sent == [(small, "model", -1), ("bfloat16", "model", -1)]
    assert got.dtype == jnp.int32 and (got == codes).all()
