"""What every sequence mixer promises, with both projections: one list, `CASES`.

A new mixer is one line there and one formula in oracle_mixers.py. Mutations tried by hand
are named with the test they turn red.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle_mixers
import pytest
import toy
from flax import nnx
from jax.sharding import PartitionSpec as P

from memoryformer import errors, model, sharding
from memoryformer.model import mixers
from memoryformer.model import transformer as transformer_lib
from memoryformer.model.mixers import kernel

B, L, D, H = 4, 24, 16, 4
CASES = {  # name: (mixer, its options, other fields of the config)
    "softmax": ("softmax", {}, {}),
    "softmax_chunked": ("softmax", {}, {"sequence_chunk": 5}),
    "dape_v2": ("softmax", {"logit_transform": "dape_v2", "dape_width": 6}, {}),
    "linear": ("linear", {}, {}),
    "linear_identity": ("linear", {"feature_map": "identity"}, {}),
    "cosformer": ("cosformer", {"max_len": 32}, {}),
    "trained_kernel": ("trained_kernel", {}, {}),
    "performer": ("performer", {"num_features": 10}, {}),
    "linformer": ("linformer", {"num_slots": 5, "max_len": 28}, {}),
    "luna": ("luna", {"num_slots": 5}, {}),
    "conv_luna": ("conv_luna", {"num_slots": 5, "width": 3}, {}),
    "conv_luna_pool": ("conv_luna", {"num_slots": 5, "filter": "pool"}, {}),
    "luna_raw": ("luna", {"num_slots": 5, "temperature": "learn", "values": False}, {}),
    "mamba2": ("mamba2", {"state_size": 6, "width": 3}, {}),
    "recurformer": (
        "recurformer",
        {"recurrent_heads": (2,), "head_order": (3, 0, 1, 2), "width": 3},
        {},
    ),
}
BOTH_WAYS = {  # look ahead, have no state
    "softmax_both": ("softmax", {}, {"causal": False}),
    "linformer_both": ("linformer", {"num_slots": 5}, {"causal": False}),
    "luna_both": ("luna", {"num_slots": 5}, {"causal": False}),
    "conv_luna_both": (
        "conv_luna",
        {"num_slots": 5, "values": False, "temperature": "unit"},
        {"causal": False},
    ),
}
CAUSAL, CASES = CASES, CASES | BOTH_WAYS
VARIANTS = (
    "softmax_chunked",
    "linear_identity",
    "conv_luna_pool",
    "luna_raw",
    *BOTH_WAYS,
)


def _pairs(names, quick):
    """Each name with both projections; those that `quick(name, projection)` denies are slow."""
    pairs = [
        pytest.param(*pair, marks=[] if quick(*pair) else [pytest.mark.slow])
        for pair in itertools.product(names, ("memory", "dense"))
    ]
    return pytest.mark.parametrize(("name", "projection"), pairs)


def _is_dense(name, projection):
    return projection == "dense"


def _is_no_variant(name, projection):
    return name not in VARIANTS


# What a mixer is made of is its own affair: the equations and the gradient are tried with
# both projections, the rest of the battery with dense ones (the slow tests have both).
every_mixer = _pairs(CASES, lambda *pair: _is_dense(*pair) or _is_no_variant(*pair))
every_mixer_no_variant = _pairs(CASES, _is_no_variant)
dense_mixers = _pairs(CASES, _is_dense)
dense_causal_mixers = _pairs(CAUSAL, _is_dense)
dense_mixers_no_variant = _pairs(
    CASES, lambda *pair: _is_dense(*pair) and _is_no_variant(*pair)
)

# Rows: two documents and padding; padding first; one document; three documents.
SEGMENTS = np.array(
    [
        [1] * 9 + [2] * 11 + [0] * 4,
        [0] * 3 + [1] * 21,
        [1] * 24,
        [3] * 1 + [4] * 16 + [5] * 7,
    ],
    np.int32,
)


POSITIONS = toy.positions(SEGMENTS)


class Case:
    """One mixer with one projection: its config, parameters and compiled forms."""

    def __init__(self, name, projection):
        mixer, options, fields = CASES[name]
        if hasattr(mixers.MIXERS[mixer].Options(), "prefix_chunk"):
            options = {"prefix_chunk": 8} | options
        self.config = model.ModelConfig(
            vocab_size=8,
            embed_dim=D,
            num_layers=1,
            num_heads=H,
            seq_len=L,
            mixer=mixer,
            projection=projection,
            code_bits=4,
            rotary_fraction=0.5,
            output_projection=projection == "dense",
            mixer_std=0.25,
            projection_options=(
                {"bias_std": 0.2} if projection == "memory" else {"output_std": 0.25}
            ),
            mixer_options=options,
            **fields,
        )
        oracle = name if name in oracle_mixers.ORACLES else mixer
        self.oracle = oracle_mixers.ORACLES[oracle]
        module = self._make()
        self.graphdef, state = nnx.split(module)
        self.names = nnx.to_pure_dict(
            jax.tree.map(
                lambda v: v.get_metadata()["spec"],
                state,
                is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
            )
        )
        # Parameters that start at a constant would hide what they multiply.
        noise = np.random.default_rng(1)
        self.params = jax.tree.map(
            lambda x: x + jnp.asarray(0.1 * noise.normal(size=x.shape), x.dtype),
            nnx.to_pure_dict(state),
        )
        self.x = jnp.asarray(
            np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32
        )
        self.forward = toy.quick_jit(lambda *args: self.apply(*args)[0])
        self.step = toy.quick_jit(self.apply)

    def _make(self):
        rngs = nnx.Rngs(0)
        project = functools.partial(
            transformer_lib.make_projection, self.config, rngs=rngs
        )
        make = mixers.MIXERS[self.config.mixer]
        return make(self.config, project, rngs=rngs, layer=0)

    def apply(self, params, x, positions, segments, state=None):
        module = nnx.merge(self.graphdef, params)
        return module(x, mixers.SeqInfo(positions, segments), state)

    def run(self, x=None, segments=SEGMENTS, positions=None):
        x = self.x if x is None else x
        positions = toy.positions(segments) if positions is None else positions
        return np.asarray(self.forward(self.params, x, positions, segments))

    def init_state(self):
        module = nnx.merge(self.graphdef, self.params)
        return module.init_state(B, L, jnp.float32)

    def dense(self, params, x, segments=SEGMENTS):
        """The oracle, in float64."""
        as_float64 = functools.partial(np.asarray, dtype=np.float64)
        params, x = jax.tree.map(as_float64, params), as_float64(x)
        return self.oracle(self.config, params, x, toy.positions(segments), segments)


_case = functools.cache(Case)


@pytest.fixture
def case(name, projection):
    return _case(name, projection)


@every_mixer
def test_oracle(case):
    """Red for any term of a mixer's equation that is dropped, such as Luna's 1 / t."""
    real = SEGMENTS != 0
    got, want = case.run()[real], case.dense(case.params, case.x)[real]
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(got, want, atol=1e-5)


@dense_causal_mixers
def test_no_future(case):
    """Exactly zero. Red if performer's keys are shifted by a maximum over the chunk, if
    linformer's slots are read whole, or if conv_luna's filter is centred.
    """
    segments = np.ones_like(SEGMENTS)
    before = case.run(segments=segments)
    for cut in (1, 8, 13):
        after = case.run(case.x.at[:, cut:].multiply(-3.0), segments)
        np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
        assert np.all(np.abs(after[:, cut] - before[:, cut]).max(axis=-1) > 1e-3)


@dense_causal_mixers
@pytest.mark.parametrize("sizes", [(7, 1, 7, 7, 1, 1), (1,) * L])
def test_chunks_of_a_sequence_continue_each_other(case, sizes):
    """Red if a state loses its document, its shift, its tail, or padding takes a place."""
    whole, state, parts = case.run(), case.init_state(), []
    shapes = jax.tree.map(jnp.shape, state)
    for i, j in itertools.pairwise(np.cumsum([0, *sizes])):
        args = (case.x[:, i:j], POSITIONS[:, i:j], SEGMENTS[:, i:j])
        y, state = case.step(case.params, *args, state)
        assert jax.tree.map(jnp.shape, state) == shapes
        parts.append(y)
    real = SEGMENTS != 0
    np.testing.assert_allclose(np.concatenate(parts, 1)[real], whole[real], atol=1e-4)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_future_is_seen(name):
    """Red if `causal` does not reach the mixer."""
    case, segments = _case(name, "dense"), np.ones_like(SEGMENTS)
    before = case.run(segments=segments)
    after = case.run(case.x.at[:, -1].multiply(-3.0), segments)
    assert np.all(np.abs(after - before)[:, 0].max(axis=-1) > 1e-3)
    with pytest.raises(errors.ConfigError, match="cannot decode"):
        case.apply(case.params, case.x, POSITIONS, SEGMENTS, case.init_state())


@dense_mixers
def test_packed_documents_are_separate(case):
    """Red if the mask, or a window of a filter, crosses a document's first token."""
    packed = case.run()
    for row, document in ((0, 2), (3, 4), (3, 5)):
        places = np.flatnonzero(SEGMENTS[row] == document)
        alone = np.zeros_like(SEGMENTS)
        alone[0, : len(places)] = 1
        x = jnp.zeros_like(case.x).at[0, : len(places)].set(case.x[row, places])
        separate = case.run(x, alone)[0, : len(places)]
        np.testing.assert_allclose(packed[row, places], separate, atol=1e-5)


