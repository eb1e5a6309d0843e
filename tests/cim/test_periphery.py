"""Converters around layers: their levels, and that none of them is the model itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle_cells
import pytest
import toy
from flax import nnx

from memoryformer import errors, model
from memoryformer.cim import periphery
from memoryformer.cim.periphery import Periphery
from memoryformer.model import layers


@pytest.mark.parametrize("levels", periphery.LEVELS)
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_levels(bits, levels):
    """Each value goes to the nearest of all levels, and beyond the bound to the last. Mutations:
    `2**bits` steps for 'mid_tread'; no clip; `ceil` for `floor`."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 50)) * 1.3
    ours = periphery.quantise(
        jnp.asarray(x, jnp.float32), bits, jnp.float32(1.7), levels
    )
    theirs = oracle_cells.quantise(x, bits, 1.7, levels)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    if levels == "mid_rise":
        np.testing.assert_array_equal(np.sign(ours), np.sign(x))
    zeros = periphery.quantise(jnp.zeros(3), bits, jnp.zeros(()), "mid_tread")
    np.testing.assert_array_equal(zeros, np.zeros(3))


def layer_of(kind, score="softmax"):
    """A layer [16 -> (3, 8)] with a bias."""
    rngs = nnx.Rngs(0)
    if kind == "dense":
        layer = layers.Dense(16, (3, 8), kernel_std=0.5, rngs=rngs)
        layer.bias = nnx.Param(jnp.linspace(-1, 1, 24).reshape(3, 8))
        return layer
    mix = "orthogonal" if kind == "rotated" else "none"
    return layers.MemoryLayer(
        *(16, (3, 8)), code_bits=4, score=score, use_bias=True, table_std=0.5, mix=mix,
        bias_std=0.5, implementation="reference", rngs=rngs,
    )  # fmt: skip


class Holder(nnx.Module):
    def __init__(self, layer):
        self.layer = layer


@pytest.mark.parametrize("kind", ["dense", "memory", "rotated"])
def test_a_layer_between_converters_is_the_equation(kind):
    """Inputs over their own largest, outputs without the bias over theirs or a bound in units
    of one full cell. Mutations: the bias converted too; w_max of all columns; one bound for
    all vectors of a batch; scores of x where a rotation of it is hashed."""
    x = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
    for settings in (
        Periphery(4, 5),
        Periphery(4, 5, levels="mid_rise"),
        Periphery(6, 6, output_bound=2.0),
    ):
        layer = layer_of(kind)
        bias = np.asarray(layer.bias[...], float)
        bound = np.abs(x).max(-1, keepdims=True)
        rounded = oracle_cells.quantise(x, settings.input_bits, bound, settings.levels)
        plain = np.asarray(layer(jnp.asarray(rounded, jnp.float32)), float) - bias
        if kind == "dense":
            unit = np.abs(np.asarray(layer.kernel[...])).max(0)
            largest = np.abs(rounded).max(-1)
        else:
            unit = np.abs(np.asarray(layer.tables[...])).max((0, 1))
            z = rounded if kind == "memory" else np.asarray(layer.hashed(rounded))
            z = np.abs(z.reshape(5, 4, 4))
            largest = (1 / (1 + np.exp(-2 * z))).prod(-1).max(-1)
        top = np.abs(plain).max((1, 2), keepdims=True) * np.ones_like(plain)
        if settings.output_bound:
            top = settings.output_bound * largest[:, None, None] * unit
        bits, levels = settings.output_bits, settings.levels
        expected = oracle_cells.quantise(plain, bits, top, levels) + bias
        periphery.attach(Holder(layer), settings)
        ours = np.asarray(layer(jnp.asarray(x)))
        # A value at the border of two levels may fall to either.
        same = np.isclose(ours, expected, atol=1e-5)
        assert same.mean() > 0.98, settings


@pytest.mark.parametrize("kind", ["dense", "memory"])
def test_output_noise(kind):
    """Its deviation is `output_noise` times u, anew for each call, seed and input. Mutations:
    the key not folded with the input; sigma without w_max."""
    layer = layer_of(kind)
    x = np.random.default_rng(1).standard_normal((2000, 16)).astype(np.float32)
    clean = np.asarray(layer(jnp.asarray(x)))
    if kind == "dense":
        unit = np.abs(np.asarray(layer.kernel[...])).max(0)
        largest = np.abs(x).max(-1)
    else:
        unit = np.abs(np.asarray(layer.tables[...])).max((0, 1))
        z = np.abs(x.reshape(-1, 4, 4))
        largest = (1 / (1 + np.exp(-2 * z))).prod(-1).max(-1)
    periphery.attach(Holder(layer), Periphery(output_noise=0.3), seed=1)
    first, again = layer(jnp.asarray(x)), layer(jnp.asarray(x))
    np.testing.assert_array_equal(first, again)
    noise = (np.asarray(first) - clean) / (largest[:, None, None] * unit)
    assert noise.std() == pytest.approx(0.3, rel=0.02)
    assert abs(noise.mean()) < 0.01
    other = np.asarray(layer(jnp.asarray(x[::-1].copy())))[::-1] - clean
    assert np.corrcoef(other.ravel(), (np.asarray(first) - clean).ravel())[0, 1] < 0.6
    layer_two = layer_of(kind)
    periphery.attach(Holder(layer_two), Periphery(output_noise=0.3), seed=2)
    assert np.any(np.asarray(layer_two(jnp.asarray(x))) != np.asarray(first))


def test_no_converters_are_the_model_itself():
    """To the bit, and no layer is another one then; with them every one is. Mutation: `attach`
    without its first return."""
    config = toy.model_config("memory")
    params = toy.numpy_params(config)
    merged = model.merge(config, params)
    kinds = [type(m) for _, m in nnx.iter_modules(merged, graph=False)]
    periphery.attach(merged, Periphery())
    assert kinds == [type(m) for _, m in nnx.iter_modules(merged, graph=False)]
    periphery.attach(merged, periphery.AIHWKIT)
    converted = {type(m) for _, m in nnx.iter_modules(merged, graph=False)}
    assert not converted & {layers.MemoryLayer, layers.Head}
    for fields in ({"input_bits": 1}, {"output_noise": -1.0}, {"levels": "x"}):
        with pytest.raises(errors.ConfigError):
            dataclasses.replace(Periphery(), **fields)
    assert jax.tree.leaves(params)  # what was merged is as it was
