"""Mamba-2 in float64, against its oracle and its peer, over a `sequence` axis and from the state.

What every mixer promises is in test_mixers.py. Mutations tried by hand are named with the test
that they turn red.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mixers as battery
import toy
from flax import nnx
from jax.sharding import PartitionSpec as P

from memoryformer import accounting, model, sharding
from memoryformer.model import mixers
from memoryformer.model import transformer as transformer_lib
from memoryformer.model.mixers import mamba2
from memoryformer.ops import window

SEGMENTS = battery.SEGMENTS


class Exact:
    """The mixer of a battery's case in float64, and its oracle."""

    def __init__(self, case):
        self.case, self.config = (
            case,
            dataclasses.replace(case.config, dtype="float64"),
        )
        rngs = nnx.Rngs(0)
        project = functools.partial(
            transformer_lib.make_projection, self.config, rngs=rngs
        )
        made = mixers.MIXERS[self.config.mixer](
            self.config, project, rngs=rngs, layer=0
        )
        self.graph = nnx.split(made)[0]
        as_float64 = functools.partial(np.asarray, dtype=np.float64)
        self.point = jax.tree.map(as_float64, (case.params, case.x))
        self.weights = battery._weights().astype(np.float64)

    def mix(self, params, x):
        seq = mixers.SeqInfo(battery.POSITIONS, SEGMENTS)
        return nnx.merge(self.graph, params)(x, seq)[0]

    def gradients(self):
        def loss(*point):
            return jnp.sum(self.mix(*point) * self.weights)

        return toy.quick_jit(jax.grad(loss, argnums=(0, 1)))(*self.point)

    def slope(self, number, direction, step=1e-30):
        """Along a direction of one leaf: the oracle at a complex step, exact to rounding."""
        leaves, treedef = jax.tree.flatten(self.point)
        leaves = [leaf.astype(np.complex128) for leaf in leaves]
        leaves[number] += 1j * step * direction
        params, x = jax.tree.unflatten(treedef, leaves)
        positions = battery.POSITIONS
        y = self.case.oracle(self.config, params, x, positions, SEGMENTS)
        return np.sum(y * self.weights).imag / step


@pytest.mark.parametrize("projection", ["memory", "dense"])
def test_in_float64(projection):
    """The equations, to 1e-10. Mutations: dt B without dt; the skip; NORM_EPS of 1e-6."""
    case = battery._case("mamba2", projection)
    with jax.enable_x64(True):
        exact = Exact(case)
        got = toy.quick_jit(exact.mix)(*exact.point)
        assert got.dtype == jnp.float64
    want = exact.case.dense(*exact.point)
    real = SEGMENTS != 0
    assert np.abs(np.asarray(got)[real] - want[real]).max() < 1e-10


def test_gradients_in_float64():
    """Of x and of every parameter, to 1e-10 of the oracle's.

    Mutations: the gradient of the decay without the state before a document, or counted from
    the token itself; `decay` in the reversed sums not moved by one.
    """
    case = battery._case("mamba2", "dense")
    with jax.enable_x64(True):
        exact = Exact(case)
        grads = [np.asarray(g) for g in jax.tree.leaves(exact.gradients())]
    rng = np.random.default_rng(5)
    for i, grad in enumerate(grads):
        direction = rng.normal(size=grad.shape)
        want = exact.slope(i, direction)
        scale = np.linalg.norm(grad) * np.linalg.norm(direction) + 1e-3
        assert abs(np.sum(grad * direction) - want) / scale < 1e-10, i


@functools.cache
def _over_devices(name, size):
    """Outputs and gradients of a case's mixer, whole rows or parts of them on devices."""
    case = battery._case(name, "dense")

    def per_device(specs):
        def run(params, x, positions, segments, weights):
            def loss(params, x):
                y, _ = case.apply(params, x, positions, segments)
                return jnp.sum(y * weights), y

            grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
            (grads, dx), y = grad(params, x)
            return (sharding.sum_gradients(grads, specs) if specs else grads), dx, y

        return run

    args = (case.params, case.x, battery.POSITIONS, SEGMENTS, battery._weights())
    if size == 1:
        return jax.tree.map(np.asarray, toy.quick_jit(per_device(None))(*args))
    shards = sharding.make(f"sequence:sequence={size}", jax.devices()[:size])
    specs = shards.param_specs(case.names, case.params)
    act, rows = P(None, "sequence", None), P(None, "sequence")
    in_specs = (specs, act, rows, rows, act)
    with shards.activate():
        mapped = shards.shard_map(per_device(specs), in_specs, (specs, act, act))
        return jax.tree.map(
            np.asarray, toy.quick_jit(mapped)(*shards.put(args, in_specs))
        )