@dense_mixers_no_variant
def test_padding_is_irrelevant(case):
    """Its content, in outputs and gradients. Red if performer exponentiates padding: the
    features of large keys are so small that those of padding overflow beside them.
    """
    real = jnp.asarray(SEGMENTS != 0)[..., None]
    quiet, loud = (jnp.where(real, 30 * case.x, value) for value in (0.0, 100.0))
    outputs = [np.where(real, case.run(x), 0) for x in (quiet, loud)]
    np.testing.assert_array_equal(*outputs)
    grads = [jax.tree.leaves(_gradients(case)(x)) for x in (quiet, loud)]
    for got, want in zip(*grads, strict=True):
        assert np.all(np.isfinite(got))
        np.testing.assert_array_equal(got, want)


@dense_mixers
def test_padding_takes_no_place(case):
    """Inside a document, as between a padded prompt and what follows it.

    Red if `fill_padding` is left out, or if a filter's window counts padding.
    """
    plain = np.zeros_like(SEGMENTS)
    plain[:, :18] = 1
    places = np.array([0, 1, 3, *range(8, 21), 22, 23])
    spread = np.zeros_like(SEGMENTS)
    spread[:, places] = 1
    x = jnp.zeros_like(case.x).at[:, places].set(case.x[:, :18])
    positions = np.maximum(np.cumsum(spread, axis=1, dtype=np.int32) - 1, 0)
    got = case.run(x, spread, positions)[:, places]
    np.testing.assert_allclose(got, case.run(segments=plain)[:, :18], atol=1e-5)


