"""The optimizer: AdamW as in its equations, groups, schedules, one compilation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from memoryformer import model
from memoryformer.errors import ConfigError
from memoryformer.model import mixers
from memoryformer.training import optimizer
from memoryformer.training.optimizer import OptimizerConfig

PARAMS = {
    "embed": {"embedding": (5, 4)},
    "mixer": {"tables": (2, 4, 3), "bias": (2, 3), "kernel": (4, 2)},
    "norm": {"scale": (4,)},
}


GROUPS = {
    "embed": {"embedding": "decayed"},
    "mixer": {"tables": "tables", "bias": "undecayed", "kernel": "decayed"},
    "norm": {"scale": "undecayed"},
}


PARAMETERS = [  # configs that have every parameter there is
    {"projection": "memory", "score": "learned", "norm": "layernorm"},
    {"projection": "dense", "recurrence": "memformer"},
    {"projection": "dense", "recurrence": "rmt"}
    | {"mixer_options": {"logit_transform": "dape_v2"}},
    *({"projection": "dense", "mixer": mixer} for mixer in mixers.MIXERS),
]


def by_path(tree):
    """{'a.b.c': leaf} of a tree of dicts."""
    return {
        ".".join(entry.key for entry in path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def random_tree(seed: int, size: float = 1.0):
    shapes, tree = jax.tree.flatten(PARAMS, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(size * rng.standard_normal(s), jnp.float32) for s in shapes]
    return jax.tree.unflatten(tree, leaves)


def oracle(config, params, gradients, rates):
    """The equations of the module docstring, in float64 loops over the leaves."""
    flat = {
        jax.tree_util.keystr(path): np.asarray(x, np.float64)
        for path, x in jax.tree.leaves_with_path(params)
    }
    m = {k: 0.0 for k in flat}
    v = {k: 0.0 for k in flat}
    for t, (grads, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        grads = {
            jax.tree_util.keystr(path): np.asarray(x, np.float64)
            for path, x in jax.tree.leaves_with_path(grads)
        }
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1.0, config.clip_norm / norm)
            m[k] = config.b1 * m[k] + (1 - config.b1) * g
            v[k] = config.b2 * v[k] + (1 - config.b2) * g**2
            u = (m[k] / (1 - config.b1**t)) / (
                np.sqrt(v[k] / (1 - config.b2**t)) + config.eps
            )
            table = k.endswith("['tables']")
            decayed = (
                config.decay_tables if table else "bias" not in k and "norm" not in k
            )
            scale = config.table_learning_rate_scale if table else 1.0
            decay = config.weight_decay if decayed else 0.0
            flat[k] = flat[k] - lr * scale * (u + decay * flat[k])
    return flat


@pytest.mark.parametrize("decay_tables", [True, False])
@pytest.mark.parametrize("gradient_size", [0.01, 3.0])
def test_adamw_equals_its_equations(decay_tables, gradient_size):
    """Five steps, gradients above and below the clipping norm, all groups.

    Mutation: no clipping; decay on biases; tables' scale left out; b2 for b1; rate of
    the step after.
    """
    config = OptimizerConfig(
        learning_rate=0.02,
        warmup_steps=2,
        table_learning_rate_scale=2.5,
        decay_tables=decay_tables,
        weight_decay=0.3,
    )
    params = start = random_tree(0)
    gradients = [random_tree(i + 1, gradient_size) for i in range(5)]
    rates = [0.01, 0.02] + [
        0.02 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8))) for i in range(3)
    ]
    tx = optimizer.make(config, 10, GROUPS)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    expected = oracle(config, start, gradients, rates)
    for path, x in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            x, expected[name], rtol=2e-5, atol=2e-6, err_msg=name
        )
    assert int(optimizer.count(state)) == 5


def test_groups_are_as_documented():
    """What each module declares, beside the rule by name and shape that trained the models
    on file: equal for every parameter that there is.

    Mutations tried: `decay=True` for the biases; `decay=False` for Luna's slots.
    """
    declared, shapes = {}, {}
    for fields in PARAMETERS:
        config = toy.model_config(**fields, num_layers=1)
        declared |= by_path(model.param_groups(config))
        shapes |= by_path(jax.eval_shape(lambda c=config: model.init(c)))
    for path, group in declared.items():
        name = path.split(".")[-1]
        matrix = len(shapes[path].shape) >= 2 and name not in ("bias", "scale")
        expected = "decayed" if matrix else "undecayed"
        expected = {"tables": "tables", "random_rows": "fixed"}.get(name, expected)
        assert group == expected, path
    assert declared["recurrence.bias"] == "undecayed"  # where Memformer's slots start
    assert declared["recurrence.memory"] == "decayed"  # RMT's
    assert declared["blocks.0.mixer.memory"] == "decayed"  # Luna's
    assert declared["blocks.0.mixer.qkv.bias"] == "undecayed"
    assert set(declared.values()) == {*optimizer.GROUPS, "fixed"}


def test_schedules_at_their_corners():
    """First update, end of the warm-up, middle, horizon and beyond.

    Mutation: warm up from 0; decay from step 0; horizon `num_steps - 1`.
    """
    common = dict(learning_rate=2.0, warmup_steps=10)
    cosine = optimizer.schedule(OptimizerConfig(**common), 110)
    found = [float(cosine(s)) for s in (0, 4, 9, 10, 60, 110, 500)]
    np.testing.assert_allclose(found, [0.2, 1.0, 2.0, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)
    constant = optimizer.schedule(OptimizerConfig(schedule="constant", **common), 110)
    found = [float(constant(s)) for s in (0, 9, 500)]
    np.testing.assert_allclose(found, [0.2, 2.0, 2.0], rtol=1e-6)
    options = {"cooldown_fraction": 0.4, "end_fraction": 0.1}
    config = OptimizerConfig(schedule="wsd", schedule_options=options, **common)
    wsd = optimizer.schedule(config, 100)
    found = [float(wsd(s)) for s in (0, 9, 60, 80, 100, 500)]
    np.testing.assert_allclose(found, [0.2, 2.0, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)
    config = OptimizerConfig(schedule_options={"decay_steps": 110}, **common)
    horizon = optimizer.schedule(config, 7)
    assert float(horizon(60)) == float(cosine(60))


@pytest.mark.parametrize("schedule", optimizer.schedules.SCHEDULES)
def test_schedules_are_those_of_optax(schedule):
    """Joined of optax's own, at every step, but for rounding.

    Mutations: a fall that begins a step later; pi / 2 for pi; the floor times the peak left out.
    """
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=30, schedule=schedule)
    start, falls = {
        "constant": (30, optax.constant_schedule(1.0)),
        "cosine": (30, optax.cosine_decay_schedule(1.0, 270, 0.1)),
        "wsd": (240, optax.linear_schedule(1.0, 0.1, 60)),
    }[schedule]
    rises = optax.linear_schedule(1 / 30, 1.0, 29)
    stays = optax.constant_schedule(1.0)
    joined = optax.join_schedules([rises, stays, falls], [29, start])
    ours = jax.vmap(optimizer.schedule(config, 300))(jnp.arange(400))
    np.testing.assert_allclose(ours, jax.vmap(joined)(jnp.arange(400)), atol=3e-7)


def test_learning_rate_and_decay_share_one_compilation():
    """Given as inputs they change the update, equal compiled-in ones, and retrace nothing.

    Mutation: use `config.weight_decay` in `update` whatever was passed.
    """
    traces = []
    params, grads = random_tree(0), random_tree(1)

    def step(tx, state, hyperparams):
        traces.append(1)
        return tx.update(grads, state, params, hyperparams=hyperparams)[0]

    first = OptimizerConfig(learning_rate=1e-3)
    tx = optimizer.make(first, 10, GROUPS)
    jitted = jax.jit(lambda state, hyperparams: step(tx, state, hyperparams))
    for config in (first, OptimizerConfig(learning_rate=5e-3, weight_decay=0.7)):
        found = jitted(tx.init(params), optimizer.hyperparams(config))
        own = optimizer.make(config, 10, GROUPS)
        expected, _ = own.update(grads, own.init(params), params)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9)
    assert len(traces) == 1


def test_moments_are_float32_and_nothing_more_is_kept():
    """bfloat16 parameters keep float32 moments: two per parameter and one counter.

    Mutation: init without the cast.
    """
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(0))
    tx = optimizer.make(OptimizerConfig(), 10, GROUPS)
    state = jax.eval_shape(tx.init, params)
    leaves = jax.tree.leaves(state)
    assert len(leaves) == 2 * len(jax.tree.leaves(params)) + 1
    assert {str(x.dtype) for x in leaves} == {"float32", "int32"}
    updates, _ = tx.update(params, tx.init(params), params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", -1.0),
        ("b2", 1.0),
    ],
)
def test_bad_values_are_refused(field, value):
    """Mutation: drop `__post_init__`."""
    with pytest.raises(ConfigError, match=f"optimizer.{field}={value!r}: must be"):
        OptimizerConfig(**{field: value})


def test_warmup_that_does_not_fit_is_refused():
    """Mutation: compare with `>`."""
    with pytest.raises(ConfigError, match="warmup_steps=10: must be below"):
        optimizer.make(OptimizerConfig(warmup_steps=10), 10, GROUPS)


def test_gradients_are_left_as_they_are_without_a_norm():
    """And at the norm itself. Mutations: `not` left out; a minimum for the maximum."""
    gradient = {"a": jnp.array([3.0, 4.0])}  # of norm 5
    for clip_norm, factor in ((0.0, 1), (5.0, 1), (7.0, 1), (2.5, 0.5)):
        config = OptimizerConfig(clip_norm=clip_norm, eps=1e3, b1=0.0, b2=0.0)
        tx = optimizer.make(config, 10, {"a": "undecayed"})
        updates, _ = tx.update(gradient, tx.init(gradient), gradient)
        clipped = factor * np.array([3.0, 4.0])
        wanted = -1e-3 * clipped / (np.abs(clipped) + 1e3)
        np.testing.assert_allclose(updates["a"], wanted, rtol=1e-5)
    assert float(optimizer.norm(gradient)) == 5


def test_a_fall_of_no_steps():
    """A cooldown that rounds to none, and the longest warm-up that fits.

    Mutations: a product for `1 - cooldown_fraction`; the length 0; `>` for `>=`.
    """
    options = {"cooldown_fraction": 0.01}
    config = OptimizerConfig(2.0, schedule="wsd", schedule_options=options)
    rate = optimizer.schedule(config, 10)
    found = [float(rate(step)) for step in (0, 9, 10, 11, 99)]
    np.testing.assert_allclose(found, [2, 2, 2, 0.2, 0.2], rtol=1e-6)
    optimizer.schedule(OptimizerConfig(warmup_steps=9), 10)
    constant = OptimizerConfig(schedule="constant", warmup_steps=10)
    assert float(optimizer.schedule(constant, 10)(4)) == pytest.approx(5e-4)
    with pytest.raises(ConfigError, match="horizon of 8 steps"):
        options = {"decay_steps": 8}
        config = OptimizerConfig(warmup_steps=8, schedule_options=options)
        optimizer.schedule(config, 10)
