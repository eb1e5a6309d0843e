"""PMI's encoder: equal to its equations, and at the limits of its options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle_pmi
import pytest
from flax import nnx

from memoryformer import errors
from memoryformer.model.recurrence import pmi as memories
from memoryformer.tasks import pmi

CONFIG = pmi.PMIConfig(
    embed_dim=8,
    num_layers=2,
    num_heads=2,
    key_dim=3,
    ffn_dim=12,
    num_slots=3,
    num_fragments=2,
    top_k=2,
    dtype="float64",
)
REAL = np.array([[True] * 5, [True, True, False, True, False]])
VARIANTS = {
    "outer": {},
    "sum": {"association": "sum"},
    "soft": {"top_k": 0},
    "without asking": {"ask_working": False},
    "without working memory": {"working_share": 0.0},
    "blocks of their own": {"share_parameters": False},
    "memories of their own": {"share_memory": False},
    "working memory only": {"memory": "working"},
    "universal transformer": {"memory": "none"},
}
SLOW = (
    "soft",
    "without working memory",
    "blocks of their own",
    "memories of their own",
)


class Case:
    """An encoder in float64 whose parameters are all random, and its input."""

    def __init__(self, **fields):
        self.config = dataclasses.replace(CONFIG, **fields)
        model = nnx.eval_shape(
            lambda: pmi.Encoder(self.config, rngs=nnx.Rngs(0)),
            graph=False,
            graph_updates=False,
        )
        self.graph, shapes = nnx.split(model, nnx.Param, graph=False)
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(
            lambda x: rng.normal(size=x.shape, scale=0.6), nnx.to_pure_dict(shapes)
        )
        self.x = rng.normal(size=(2, 5, 8))

    def __call__(self, params, x):
        return nnx.merge(self.graph, params)(x, jnp.asarray(REAL))

    def output(self, **changes):
        """[2, 5, 8] with parameters of the block's mixer changed."""
        params = jax.tree.map(lambda x: x, self.params)
        for block in params["blocks"].values():
            block["mixer"] |= {k: np.float64(v) for k, v in changes.items()}
        with jax.enable_x64(True):
            return np.asarray(self(params, self.x))

    def oracle(self, params=None, x=None, first=0):
        """Of all rows from `first` on."""
        params = self.params if params is None else params
        m_w = np.eye(3, 8)
        m_l = np.random.default_rng(0).random((2, 3, 8))
        x = self.x if x is None else x
        rows = zip(x[first:], REAL[first:], strict=True)
        return np.stack(
            [
                oracle_pmi.encoder(self.config, params, row, real, m_w, m_l)
                for row, real in rows
            ]
        )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in VARIANTS
    ],
)
def test_equals_the_equations(name):
    """Red if kept weights are renormalised, a gate sees the new M_w, U_wl swaps its sides, f is
    applied once, or padding is written.
    """
    case = Case(**VARIANTS[name])
    got, want = case.output(), case.oracle()
    assert np.abs(got - want)[REAL].max() < 1e-10


@pytest.mark.parametrize("name", ["outer", pytest.param("sum", marks=pytest.mark.slow)])
def test_gradient(name):
    """Of every parameter and the input, against differences of the oracle.

    Red if `keep_largest` stops the gradient of what it keeps.
    """
    case = Case(**VARIANTS[name])
    weights = np.random.default_rng(1).normal(size=case.x.shape) * REAL[..., None]
    weights[0] = 0  # the other row has padding

    def loss(params, x):
        return jnp.sum(case(params, x) * weights)

    with jax.enable_x64(True):
        grads = jax.grad(loss, argnums=(0, 1))(case.params, case.x)
    grads = jax.tree.map(np.asarray, grads)
    rng, step = np.random.default_rng(2), 1e-6
    direction = jax.tree.map(lambda g: rng.normal(size=g.shape), grads)

    def moved(by, only):
        def add(path, value, along):
            return value + by * along * (path == only)

        args = jax.tree.map_with_path(add, (case.params, case.x), direction)
        return np.sum(case.oracle(*args, first=1) * weights[1:])

    for (path, grad), along in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(direction), strict=True
    ):
        want = (moved(step, path) - moved(-step, path)) / (2 * step)
        assert abs(np.sum(grad * along) - want) < 1e-6 * (1 + abs(want)), path