def test_a_row_over_eight_devices():
    """Three tokens each, documents that begin and end anywhere: outputs and gradients.

    Mutations: `_combine` that keeps the left sums whole; the total of a part without its first
    token; the tail of the filter left behind.
    """
    for ours, one in zip(
        jax.tree.leaves(_over_devices("mamba2", 8)),
        jax.tree.leaves(_over_devices("mamba2", 1)),
        strict=True,
    ):
        if ours.shape[:2] == SEGMENTS.shape:
            real = SEGMENTS != 0
            ours, one = ours[real], one[real]
        np.testing.assert_allclose(ours, one, atol=2e-5 * (1 + np.abs(one).max()))


def test_how_parameters_begin():
    """As published. Mutations: another floor or range; A itself for its logarithm."""
    options = {"state_size": 8, "expand": 3, "width": 4}
    made = battery.made("mamba2", embed_dim=512, mixer_options=options)
    many = mamba2.SSD(4096, 64, rngs=nnx.Rngs(1))
    steps = np.logaddexp(np.asarray(many.dt_bias[...], np.float64), 0)
    assert 1e-3 * 0.99 < steps.min() < 1.1e-3 and 0.09 < steps.max() < 0.1 * 1.01
    assert abs(np.median(steps) / 1e-2 - 1) < 0.1
    rates = np.exp(np.asarray(many.a_log[...]))
    assert 1 <= rates.min() < 1.1 and 15.9 < rates.max() <= 16.001
    assert abs(rates.mean() - 8.5) < 0.25
    assert made.ssd.a_log[...].shape == (4,) and np.all(np.asarray(many.skip[...]) == 1)
    assert np.all(np.asarray(made.scale[...]) == 1) and made.scale[...].shape == (1536,)
    for parameter, shape in (
        (made.kernel, (4, 1536)),
        (made.bias, (1536,)),
        (made.shared_kernel, (4, 16)),
        (made.shared_bias, (16,)),
    ):
        assert parameter[...].shape == shape
        assert 0.4 < np.abs(np.asarray(parameter[...])).max() <= 0.5


def test_decoding_needs_no_cache():
    """The same arrays for any length: sums, and W - 1 rows of the filter, in float32.

    Mutations: the tail one row longer; a state of `max_len` rows.
    """
    options = {"state_size": 5, "width": 4}
    shapes = [(2, 4, 5, 8), (2,), (2, 4), (2, 3, 42), (2, 3)]
    for length in (1, 2**20):
        state = jax.eval_shape(
            lambda n=length: battery.made("mamba2", mixer_options=options).init_state(
                2, n, jnp.bfloat16
            )
        )
        assert [x.shape for x in jax.tree.leaves(state)] == shapes
        floats = {x.dtype for x in jax.tree.leaves(state)} - {jnp.dtype("int32")}
        assert floats == {jnp.dtype("float32")}


def test_its_cost():
    """By hand, and the parameters of the whole model. Mutation: `expand` left out of either."""
    options = {"state_size": 6, "width": 3}
    for projection in ("memory", "dense"):
        config = toy.model_config(projection, mixer="mamba2", mixer_options=options)
        counted = accounting.count(config, value_bytes=2)
        shapes = jax.eval_shape(lambda c=config: model.init(c))
        total = sum(x.size for x in jax.tree.leaves(shapes))
        assert counted.parameters.total == total
        # L (2 N I + W (I + 2 N)), I = 32: what decays is kept in 4 bytes.
        assert counted.block.mixing == 12 * (2 * 6 * 32 + 3 * 44)
        assert counted.decode_state_bytes == 2 * 4 * (6 * 32 + 2 * 44)
    # K (tau + F): 4 and 8 chunks of 4 bits, F = 64, 14 and 16.
    layers = accounting.projections(
        toy.model_config(mixer="mamba2", mixer_options=options)
    )
    counts = {k: v.multiply_adds for k, v in layers.items() if k.startswith("mixer")}
    assert counts == {
        "mixer.inner": 4 * (4 + 64),
        "mixer.steps": 4 * (4 + 14),
        "mixer.out": 8 * (4 + 16),
    }


