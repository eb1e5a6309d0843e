"""What mixers say of themselves: costs by hand, which parameters decay, which heads are whose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memoryformer import errors, model
from memoryformer.model import mixers
from memoryformer.model.mixers import base, kernel, recurformer

D, H, E = 32, 4, 8
OPTIONS = {
    "softmax": {"logit_transform": "dape_v2", "dape_width": 6},
    "performer": {"num_features": 5, "redraw_every": 2**31 - 1},
    "cosformer": {"max_len": 40},
    "linformer": {"num_slots": 5},
    "luna": {"num_slots": 5, "temperature": "learn"},
    "conv_luna": {"num_slots": 5, "width": 3, "temperature": "unit"},
    "mamba2": {"state_size": 6, "expand": 3, "width": 3},
    "recurformer": {"recurrent_heads": (3,), "width": 3},
}


def config(name, options=None, **fields):
    sizes = {"vocab_size": 8, "embed_dim": D, "num_heads": H, "seq_len": 24}
    sizes |= {"num_layers": 2, "code_bits": 4, "mixer": name} | fields
    return model.ModelConfig(
        **sizes, mixer_options=OPTIONS.get(name, {}) if options is None else options
    )


def of_softmax(length):
    """DAPE: [(S; A)] of 2 H channels, 6 hidden ones, three keys; whole blocks of 32 keys."""
    of_pair = 3 * (2 * H * 6 + 6 * H)
    blocks = (length + 31) // 32 * 32
    return length**2 * (2 * D + of_pair), 2 * blocks * D, of_pair + 6


def of_mamba2(length):
    """I = 96 values inside, N = 6, a filter of three tokens over I + 2 N channels."""
    inner, channels = 96, 96 + 12
    kept = 6 * inner + 2 * channels
    parameters = (3 + 1) * channels + 3 * H + inner
    return length * (2 * 6 * inner + 3 * channels), kept, parameters


def of_recurformer(length):
    """Three heads of a recurrence and one of softmax."""
    blocks = (length + 31) // 32 * 32
    products = length * (2 * length * E + 3 * (2 * E * E + 3 * 3 * E))
    parameters = 3 * (3 * (3 + 1) * E + 3 + 2 * E)
    return products, 2 * blocks * E, parameters


COSTS = {  # of so many tokens: multiply-adds, values of the state, parameters
    "softmax": of_softmax,
    "linear": lambda n: (n * 2 * E * D, D * (E + 1), 0),
    "trained_kernel": lambda n: (
        n * (2 * E * D + 2 * 3 * H * (E * E + 2 * E * 2)),
        D * (E + 1),
        3 * H * (E * E + 2 * E * 2),
    ),
    "performer": lambda n: (n * 4 * 5 * D, H * (5 * (E + 1) + 1), 0),
    "cosformer": lambda n: (n * 4 * E * D, 2 * D * (E + 1), 0),
    "linformer": lambda n: (n * 4 * 5 * D, 2 * 5 * D, 2 * 5 * 24),
    "luna": lambda n: (n * 4 * 5 * D, 5 * D, 5 * D + 2),
    "conv_luna": lambda n: (
        n * (4 * 5 * D + 2 * 3 * D),
        5 * D + 2 * 2 * D,
        5 * D + 3 * H,
    ),
    "mamba2": of_mamba2,
    "recurformer": of_recurformer,
}


@pytest.mark.parametrize("name", mixers.MIXERS)
def test_costs_by_hand(name):
    """Of 24, 32 and 33 tokens, and in how many bytes the state is kept.

    Mutations: any factor; sums counted in two bytes, or a cache in four.
    """
    for length in (24, 32, 33):
        cost = mixers.cost(config(name), length)
        products, values, parameters = COSTS[name](length)
        assert cost.multiply_adds == products
        assert cost.state_values == values
        assert (cost.parameters, cost.shared_parameters) == (parameters, 0)
        sums = 3 * (E * E + 3 * 2 * E) if name == "recurformer" else 0
        stored = 2 if name in ("softmax", "recurformer") else 4
        assert cost.state_bytes(2) == stored * values + 4 * sums


def test_redraws_are_counted_in_int32():
    """As every number of a config. Mutation: 2**32 in config/sections.py."""
    with pytest.raises(
        errors.ConfigError, match="redraw_every=2147483648: must be below"
    ):
        config("performer", {"num_features": 5, "redraw_every": 2**31})


def test_costs_of_other_forms():
    """A shared memory, a pool, layers that differ, small heads, plain defaults.

    Mutations: the parameters of a stream counted in every layer; a rank of 0.
    """
    looks_ahead = {"causal": False}
    stream = config("luna", {"num_slots": 5, "stream": True}, **looks_ahead)
    cost = mixers.cost(stream, 24)
    assert (cost.parameters, cost.shared_parameters) == (0, 5 * D)
    pool = mixers.cost(config("conv_luna", {"num_slots": 5, "filter": "pool"}), 24)
    assert (pool.multiply_adds, pool.parameters) == (24 * 4 * 5 * D, 5 * D + 2)
    small = mixers.cost(config("trained_kernel", {"depth": 1}, num_heads=16), 24)
    assert small.parameters == 16 * (2 * 2 + 2 * 2 * 1)
    mixed = config("recurformer", {"recurrent_heads": (1, 4), "width": 3})
    per_head = 2 * E * E + 3 * 3 * E
    products = 24 * (3 * 2 * 24 * E + 5 * per_head) // 2
    assert mixers.cost(mixed, 24).multiply_adds == products
    assert mixers.cost(mixed, 24).state_values == 2 * 32 * 3 * E // 2
    assert mixers.cost(mixed, 24).sums == 5 * (E * E + 3 * 2 * E) // 2
    bare = base.Cost(7, 3)
    assert bare.state_bytes(2) == 6 and (bare.parameters, bare.sums) == (0, 0)
    assert (bare.shared_parameters, bare.state_value_bytes) == (0, 0)
    plain = kernel.feature_cost(config("linear"), 10, 3)
    assert (plain.multiply_adds, plain.parameters) == (10 * 2 * 3 * D, 0)
    assert plain.state_values == H * 3 * (E + 1) and plain.state_value_bytes == 4


DECAYED = {
    "softmax": {"transform.first", "transform.second"},
    "trained_kernel": {"w", "a", "b"},
    "linformer": {"write_keys", "write_values"},
    "luna": {"memory"},
    "conv_luna": {"memory", "kernel"},
    "mamba2": {"kernel", "shared_kernel"},
    "recurformer": {"recurrent.kernel"},
}


@pytest.mark.parametrize("name", mixers.MIXERS)
def test_matrices_decay(name):
    """And filters; no bias, scale, temperature or rate does, and random features never train.

    Mutation: any `decay` or `trained` of a mixer.
    """

    def make():
        return mixers.MIXERS[name](
            config(name), lambda *a, **k: None, rngs=nnx.Rngs(0), layer=0
        )

    leaves = jax.tree.leaves_with_path(
        nnx.state(nnx.eval_shape(make)), is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    said = {
        jax.tree_util.keystr(path, simple=True, separator="."): v.get_metadata()
        for path, v in leaves
    }
    decayed = {path for path, facts in said.items() if facts.get("decay")}
    assert decayed == DECAYED.get(name, set())
    fixed = {path for path, facts in said.items() if not facts.get("trained", True)}
    assert fixed == ({"random_rows"} if name == "performer" else set())


def test_what_each_can_do():
    """Mutations: any class attribute or its default."""
    able = {
        what: {name for name, cls in mixers.MIXERS.items() if getattr(cls, what)}
        for what in ("LOOKS_AHEAD", "TAKES_ANY_ORDER", "HAS_SLOTS", "HAS_TOKEN_ROWS")
    }
    assert able["LOOKS_AHEAD"] == {"softmax", "linformer", "luna", "conv_luna"}
    assert able["TAKES_ANY_ORDER"] == {"softmax"}
    assert able["HAS_SLOTS"] == {"luna", "conv_luna"}
    kernels = {"linear", "trained_kernel", "performer", "cosformer"}
    assert able["HAS_TOKEN_ROWS"] == {"softmax", "linformer", *kernels}
    assert not (
        base.SequenceMixer.LOOKS_AHEAD
        or base.SequenceMixer.TAKES_ANY_ORDER
        or base.SequenceMixer.HAS_SLOTS
        or base.SequenceMixer.HAS_TOKEN_ROWS
    )
    for name, cls in mixers.MIXERS.items():
        plain = config(name, {})
        assert cls.streams(plain) is False
        assert cls.num_projections(plain) == 3
        assert mixers.of_layer(plain, 1).mixer == name
        limit = 24 if name in ("cosformer", "linformer") else 0
        assert mixers.max_length(plain) == limit
    for name in ("cosformer", "linformer"):
        assert mixers.max_length(config(name, {"max_len": 40})) == 40
        config(name, {"max_len": 24})
        with pytest.raises(errors.ConfigError, match=r"max_len=23.* 24 tokens"):
            config(name, {"max_len": 23})
    bare = config("luna", {"values": False})
    assert mixers.projections(bare) == {"qkv": (D, 2 * D)}


def test_which_heads_are_recurrent():
    """Half of them, one number for all layers, or one a layer; and where each stands.

    Mutations: any index; a count above the heads let through; the order of another layer.
    """
    half = config("recurformer", {})
    assert [recurformer.recurrent_heads(half, i) for i in (0, 1)] == [2, 2]
    assert recurformer.head_order(half, 1) == (0, 1, 2, 3)
    order = (3, 0, 1, 2, 1, 3, 2, 0)
    mixed = config("recurformer", {"recurrent_heads": (0, 4), "head_order": order})
    assert [recurformer.recurrent_heads(mixed, i) for i in (0, 1)] == [0, 4]
    assert [recurformer.head_order(mixed, i) for i in (0, 1)] == [order[:4], order[4:]]
    assert recurformer._inverse((0, 1, 2)) is None
    assert recurformer._inverse((2, 0, 3, 1)) == (1, 3, 0, 2)
    alone = mixers.of_layer(mixed, 1).mixer_options
    assert (alone.recurrent_heads, alone.head_order) == ((4,), ())
    assert mixers.projections(mixers.of_layer(mixed, 0)) == {"qkv": (D, 3 * D)}
    assert mixers.projections(mixers.of_layer(mixed, 1)) == {
        "recurrent.inputs": (D, 4 * (4 * E + 1))
    }
    one = config("recurformer", {"recurrent_heads": (1,)}, output_projection=True)
    assert mixers.projections(one) == {
        "qkv": (D, 3 * 3 * E),
        "recurrent.inputs": (D, 4 * E + 1),
        "out": (D, D),
    }
    for options, message in (
        ({"recurrent_heads": (5,)}, "must be one number or 2, one a layer"),
        ({"recurrent_heads": (0, 5)}, "none above model.num_heads=4"),
        ({"recurrent_heads": (1, 1, 1)}, "must be one number or 2"),
        ({"recurrent_heads": (-1,)}, "whole numbers of at least 0"),
        ({"recurrent_heads": (True,)}, "whole numbers of at least 0"),
        ({"head_order": (0, 1, 2, 3)}, "once in each of 2 layers"),
        ({"head_order": (*order[:7], 1)}, "places 0 to 3 once in each of 2"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            config("recurformer", options)
    for options in ({"recurrent_heads": (0, 4)}, {"head_order": order}):
        with pytest.raises(errors.ConfigError, match="layers that differ"):
            config("recurformer", options, scan_layers=True)
    config("recurformer", {"recurrent_heads": (3, 3)}, scan_layers=True)


def test_how_many_devices_a_row_is_split_over():
    """One needs no check; the lengths that are named are the nearest that divide.

    Mutations: a sum for the product; any refusal left out; 1 for 0 in what is below.
    """
    mixers.check_sequence(config("softmax", {}, seq_len=25), 1)
    mixers.check_sequence(config("softmax", {}), 8)
    for length, devices, named in ((25, 8, "24 or 32"), (7, 8, "8 or 8")):
        with pytest.raises(errors.ConfigError, match=f"try {named}"):
            mixers.check_sequence(config("softmax", {}, seq_len=length), devices)
    for name, fields, message in (
        ("softmax", {}, "ring attention needs attention='xla'"),
        ("linformer", {"causal": False}, "cannot run over a 'sequence' axis"),
        ("linear", {"recurrence": "rmt"}, "cannot run over a 'sequence' axis"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            mixers.check_sequence(config(name, **fields), 8)
    fused = {"attention": "splash"}
    with pytest.raises(errors.ConfigError, match=r"attention='splash' cannot run over"):
        mixers.check_sequence(config("recurformer", fused), 8)
    mixers.check_sequence(config("recurformer", {}), 8)
    mixers.check_sequence(config("softmax", {}, causal=False), 8)


def test_parts_of_a_row_one_after_another():
    """The last shorter than the others, or all in one; the same values and shapes.

    Mutations: `<=` for `<`; padding kept; rows and positions exchanged.
    """
    x = jnp.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    seen = []

    def double(x, y):
        seen.append(x.shape)
        return x + y[..., None], y

    for chunk, size in ((0, 7), (7, 7), (8, 7), (3, 3), (1, 1)):
        seen.clear()
        total, second = base.by_chunks(double, (x, x[..., 0]), chunk)
        np.testing.assert_array_equal(total, x + x[..., :1])
        np.testing.assert_array_equal(second, x[..., 0])
        assert {shape[1] for shape in seen} == {size}


def test_features_that_came_with_the_parameters_are_kept():
    """Until a redraw is due, whatever the seed of the run. Mutation: `>=` for `>`."""
    options = {"num_features": 3, "redraw_every": 2}
    made = config("performer", options)
    _, fixed = model.split_trained(made, model.init(made, 5))
    same = [mixers.redraw(made, fixed, 6, jnp.int32(step)) for step in (0, 1)]
    for after in same:
        jax.tree.map(np.testing.assert_array_equal, after, fixed)
    drawn = mixers.redraw(made, fixed, 6, jnp.int32(2))
    jax.tree.map(np.testing.assert_array_equal, drawn, kernel.random_rows(made, 6, 1))