def test_enough_places_for_the_largest_weights_keep_all():
    """k >= T is the plain softmax. Red if k = T drops a weight."""
    soft = Case(top_k=0).output()
    for k in (5, 9):  # of five tokens and three slots
        np.testing.assert_array_equal(Case(top_k=k).output(), soft)
    assert np.abs(Case(top_k=2).output() - soft)[REAL].max() > 1e-3


def test_only_the_largest_weights_are_kept():
    """And have a gradient. Mutations: the smallest kept; k + 1 kept; what is kept made to add
    up to 1; its gradient stopped.
    """
    weights = jnp.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.0, 0.1, 0.2]])
    kept = memories.keep_largest(weights, 2)
    want = np.array([[0, 0.4, 0, 0.3], [0.7, 0, 0, 0.2]], np.float32)
    np.testing.assert_array_equal(kept, want)
    np.testing.assert_array_equal(memories.keep_largest(weights, 4), weights)
    grads = jax.grad(lambda w: jnp.sum(w * memories.keep_largest(w, 2)))(weights)
    np.testing.assert_array_equal(grads, 2 * want)


def test_a_share_of_one_leaves_long_term_memory_dead():
    """Red if U_w is read from M_l, or M_l reaches M_w."""
    first, other = (Case(working_share=1.0, memory_seed=seed) for seed in (0, 1))
    dead = other.output()
    np.testing.assert_array_equal(first.output(), dead)
    norm3 = [block["mixer"].pop("norm3") for block in first.params["blocks"].values()]
    only = Case(memory="working")
    only.params, only.x = first.params, first.x
    np.testing.assert_array_equal(only.output(), dead)
    assert len(norm3) == 1
    alive = [Case(memory_seed=i, ask_working=False).output() for i in (0, 1)]
    assert np.abs(alive[0] - alive[1])[REAL].max() > 1e-4


def test_gates_at_their_limits_keep_working_memory():
    """b_i -> -inf, b_f -> inf: M_w stays the identity, in all layers.

    Red if the two gates are swapped, or the update goes round its gate.
    """
    case = Case(num_layers=2)
    mixer = case.params["blocks"]["00"]["mixer"]
    mixer |= {"input_bias": np.float64(-800), "forget_bias": np.float64(800)}
    model = nnx.merge(case.graph, case.params)
    with jax.enable_x64(True):
        now = pmi.first_memories(case.config, 2)
        for _ in range(2):
            now = model.blocks["00"].mixer.write(case.x, jnp.asarray(REAL), now)
    np.testing.assert_array_equal(now.working, np.broadcast_to(np.eye(3, 8), (2, 3, 8)))


def test_the_coded_association_writes_once():
    """A norm's outputs add up to 0 at first, so 'sum' writes nothing after the first layer; and
    in the first it makes fragments alike. 'outer' goes on and keeps them apart.

    Mutation: 'sum' and 'outer' swapped.
    """
    width, m = 256, jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 256)))
    first = pmi.first_memories(pmi.PMIConfig(embed_dim=width), 1).long_term

    def normed(x):
        return (x - x.mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)

    def alike(x):
        return np.corrcoef(x[0].reshape(5, -1))[np.triu_indices(5, 1)].mean()

    m, after = normed(m), {}
    for name in ("sum", "outer"):
        after[name] = normed(first + memories.associate(first, m, name))
        gain = memories.associate(after[name], m, name)
        assert (np.abs(gain).max() < 1e-2) == (name == "sum")
    assert alike(after["sum"]) > 0.999
    assert alike(after["outer"]) < 0.1


REFUSED = {
    "heads": (
        {"num_heads": 3},
        r"model.num_heads=3 does not divide model.embed_dim=64",
    ),
    "memory": ({"memory": "long"}, r"model.memory='long'"),
    "association": ({"association": "mean"}, r"model.association='mean'"),
    "share": ({"working_share": 1.5}, r"model.working_share=1.5: must be between"),
    "slots": ({"num_slots": 0}, r"model.num_slots=0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_refused(name):
    """Red if a check is left out."""
    fields, message = REFUSED[name]
    with pytest.raises(errors.ConfigError, match=message) as error:
        pmi.PMIConfig(**fields)
    assert "\n" not in str(error.value)
