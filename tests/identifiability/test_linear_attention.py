"""Linear attention learned exactly, held to sums over tokens written out."""

import numpy as np
import pytest

from memoryformer import identifiability
from memoryformer.identifiability import linear_attention


def layer(V, Q, Z):
    """The oracle: sum_h sum_s V_h z_s (z_s . Q_h z_n), token by token."""
    out = np.zeros(Z.shape[:2])
    for i, tokens in enumerate(Z):
        for v, q in zip(V, Q, strict=True):
            for token in tokens.T:
                out[i] += v @ token * (token @ (q @ tokens[:, -1]))
    return out


def teacher(rng, width, num_heads):
    return rng.normal(size=(2, num_heads, width, width))


def relative(difference, of):
    return np.abs(difference).max() / np.abs(of).max()


@pytest.mark.parametrize(("width", "num_heads"), [(1, 1), (2, 1), (3, 12), (4, 3)])
def test_a_teacher_is_recovered_in_function(width, num_heads):
    """To 1e-12 on fresh data, and in its invariants; the heads are others.

    Mutations: features without the pairs j = k; `half` that is not halved; Q transposed in
    `decompose`; the square root of the singular values on one side only.
    """
    rng = np.random.default_rng(width)
    V, Q = teacher(rng, width, num_heads)
    Z = rng.normal(size=(600, width, 7))
    fitted = identifiability.fit_heads(Z, layer(V, Q, Z))
    fresh = rng.normal(size=(50, width, 4))
    target = layer(V, Q, fresh)
    predicted = identifiability.predict(*fitted, fresh)
    assert relative(predicted - target, target) < 1e-12
    np.testing.assert_allclose(predicted, layer(*fitted, fresh), rtol=1e-9, atol=1e-9)
    size = np.linalg.norm(linear_attention.invariants(V, Q))
    assert linear_attention.distance((V, Q), fitted) < 1e-12 * size
    assert len(fitted[0]) <= width**2


def test_invariants_are_those_of_the_function():
    """Other heads of the same function are at distance 0, another function is not.

    V_h (x) Q_h are scaled, two heads of one Q are joined, and a part antisymmetric in j and k,
    which Z Z^T cannot see, is added. Mutation: invariants without the second product.
    """
    rng = np.random.default_rng(0)
    V, Q = teacher(rng, 3, 2)
    shared = rng.normal(size=(1, 3, 3))
    first = np.concatenate([V, V]), np.concatenate([Q, shared, shared])
    left, right, rows = rng.normal(size=(3, 3))
    # V_aj Q_kl: rows_a left_j right_k rows_l - rows_a right_j left_k rows_l
    unseen_V = np.stack([np.outer(rows, left), -np.outer(rows, right)])
    unseen_Q = np.stack([np.outer(right, rows), np.outer(left, rows)])
    second = (
        np.concatenate([2 * V, [V[0] + V[1]], unseen_V]),
        np.concatenate([Q / 2, shared, unseen_Q]),
    )
    Z = rng.normal(size=(5, 3, 6))
    np.testing.assert_allclose(layer(*first, Z), layer(*second, Z), rtol=1e-10)
    assert linear_attention.distance(first, second) < 1e-13
    assert linear_attention.distance(first, (V, Q)) > 1


