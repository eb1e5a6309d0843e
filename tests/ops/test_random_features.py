"""Orthogonal matrices without LAPACK: they are orthogonal, uniform, and cannot hang XLA."""

import jax
import numpy as np
import pytest
import toy

from memoryformer import sharding
from memoryformer.dryrun import lowering
from memoryformer.ops import random_features
from memoryformer.training import experiment, programs


@pytest.mark.parametrize("size", [1, 6, 64, 128])
def test_orthonormal_to_rounding(size):
    """Mutation: one pass of Gram-Schmidt instead of two."""
    q = random_features.orthogonal(jax.random.key(size), size, (5, 2))
    q = np.asarray(q, np.float64)
    assert q.shape == (5, 2, size, size)
    np.testing.assert_allclose(
        q.mT @ q, np.broadcast_to(np.eye(size), q.shape), atol=1e-6
    )


def test_nearly_dependent_columns():
    """Columns that differ by 1e-3: one pass leaves errors of 1e-4."""
    x = jax.random.normal(jax.random.key(0), (16, 1))
    x = x + 1e-3 * jax.random.normal(jax.random.key(1), (16, 16))
    q = np.asarray(random_features.orthonormalise(x), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(16), atol=1e-6)


def test_equals_qr_with_a_positive_diagonal():
    """Mutation: a column is not taken off, or its sign is turned."""
    x = np.asarray(jax.random.normal(jax.random.key(3), (4, 24, 24)))
    q, r = np.linalg.qr(x.astype(np.float64))
    q = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None]
    np.testing.assert_allclose(random_features.orthonormalise(x), q, atol=1e-5)


def test_draws_are_those_of_jax():
    """Models of older versions keep their features and first weights."""
    key = jax.random.key(7)
    np.testing.assert_allclose(
        random_features.orthogonal(key, 16, (2, 3)),
        jax.random.orthogonal(key, 16, (2, 3)),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "mixer",
    [
        {
            "mixer": "performer",
            "mixer_options.num_features": 6,
            "mixer_options.redraw_every": 2,
        },
        {"mixer": "trained_kernel"},
    ],
    ids=lambda fields: fields["mixer"],
)
def test_no_lapack_in_training(mixer, tmp_path):
    """Mutation: `jnp.linalg.qr`. Layers that call it at once can hang two cores."""
    fields = {f"model.{name}": value for name, value in mixer.items()}
    run = experiment.resolve(toy.run_config(tmp_path, **fields))
    single = sharding.make(run.mesh)
    draw = programs.programs(run, single).draw.lower(0).as_text()
    step = lowering.lower(lowering.trace(run, single)[1], single).as_text()
    for text in (draw, step):
        assert "lapack" not in text and "geqrf" not in text
