"""Toy states, and checkpoints of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memoryformer.runs import checkpoint, manifest
from memoryformer.runs import steps as run_steps

RUN_CONFIG = {
    "model": {"embed_dim": 8, "betas": (0.9, 0.95)},
    "train": {"num_steps": 10, "log_every": 1},
    "optimizer": {"learning_rate": 1e-3, "schedule": "cosine"},
    "mesh": "data",
}


class TrainState(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def make_state(step: int, rows: int = 16) -> TrainState:
    """A state whose every leaf depends on the step."""
    key = jax.random.key(step)
    params = {
        "ffn": {"tables": jax.random.normal(key, (rows, 8, 8))},
        "blocks": {"0": {"norm": {"scale": jnp.full((8,), step, jnp.bfloat16)}}},
    }
    opt_state = optax.adamw(1e-3).init(params)
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), opt_state)
    return TrainState(jnp.int32(step), params, opt_state)


def open_run(workdir, config=None, *, run_config=None, **options):
    options = {"data_fingerprint": "abc"} | options
    return checkpoint.Checkpointer(
        workdir,
        config or checkpoint.CheckpointConfig(),
        run_config=run_config or RUN_CONFIG,
        **options,
    )


def save_steps(workdir, steps, config=None):
    with open_run(workdir, config) as run:
        for step in steps:
            run.save(step, make_state(step), wait=True)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def steps_on_disk(workdir):
    names = {p.name for p in (workdir / run_steps.FOLDER).iterdir()}
    return sorted(int(name) for name in names - {manifest.LEDGER})


def lose_manifests(workdir, *steps):
    for step in steps:
        (workdir / run_steps.FOLDER / str(step) / manifest.MANIFEST).unlink()
