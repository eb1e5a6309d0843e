"""The update in C++ equals its equations and XLA's, in place, whatever the threads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_optimizer as cases
import toy

from memoryformer import sharding
from memoryformer.ops.lookup import native
from memoryformer.training import experiment, optimizer, programs, updates
from memoryformer.training import step as step_lib

pytestmark = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler, no native update"
)
CONFIG = optimizer.OptimizerConfig(
    learning_rate=0.01,
    warmup_steps=2,
    weight_decay=0.1,
    table_learning_rate_scale=5.0,
    clip_norm=0.5,
)
NUM_STEPS, WEIGHT = 9, 7.0


@pytest.fixture(autouse=True)
def default_settings():
    yield
    native.configure()


def steps_of(way, params, gradients, wanted=True, config=CONFIG):
    """(parameters, optimizer state, norms) after a step for each of the gradients."""
    update = way(config, NUM_STEPS, cases.GROUPS)
    tx = optimizer.make(config, NUM_STEPS, cases.GROUPS)
    state, norms, weight = tx.init(params), [], jnp.float32(WEIGHT)

    def step(params, state, sums, wanted):
        norm = update.norm(sums, weight)
        hyper = optimizer.hyperparams(config)
        operands = (norm, sums, weight, params, state, 0, state.count, hyper)
        return *update.apply(wanted, *operands), norm

    step = toy.quick_jit(step)
    for sums in gradients:
        params, state, norm = step(params, state, sums, jnp.asarray(wanted))
        norms.append(float(norm))
    return params, state, norms


def gradient_sums(count):
    """Gradients of a sum over `WEIGHT` tokens, of norms around that at which they are clipped."""
    return [cases.random_tree(10 + i, WEIGHT * 0.03 * (i + 1)) for i in range(count)]


@pytest.mark.parametrize("instructions", native.INSTRUCTION_SETS)
def test_equals_the_equations_and_xla(instructions):
    """Three steps: parameters, moments and norms, leaves of 2 to 24 values and of their tails.

    Mutations in update_native_kernel.h: `rest1` for `b1`; `decay` or `factor` left out; the
    last `count % kLanes` values not stored.
    """
    native.configure(instruction_set=instructions)
    params, sums = cases.random_tree(0), gradient_sums(3)
    found = steps_of(updates.native_updates, params, sums)
    expected = steps_of(updates.xla_updates, params, sums)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7),
        found,
        expected,
    )
    assert found[2][0] < CONFIG.clip_norm < found[2][2]
    means = [jax.tree.map(lambda g: g / WEIGHT, tree) for tree in sums]
    schedule = optimizer.schedule(CONFIG, NUM_STEPS)
    rates = [float(schedule(i)) for i in range(3)]
    oracle = cases.oracle(CONFIG, params, means, rates)
    for path, x in jax.tree.leaves_with_path(found[0]):
        exact = oracle[jax.tree_util.keystr(path)]
        np.testing.assert_allclose(x, exact, rtol=1e-5, atol=1e-6)


def test_what_is_not_wanted_leaves_all_as_it_was():
    """To the bit, and the count too. Mutation: `wanted` not looked at in `UpdateCall`."""
    params = cases.random_tree(0)
    before = steps_of(updates.native_updates, params, gradient_sums(1))[:2]
    after = steps_of(updates.native_updates, params, gradient_sums(1), wanted=False)
    jax.tree.map(np.testing.assert_array_equal, after[0], params)
    assert int(after[1].count) == 0 and int(before[1].count) == 1
    assert not any(np.any(x) for x in jax.tree.leaves((after[1].mu, after[1].nu)))


def test_nothing_depends_on_the_number_of_threads():
    """Norm and update of leaves that take several pieces. Mutation: sums added as they end."""
    rng = np.random.default_rng(3)
    shapes = {"embed": {"embedding": (300, 401)}, "norm": {"scale": (3,)}}
    groups = {"embed": {"embedding": "decayed"}, "norm": {"scale": "undecayed"}}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params, sums = (
        jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
        for _ in range(2)
    )
    update = updates.native_updates(CONFIG, NUM_STEPS, groups)
    state = optimizer.make(CONFIG, NUM_STEPS, groups).init(params)
    weight = jnp.float32(WEIGHT)
    hyper = optimizer.hyperparams(CONFIG)
    found = []
    for threads in (1, 4):
        native.configure(num_threads=threads)
        norm = update.norm(sums, weight)
        operands = (norm, sums, weight, params, state, 0, state.count, hyper)
        found.append((norm, update.apply(jnp.asarray(True), *operands)))
    jax.tree.map(np.testing.assert_array_equal, *found)
    exact = sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(sums))
    np.testing.assert_allclose(norm * WEIGHT, exact**0.5, rtol=1e-6)


def run_of(table_state="full", **fields):
    config = experiment.default_config()
    config.model.update(dataclasses.asdict(toy.model_config(**fields)))
    config.train.update(num_steps=NUM_STEPS, batch_size=4)
    config.optimizer.table_state = table_state
    return experiment.resolve(config)


def test_a_state_is_updated_where_it_lies():
    """The step donates its state, and XLA copies no table of it; from a copy it does the same.

    Mutations: `in_place` False; the input-output aliases left out of `adamw.update`.
    """
    run, single = run_of(lookup="auto"), sharding.make("single")
    made = programs.make(run, single)
    state = made.draw(0)
    batch = toy.batch(run.model, 0, 4, run.model.seq_len)
    tables = state.params["blocks"]["0"]["ffn"]["down"]["tables"]
    compiled = made.train_step.lower(state, batch, step_lib.hyperparams(run)).compile()
    shape = ",".join(map(str, tables.shape))
    assert not [
        line
        for line in compiled.as_text().splitlines()
        if " copy(" in line and f"f32[{shape}]" in line
    ]
    restored = jax.tree.map(
        jnp.copy, state
    )  # a view on the host would be kept, uncopied
    after = compiled(state, batch, step_lib.hyperparams(run))
    assert tables.is_deleted()
    again = compiled(restored, batch, step_lib.hyperparams(run))
    jax.tree.map(np.testing.assert_array_equal, after, again)


@pytest.mark.parametrize(
    "fields, mesh, in_place",
    [
        ({"lookup": "auto"}, "single", True),
        ({"lookup": "xla"}, "single", False),
        ({"lookup": "auto", "dtype": "bfloat16"}, "single", False),
        ({"lookup": "auto"}, "fsdp", False),
        ({"lookup": "auto", "table_state": "lean"}, "single", False),
    ],
)
def test_where_it_is_chosen(fields, mesh, in_place):
    """One CPU, float32, and not where lookups are left to XLA.

    Mutation: `usable` without `sharding.mesh is None`.
    """
    run = run_of(**fields)
    made = updates.make(run, sharding.make(mesh), step_lib._trained_groups(run))
    assert made.in_place == in_place
