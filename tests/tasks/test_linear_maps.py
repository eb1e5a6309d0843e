"""Examples of linear attention: their targets, their moments, and that Adam learns from them."""

import numpy as np
import pytest

from memoryformer import errors
from memoryformer.tasks import experiment, linear_maps


def options(**fields):
    sizes = {"num_steps": 2, "batch_size": 8, "learning_rate": 0.1, "warmup_steps": 0}
    return linear_maps.LinearMapsConfig(**(sizes | {"num_examples": 300} | fields))


def test_a_teachers_targets():
    """y is that of the teacher, of mean square 1; features have variance 1.

    Mutations: entries of variance 1; targets as they come; a teacher drawn per batch.
    """
    chosen = options(width=3, length=8, num_examples=3000)
    V, Q = linear_maps.teacher(chosen)
    Z, Y = linear_maps.dataset(chosen)
    expected = sum(
        v @ Z[7] @ Z[7].T @ q @ Z[7][:, -1] for v, q in zip(V, Q, strict=True)
    )
    np.testing.assert_allclose(Y[7], expected)
    assert np.mean(np.sum(Y**2, axis=1)) == pytest.approx(1, rel=0.2)
    feature = np.einsum("Nn,Nn->N", Z[:, 0], Z[:, 1]) * Z[:, 2, -1]
    assert np.var(feature) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("normal", [0.0, 0.25, 1.0])
def test_a_value_is_recalled_by_its_key(normal):
    """Written out as a memory; orthogonal keys, values where the share says so.

    Mutations: the query's own value read as 0; keys in rows; the share of the others.
    """
    chosen = options(kind="associative", width=6, normal=normal)
    Z, Y = linear_maps.dataset(chosen)
    assert Z.shape == (300, 6, 4)
    keys, values = Z[:, :3], Z[:, 3:]
    memory = sum(
        np.einsum("Na,Nb->Nab", values[..., j], keys[..., j]) for j in range(4)
    )
    recalled = np.einsum("Nab,Nb->Na", memory, keys[..., -1])
    assert np.abs(Y[:, :3]).max() == 0
    scale = Y[0, 3] / recalled[0, 0]
    np.testing.assert_allclose(Y[:, 3:], scale * recalled, atol=1e-12)
    matches = np.isclose(keys[..., :3], keys[..., 3:]).all(axis=1).sum(axis=1)
    np.testing.assert_array_equal(matches, 1)
    squares = np.einsum("Naj,Nak->Njk", keys[..., :3], keys[..., :3])
    orthogonal = np.isclose(squares, np.eye(3), atol=1e-9).all(axis=(1, 2))
    assert orthogonal.mean() == pytest.approx(1 - normal, abs=0.08)


def test_batches_follow_from_seed_step_and_split():
    """Training draws from the set, validation does not. Mutation: validation from the set."""
    config = experiment.default_config("linear_maps")
    config.task.update(num_steps=3, batch_size=50, learning_rate=0.1, num_examples=60)
    config.task.update(warmup_steps=0)
    task = experiment.resolve(config).task
    Z, _ = linear_maps.dataset(task.options)
    one, two = task.batch(3, "train"), task.batch(3, "train")
    np.testing.assert_array_equal(one["Z"], two["Z"])
    known = {z.astype(np.float32).tobytes() for z in Z}
    assert all(z.tobytes() in known for z in one["Z"])
    assert not any(z.tobytes() in known for z in task.batch(3, "validation")["Z"])
    params = dict(zip("VQ", linear_maps.teacher(task.options), strict=True))
    loss, count = task.sums(params, task.batch(0, "validation"))["loss"]
    assert loss < 1e-9 and count == 50


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "x"}, "task.kind='x'"),
        ({"kind": "associative", "width": 5}, "task.width=5"),
        ({"normal": 1.5}, "task.normal=1.5"),
        ({"teacher_heads": 0}, "task.teacher_heads=0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fields, said):
    """Mutation: one of the checks left out."""
    with pytest.raises(errors.ConfigError, match=said):
        options(**fields)