@functools.cache
def _gradients(case):
    """x -> d/d(params, x) of a weighted sum of the real outputs."""
    weights = _weights()

    def loss(params, x):
        return jnp.sum(case.apply(params, x, POSITIONS, SEGMENTS)[0] * weights)

    grad = toy.quick_jit(jax.grad(loss, argnums=(0, 1)))
    return lambda x: grad(case.params, x)


def _weights():
    weights = np.random.default_rng(2).normal(size=(B, L, D))
    return np.where((SEGMENTS != 0)[..., None], weights, 0).astype(np.float32)


@every_mixer_no_variant
def test_gradient(case):
    """Of every parameter and of x, along a random direction, against differences of the
    float64 oracle. Red if `ops.prefix` drops a term of its backward rule, or if the
    gradient of a running maximum is kept on one side only.
    """
    got = _gradients(case)(case.x)
    as_float64 = functools.partial(np.asarray, dtype=np.float64)
    point = jax.tree.map(as_float64, (case.params, case.x))
    leaves, treedef = jax.tree.flatten(point)
    rng, step = np.random.default_rng(3), 1e-6

    def loss(leaves):
        params, x = jax.tree.unflatten(treedef, leaves)
        return np.sum(case.dense(params, x) * _weights())

    for i, grad in enumerate(jax.tree.leaves(got)):
        direction = rng.normal(size=leaves[i].shape)
        ends = [
            loss([*leaves[:i], leaves[i] + side * direction, *leaves[i + 1 :]])
            for side in (step, -step)
        ]
        want = (ends[0] - ends[1]) / (2 * step)
        scale = np.sqrt(np.sum(as_float64(grad) ** 2)) + 1e-3
        assert abs(np.sum(grad * direction) - want) / scale < 1e-3, i


@dense_mixers_no_variant
def test_eight_devices(case):
    """Outputs and gradients on a 4 x 2 mesh (rows x heads) are those of one device.

    Red if a mixer's own parameter is split along another axis than its heads.
    """
    shards = sharding.make("tensor:model=2")
    specs = shards.param_specs(case.names, case.params)
    act, rows = P("data", None, "model"), P("data", None)

    def per_device(params, x, positions, segments, weights):
        def loss(params):
            y, _ = case.apply(params, x, positions, segments)
            return jnp.sum(y * weights), y

        grads, y = jax.grad(loss, has_aux=True)(params)
        return sharding.sum_gradients(grads, specs), y

    in_specs = (specs, act, rows, rows, act)
    args = (case.params, case.x, POSITIONS, SEGMENTS, _weights())
    with shards.activate():
        function = toy.quick_jit(shards.shard_map(per_device, in_specs, (specs, act)))
        grads, y = function(*shards.put(args, in_specs))
    np.testing.assert_allclose(y, case.run(), atol=1e-5)
    want = _gradients(case)(case.x)[0]
    for got, one in zip(*map(jax.tree.leaves, (grads, want)), strict=True):
        np.testing.assert_allclose(got, one, atol=1e-4 * (1 + np.abs(one).max()))