def test_the_certificate_bounds_what_a_fit_can_miss():
    """|f(Z) - f'(Z)| <= sqrt(e / certificate) |Z|^3, and both ends of the inequality behind it.

    Mutations: a certificate not divided by N; the largest eigenvalue for the smallest.
    """
    rng = np.random.default_rng(1)
    Z = rng.normal(size=(300, 3, 5))
    smallest = identifiability.certificate(Z)
    H = np.stack(
        [
            [G[j, k] * z[-1] for j in range(3) for k in range(j, 3)]
            for z, G in ((x.T, x @ x.T) for x in Z)
        ]
    ).reshape(300, -1)
    eigenvalues = np.linalg.eigvalsh(H.T @ H / 300)
    assert len(eigenvalues) == linear_attention.num_features(3) == 18
    assert smallest == pytest.approx(eigenvalues[0], rel=1e-9)
    first, second = teacher(rng, 3, 2), teacher(rng, 3, 4)
    excess = np.sum((layer(*first, Z) - layer(*second, Z)) ** 2) / 300
    assert excess >= smallest * linear_attention.distance(first, second) ** 2
    others = rng.normal(size=(100, 3, 2))
    gap = np.linalg.norm(layer(*first, others) - layer(*second, others), axis=1)
    size = np.linalg.norm(others, axis=(1, 2))
    assert (gap <= np.sqrt(excess / smallest) * size**3).all()


def test_no_certificate_without_enough_examples():
    """0 exactly with fewer examples than features, 1e-25 of the scale where data lie in a plane.

    Mutation: singular values of the wide matrix, whose smallest is not that of the moment.
    """
    rng = np.random.default_rng(2)
    Z = rng.normal(size=(17, 3, 5))
    assert identifiability.certificate(Z) == 0
    flat = rng.normal(size=(400, 3, 5))
    flat[:, 2] = flat[:, 0] + flat[:, 1]
    assert identifiability.certificate(flat) < 1e-25
    assert identifiability.certificate(rng.normal(size=(400, 3, 5))) > 1e-2


def test_where_data_leave_a_choice_the_fit_is_still_one_of_the_best():
    """Nothing is left on the data that were fitted, and another function fits as well.

    Mutation: `solve` for `lstsq`, which ends in an error or in numbers without meaning.
    """
    rng = np.random.default_rng(3)
    Z = rng.normal(size=(300, 3, 5))
    Z[:, 2] = Z[:, 0] + Z[:, 1]
    V, Q = teacher(rng, 3, 2)
    Y = layer(V, Q, Z)
    fitted = identifiability.fit_heads(Z, Y)
    assert relative(identifiability.predict(*fitted, Z) - Y, Y) < 1e-12
    assert linear_attention.distance((V, Q), fitted) > 0.1


def test_blocks_of_examples_do_not_matter(monkeypatch):
    """Mutation: a block's R in place of that of all blocks."""
    rng = np.random.default_rng(4)
    Z, Y = rng.normal(size=(90, 2, 4)), rng.normal(size=(90, 2))
    whole = linear_attention.least_squares(Z, Y), identifiability.certificate(Z)
    monkeypatch.setattr(linear_attention, "BLOCK", 25)
    parts = linear_attention.least_squares(Z, Y), identifiability.certificate(Z)
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-12)
    assert parts[1] == pytest.approx(whole[1])
    H = linear_attention.features(Z)
    np.testing.assert_allclose(whole[0], np.linalg.lstsq(H, Y)[0].T, atol=1e-11)


def test_noise_is_averaged_not_fitted_by_more_heads():
    """The least error is that of the best p, whatever the heads: residuals meet no feature.

    Mutation: `fit_heads` that keeps the first singular value alone.
    """
    rng = np.random.default_rng(5)
    Z, Y = rng.normal(size=(200, 2, 4)), rng.normal(size=(200, 2))
    left = Y - identifiability.predict(*identifiability.fit_heads(Z, Y), Z)
    assert np.abs(linear_attention.features(Z).T @ left).max() < 1e-9


@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 2), (4, 2, 0)])
def test_shapes_are_checked(shape):
    """Mutation: the check left out, and numpy's error of another array."""
    with pytest.raises(ValueError, match="expected"):
        identifiability.fit_heads(np.ones(shape), np.ones(shape[:2]))
    with pytest.raises(ValueError, match="expected"):
        identifiability.certificate(np.ones(shape))


def test_as_many_targets_as_examples():
    """Mutation: the check left out."""
    with pytest.raises(ValueError, match="Y"):
        identifiability.fit_heads(np.ones((4, 2, 3)), np.ones((4, 3)))