@pytest.mark.parametrize("width, heads", [(24, 3), (16, 1), (8, 8), (72, 12)])
def test_any_width_that_softmax_takes(width, heads):
    """Its defaults ask nothing of the width. Mutation: heads of 64 values."""
    sizes = {"embed_dim": width, "num_heads": heads, "num_layers": 1}
    for projection in ("memory", "dense"):
        config = toy.model_config(projection, mixer="mamba2", **sizes)
        tokens = jax.ShapeDtypeStruct((1, 12), jnp.int32)
        logits = jax.eval_shape(
            lambda t, c=config: model.forward(c, model.init(c), t), tokens
        )
        assert logits.shape == (1, 12, 13)


def test_windows_of_tokens():
    """Each tap by hand: a document's last W tokens, whatever lies between.

    Mutation: padding that takes a place.
    """
    segments = jnp.array([[1, 0, 1, 2, 2, 0, 0, 2]])
    rows = jnp.arange(8.0)[None]

    def add(taps):
        return sum(
            10**i * jnp.where(inside, x, 0) for i, (x, inside) in enumerate(taps)
        )

    slide = toy.quick_jit(functools.partial(window.slide, add, width=3))
    y, tail = slide(rows, segments)
    real = np.asarray(segments)[0] != 0
    np.testing.assert_array_equal(y[0][real], [0, 200, 300, 430, 743])
    np.testing.assert_array_equal(tail.rows, [[4, 7]])
    y, tail = slide(rows[:, :2] + 8, jnp.array([[2, 3]]), tail)
    np.testing.assert_array_equal(y, [[874, 900]])
    np.testing.assert_array_equal(tail.segment_ids, [[2, 3]])


def _quick(module):
    graph, params = nnx.split(module)
    call = toy.quick_jit(lambda params, *args: nnx.merge(graph, params)(*args))
    return functools.partial(call, params)


def test_equals_mamba2_jax():
    """Another package's mixer with our weights, in one document: outputs within 1e-5.

    Part of `make test-peers`. Mutations: B and C exchanged; z and x exchanged.
    """
    peer = pytest.importorskip("mamba2_jax.modeling", reason="needs mamba2-jax")
    sizes = {"embed_dim": 32}
    options = {"state_size": 6, "width": 4, "prefix_chunk": 8}
    ours = battery.made("mamba2", mixer_options=options, **sizes)
    theirs = peer.Mamba2Mixer(
        peer.Mamba2Config(hidden_size=32, state_size=6, head_dim=16, chunk_size=16),
        0,
        rngs=nnx.Rngs(1),
    )
    rng = np.random.default_rng(0)
    for name in ("scale", "kernel", "bias", "shared_kernel", "shared_bias"):
        value = getattr(ours, name)
        noise = 0.3 * rng.normal(size=value[...].shape)
        value[...] = value[...] + noise.astype(np.float32)

    def both(name):
        pair = getattr(ours, name)[...], getattr(ours, f"shared_{name}")[...]
        return jnp.concatenate(pair, axis=-1)

    inner = ours.inner.kernel[...].reshape(32, -1)
    theirs.in_proj.kernel[...] = jnp.concatenate([inner, ours.steps.kernel[...]], 1)
    theirs.conv1d.conv.kernel[...] = both("kernel")[:, None]
    theirs.conv1d.conv.bias[...] = both("bias")
    theirs.out_proj.kernel[...] = ours.out.kernel[...]
    theirs.norm.weight[...] = ours.scale[...]
    for name, value in (("dt_bias", "dt_bias"), ("A_log", "a_log"), ("D", "skip")):
        getattr(theirs, name)[...] = getattr(ours.ssd, value)[...]
    x = jnp.asarray(rng.normal(size=(2, 45, 32)), jnp.float32)
    seq = mixers.SeqInfo.of_tokens(x[..., 0])
    got, state = _quick(ours)(x, seq, ours.init_state(2, 45))
    with jax.numpy_rank_promotion("allow"):
        want, _, sums = _quick(theirs)(x)
    assert np.abs(want).max() > 0.3
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(
        state.sums.sums, jnp.swapaxes(sums.reshape(2, 4, 16, 6), 2, 3), atol=1e-5
    )