@dense_causal_mixers
def test_a_state_is_the_devices_share_of_the_heads(case):
    """Red if `init_state` has another size than what one step returns, over `model`."""
    shards = sharding.make("tensor:model=2")
    specs = shards.param_specs(case.names, case.params)
    act, rows = P("data", None, "model"), P("data", None)
    sizes = []

    def per_device(params, x, positions, segments):
        module = nnx.merge(case.graphdef, params)
        state = module.init_state(len(x), L, jnp.float32)
        y, after = module(x, mixers.SeqInfo(positions, segments), state)
        sizes.extend(jax.tree.map(jnp.shape, (state, after)))
        return y

    in_specs = (specs, act, rows, rows)
    args = (case.params, case.x, POSITIONS, SEGMENTS)
    with shards.activate():
        function = shards.shard_map(per_device, in_specs, act)
        y = jax.eval_shape(function, *shards.put(args, in_specs))
    assert y.shape == case.x.shape and sizes[0] == sizes[1]


def made(name, **fields):
    """A mixer of a dense model of H heads of width 4."""
    config = toy.model_config("dense", mixer=name, num_heads=4, **fields)
    rngs = nnx.Rngs(0)
    project = functools.partial(transformer_lib.make_projection, config, rngs=rngs)
    return mixers.MIXERS[name](config, project, rngs=rngs, layer=0)


def test_how_large_parameters_begin():
    """Each as its paper or its code has it.

    Mutations: a factor more or less in the fan of DAPE's kernels, in Linformer's Glorot or
    in the kernel network's rank; the width of conv_luna's filter.
    """

    def largest(parameter):
        return np.abs(np.asarray(parameter[...])).max()

    dape = made(
        "softmax", mixer_options={"logit_transform": "dape_v2", "dape_width": 32}
    ).transform
    for parameter, fan_in in (
        (dape.first, 3 * 2 * 4),
        (dape.first_bias, 3 * 2 * 4),
        (dape.second, 3 * 32),
    ):
        assert 0.8 < largest(parameter) * fan_in**0.5 <= 1
    linformer = made("linformer", mixer_options={"num_slots": 40, "max_len": 60})
    for parameter in (linformer.write_keys, linformer.write_values):
        assert parameter[...].shape == (60, 40)
        assert abs(np.std(np.asarray(parameter[...])) * 10 - 1) < 0.1
    luna = made("luna", mixer_options={"num_slots": 40})
    assert abs(np.std(np.asarray(luna.memory[...])) - 1) < 0.1
    conv = made("conv_luna", mixer_options={"width": 4})
    assert conv.kernel[...].shape == (4, 4) and 0.6 < largest(conv.kernel) * 2 <= 1
    assert conv.log_tau[...] == conv.log_tau_pack[...] == 0
    network = made("trained_kernel", embed_dim=64, mixer_options={"depth": 2})
    assert network.a[...].shape == (2, 16, 4, 4)  # [depth, E, E / 4, H]
    assert network.b[...].shape == (2, 4, 16, 4)
    assert abs(np.std(np.asarray(network.a[...])) * 16**0.5 - 1) < 0.15
    assert abs(np.std(np.asarray(network.b[...])) * 4**0.5 - 1) < 0.15


