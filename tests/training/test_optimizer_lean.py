"""Lean state of tables: equations in float64, bytes, rounding, resuming, sharding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec as P

from memoryformer import model
from memoryformer.errors import ConfigError
from memoryformer.training import optimizer, table_storage
from memoryformer.training.optimizer import OptimizerConfig

LEAN = {"second_moment": "row", "moment_dtype": "bfloat16"}
LEANEST = LEAN | {"dtype": "bfloat16", "rounding": "stochastic"}
FULL = {"second_moment": "full", "moment_dtype": "float32"}
SHAPES = {"mixer": {"tables": (2, 4, 3, 5)}, "ffn": {"kernel": (4, 5)}}


GROUPS = {"mixer": {"tables": "tables"}, "ffn": {"kernel": "decayed"}}


def lean(**options):
    return OptimizerConfig(table_state="lean", table_state_options=options)


def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        SHAPES,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


@pytest.mark.parametrize("moment", ["float32", "bfloat16", "none"])
@pytest.mark.parametrize("second", ["full", "row"])
def test_tables_follow_their_equations(second, moment):
    """Five steps against float64 loops; what is no table is AdamW as ever.

    Mutations: the mean over all axes but the first; `sum` for `mean`; the kernel's v by row;
    the rounded m in u.
    """
    config = OptimizerConfig(
        learning_rate=0.02, schedule="constant", clip_norm=0.0, weight_decay=0.3,
        table_state="lean",
        table_state_options={"second_moment": second, "moment_dtype": moment},
    )  # fmt: skip
    params = draw(0)
    tx = optimizer.make(config, 10, GROUPS)
    state, update = tx.init(params), jax.jit(tx.update)
    exact = {
        name: np.asarray(leaf, np.float64) for name, leaf in leaves(params).items()
    }
    m, v = dict.fromkeys(exact, 0.0), dict.fromkeys(exact, 0.0)
    for t in range(1, 6):
        grads = draw(t)
        updates, state = update(grads, state, params)
        params = table_storage.apply(config, params, updates, GROUPS, 0, jnp.int32(t))
        for name, g in leaves(grads).items():
            g, table = np.asarray(g, np.float64), "tables" in name
            squares = g**2
            if table and second == "row":
                squares = squares.mean(axis=-1, keepdims=True)
            v[name] = 0.95 * v[name] + 0.05 * squares
            m[name] = 0.9 * m[name] + 0.1 * g
            first = g if table and moment == "none" else m[name] / (1 - 0.9**t)
            u = first / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            exact[name] = exact[name] - 0.02 * (u + 0.3 * exact[name])
            if table and moment == "bfloat16":  # kept so; u reads it unrounded
                m[name] = np.asarray(jnp.asarray(m[name], jnp.bfloat16), np.float64)
    for name, leaf in leaves(params).items():
        np.testing.assert_allclose(
            leaf, exact[name], rtol=2e-5, atol=2e-6, err_msg=name
        )


def leaves(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(tree)}


def test_bytes_of_an_entry():
    """What is said at the start of a run is what the state takes."""
    sizes = {
        12: FULL,
        10: FULL | {"moment_dtype": "bfloat16"},
        6: {},
        4: LEANEST,
        2: LEANEST | {"moment_dtype": "none"},
    }
    params = {"tables": jnp.zeros((8, 64, 512))}
    full = OptimizerConfig()
    assert full.table_entry_bytes == lean(**FULL).table_entry_bytes
    for expected, options in sizes.items():
        config = lean(**options) if expected < 12 else full
        assert config.table_entry_bytes == expected
        groups = {"tables": "tables"}
        tx = optimizer.make(config, 1, groups)
        kept = table_storage.stored(config, params, groups), tx.init(params)
        taken = sum(x.nbytes for x in jax.tree.leaves(kept)) / params["tables"].size
        assert expected <= taken < expected + 0.02


def test_stochastic_rounding_keeps_the_mean():
    """Every result is a neighbour, exact values stay, infinities and NaN too, and the mean
    of many is the value: within four standard errors.

    Mutations: bits of 15 places; `bits` left out.
    """
    values = np.float32([1.0, -3.0, 0.0, 1.001, -1.001, 3e38, 1e-38, 0.1])
    count = 20_000
    bits = jax.random.bits(jax.random.key(0), (count, len(values)), jnp.uint16)
    rounded = table_storage.round_stochastically(
        jnp.broadcast_to(values, (count, len(values))), bits
    )
    assert rounded.dtype == jnp.bfloat16
    rounded = np.asarray(rounded, np.float64)
    for i, value in enumerate(values.astype(np.float64)):
        seen = np.unique(rounded[:, i])
        if value == float(jnp.bfloat16(value)):
            assert seen.tolist() == [value]
            continue
        low, high = seen
        assert low < value < high
        step = high - low
        share = (value - low) / step
        error = step * np.sqrt(share * (1 - share) / count)
        assert abs(rounded[:, i].mean() - value) < 4 * error
    odd = jnp.float32([np.inf, -np.inf, np.nan, 3.39e38])
    kept = np.asarray(
        table_storage.round_stochastically(odd, jnp.full(4, 0xFFFF, jnp.uint16)),
        np.float32,
    )
    assert kept[0] == np.inf and kept[1] == -np.inf and np.isnan(kept[2])
    assert kept[3] == np.asarray(odd.astype(jnp.bfloat16), np.float32)[3] < np.inf


def test_rounding_depends_on_seed_and_step_only():
    """And each parameter draws its own bits.

    Mutation: one key for all.
    """
    config = lean(**LEANEST)
    params = {"a": {"tables": jnp.full((2, 4, 64), 1.001, jnp.float32)}}
    params["b"] = params["a"]
    groups = {"a": {"tables": "tables"}, "b": {"tables": "tables"}}
    params = table_storage.stored(config, params, groups)
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 0.0013, jnp.float32), params)

    def result(seed, step):
        return jax.tree.map(
            np.asarray,
            table_storage.apply(config, params, updates, groups, seed, jnp.int32(step)),
        )

    first = result(3, 5)
    jax.tree.map(np.testing.assert_array_equal, first, result(3, 5))
    for other in (result(4, 5), result(3, 6)):
        assert not np.array_equal(first["a"]["tables"], other["a"]["tables"])
    assert not np.array_equal(first["a"]["tables"], first["b"]["tables"])


def test_what_is_refused():
    for fields, message in (
        ({"second_moment": "rows"}, "did you mean 'row'"),
        ({"moment_dtype": "float16"}, "did you mean 'bfloat16'"),
        ({"dtype": "int8"}, "known: bfloat16, float32"),
        ({"rounding": "stochastic"}, "set both"),
    ):
        name = f"optimizer.table_state_options.{next(iter(fields))}="
        with pytest.raises(ConfigError, match=name) as e:
            lean(**fields)
        assert message in str(e.value)


def test_a_moment_lies_where_its_parameter_does():
    """But for the axis that it has summed up.

    Mutation: the parameter's spec whatever the moment's shape.
    """
    config = lean(**LEAN)
    params = {"tables": jnp.zeros((2, 4, 8)), "kernel": jnp.zeros((4, 8))}
    specs = {"tables": P(None, "data", "model"), "kernel": P("data", "model")}
    groups = {"tables": "tables", "kernel": "decayed"}
    state = optimizer.make(config, 1, groups).init(params)
    placed = optimizer.state_specs(state, params, specs)
    assert placed.count == P()
    assert placed.mu == specs
    assert placed.nu["tables"] == P(None, "data", None)
    assert placed.nu["kernel"] == specs["kernel"]


def test_gradients_of_tables_are_kept_in_the_type_they_are_read_in():
    """The traced step has no float32 array of the size of all tables' gradients, and the
    result is that of float32 gradients to the bit: the layer rounds them already.

    Mutation: no `with_tables_as_read` in the step.
    """
    config = toy.model_config(dtype="bfloat16")
    params = model.init(config, 0)
    batch = toy.batch(config)

    def loss(params):
        logits = model.forward(config, params, batch["inputs"]).astype(jnp.float32)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    wide = jax.jit(jax.grad(loss))(params)
    narrow = jax.jit(jax.grad(loss))(model.with_tables_as_read(config, params))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(wide), jax.tree.leaves(narrow), strict=True
    ):
        assert b.dtype == ("bfloat16" if path[-1].key == "tables" else "float32")
        np.testing.assert_array_equal(a, b.astype(jnp.float32))


@pytest.mark.parametrize(
    "fields",
    [pytest.param(LEAN, marks=pytest.mark.slow), LEANEST],
    ids=["6 bytes", "4 bytes"],
)
def test_a_lean_run_resumes_bit_for_bit(fields, tmp_path):
    """Stopped after 3 of 6 steps, and a lean state is not read as a full one.

    Mutation: rounding seeded by the number of steps since the start of the process.
    """
    nested = "optimizer.table_state_options"
    fields = {f"{nested}.{name}": value for name, value in fields.items()}
    fields |= {"model.dtype": "bfloat16", "optimizer.table_state": "lean"}
    fields |= {"optimizer.schedule_options.decay_steps": 6}
    fields |= {"train.log_every": 1, "eval.every_steps": 0, "train.num_steps": 6}
    whole = toy.trained(tmp_path, "whole", **fields)
    toy.trained(tmp_path, "parts", **fields | {"train.num_steps": 3})
    assert losses(toy.trained(tmp_path, "parts", **fields)) == losses(whole)
    full = {f"{nested}.moment_dtype": "float32", "train.num_steps": 9}
    with pytest.raises(ConfigError, match=f"{nested}.moment_dtype"):
        toy.trained(tmp_path, "parts", **fields | full)


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