def test_how_large_states_are():
    """Sums of fixed size; a cache of whole blocks of 32 keys.

    Mutations: a width more or less; a block of another size.
    """
    for name, options, shapes in (
        ("softmax", {}, [(2, 4, 64, 4), (2, 4, 64, 4), (2, 64), ()]),
        ("linear", {}, [(2, 4, 4, 5), (2,), (2, 4)]),
        ("cosformer", {"max_len": 99}, [(2, 4, 8, 5), (2,), (2, 4)]),
        ("performer", {"num_features": 6}, [(2, 4, 6, 5), (2,), (2, 4)]),
        (
            "linformer",
            {"num_slots": 5, "max_len": 99},
            [(2, 4, 4, 5), (2,), (2, 4), (2, 4, 5, 4), (2,), (2, 4)],
        ),
        (
            "luna",
            {"num_slots": 5},
            [(2, 4, 4, 5), (2,), (2, 4), (2, 0, 2, 16), (2, 0)],
        ),
        (
            "conv_luna",
            {"num_slots": 5, "width": 4},
            [(2, 4, 4, 5), (2,), (2, 4), (2, 3, 2, 16), (2, 3)],
        ),
    ):
        state = jax.eval_shape(
            lambda n=name, o=options: made(n, mixer_options=o).init_state(
                2, 33, jnp.bfloat16
            )
        )
        assert [x.shape for x in jax.tree.leaves(state)] == shapes, name
        floats = {x.dtype for x in jax.tree.leaves(state)} - {jnp.dtype("int32")}
        assert floats == {jnp.dtype("bfloat16" if name == "softmax" else "float32")}
    for name in ("cosformer", "linformer"):  # rows of 12 positions
        jax.eval_shape(lambda n=name: made(n).init_state(1, 12))
        with pytest.raises(errors.ConfigError, match=r"\.max_len=12.* 13 tokens"):
            jax.eval_shape(lambda n=name: made(n).init_state(1, 13))
    whole = jax.eval_shape(lambda: made("softmax").init_state(1, 32))
    assert whole.keys.shape[2] == 32 and whole.keys.dtype == jnp.float32


def test_a_row_over_several_devices_does_not_decode():
    """Mutation: the check left out, and a state that nobody reads."""
    with pytest.raises(errors.ConfigError, match="axis trains; decode without one"):
        made("softmax")._around(None, None, None, None, "a state")


def test_denominators_that_are_next_to_nothing():
    """Mutations: `<=` for `<`; another floor."""
    small = jnp.array([0.0, 1e-31, 1e-30, 2.0])
    guarded = [
        np.asarray(made(name).guard(small)) for name in ("trained_kernel", "linear")
    ]
    np.testing.assert_array_equal(guarded[0], np.float32([1, 1, 1e-30, 2]))
    np.testing.assert_allclose(guarded[1], np.asarray(small) + 1e-6, rtol=1e-6)
    cos = made("cosformer").guard(small)
    np.testing.assert_array_equal(cos, np.float32([1e-6, 1e-6, 1e-6, 2]))


def test_which_features_are_in_use():
    """Each draw for so many steps of a run.

    Mutations: a sign of the count; a step too early; the draw of another seed.
    """
    config = toy.model_config(
        mixer="performer", mixer_options={"num_features": 3, "redraw_every": 2}
    )
    _, fixed = model.split_trained(config, model.init(config, 5))

    def rows(params):
        return np.asarray(params["blocks"]["1"]["mixer"]["random_rows"])

    draws = [rows(kernel.random_rows(config, 5, number)) for number in range(4)]
    np.testing.assert_array_equal(rows(fixed), draws[0])
    redraw = jax.jit(lambda fixed, step: mixers.redraw(config, fixed, 5, step))
    used = []
    for step in range(7):
        fixed = redraw(fixed, jnp.int32(step))
        used += [i for i in range(4) if np.array_equal(rows(fixed), draws[i])]
    assert used == [0, 0, 1, 1, 2, 2, 3]
    assert not np.array_equal(rows(kernel.random_rows(config, 6, 0)), draws[0])
    kept = toy.model_config(mixer="performer", mixer_options={"num_features": 3})
    assert mixers.redraw(kept, fixed, 5, jnp.int32(4)) is fixed
    assert mixers.redraw(toy.model_config(), fixed, 5, jnp.int32(4)) is fixed


def test_how_many_positions_a_mixer_has():
    """Mutations: any default; another mixer that takes tokens in any order."""
    lengths = {"cosformer": 12, "linformer": 12, "softmax": 0, "luna": 0, "linear": 0}
    for name, length in lengths.items():
        assert mixers.max_length(toy.model_config(mixer=name)) == length
        assert mixers.takes_any_order(toy.model_config(mixer=name)) == (
            name == "softmax"
        )


def test_short_names_keep_their_sizes():
    """A sweep's point is named by them: another size is another name."""
    sizes = {
        name: made["mixer_options"]
        for name, made in mixers.settings().items()
        if made["mixer_options"]
    }
    slots = {key: {"num_slots": 64} for key in ("linformer", "luna", "conv_luna")}
    assert sizes == slots | {
        "linformer_matched": {"num_slots": 40},
        "performer": {"num_features": 256, "redraw_every": 1000},
        "performer_matched": {"num_features": 112, "redraw_every": 1000},
        "dape_v2": {"logit_transform": "dape_v2"},
    }
