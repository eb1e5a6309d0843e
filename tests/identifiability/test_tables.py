"""When tables are unique: counted by hand, and against dense matrices."""

import numpy as np
import pytest

from memoryformer.identifiability import tables


def dense(codes, scores, num_buckets):
    """A [N, K C], written out."""
    A = np.zeros((len(codes), codes.shape[1] * num_buckets))
    for i, (row, weights) in enumerate(zip(codes, scores, strict=True)):
        for k, (code, weight) in enumerate(zip(row, weights, strict=True)):
            A[i, k * num_buckets + code] = weight
    return A


def draw(num_examples, num_tables, num_buckets, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, num_buckets, (num_examples, num_tables))
    return codes, rng.uniform(0.2, 2, codes.shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_examples", [9, 40, 700])
def test_rank_and_eigenvalues_are_those_of_the_matrix(num_examples, weighted, bias):
    """Mutations: buckets that nobody visits counted; scores not squared; no bias column."""
    codes, scores = draw(num_examples, 4, 8)
    scores = scores if weighted else np.full_like(scores, 0.7)
    A = dense(codes, scores, 8)
    A = A[:, A.any(axis=0)]
    A = np.concatenate([A, np.ones((num_examples, int(bias)))], axis=1)
    found = tables.certificate(codes, scores, 8, bias=bias)
    assert found.examples == num_examples and found.unknowns == A.shape[1]
    assert found.rank == np.linalg.matrix_rank(A)
    values = np.linalg.svd(A, compute_uv=False) ** 2 / num_examples
    full = found.rank == found.unknowns
    smallest = values[-1] if full else 0
    assert found.smallest == pytest.approx(smallest, rel=1e-8)
    assert found.largest == pytest.approx(values[0])
    assert found.weights_are_unique == full


def test_constant_scores_leave_a_constant_free():
    """K (2^tau - 1) + 1 at most, reached with enough inputs; a bias is one table more.

    A row added to one table and taken from another changes nothing: the certificate says that
    the function is unique and the tables are not. Mutation: freedom 0, or K.
    """
    codes, scores = draw(2000, 4, 16)
    ones = np.ones_like(scores)
    found = tables.certificate(codes, ones, 16)
    assert (found.unknowns, found.rank, found.freedom) == (64, 4 * 15 + 1, 3)
    assert found.smallest == 0 < found.smallest_beyond
    assert found.function_is_unique and not found.weights_are_unique
    with_bias = tables.certificate(codes, ones, 16, bias=True)
    assert (with_bias.unknowns, with_bias.rank, with_bias.freedom) == (65, 61, 4)
    assert with_bias.function_is_unique
    A = dense(codes, ones, 16)
    moved = np.zeros(64)
    moved[:16], moved[16:32] = 3.0, -3.0
    np.testing.assert_allclose(A @ moved, 0, atol=1e-12)


def test_weighted_scores_make_tables_unique():
    """Two least-squares solvers agree on the tables. Mutation: freedom as for constant scores."""
    codes, scores = draw(2000, 4, 16)
    found = tables.certificate(codes, scores, 16)
    assert found.rank == found.unknowns == 64 and found.freedom == 0
    assert found.weights_are_unique and found.function_is_unique
    assert found.smallest == found.smallest_beyond > 1e-3
    A = dense(codes, scores, 16)
    T = np.random.default_rng(1).normal(size=(64, 3))
    again = np.linalg.solve(A.T @ A, A.T @ (A @ T))
    np.testing.assert_allclose(again, T, atol=1e-10)


def test_a_new_combination_of_buckets_can_differ():
    """Two tables always read together: rank says that a new pair is not determined.

    Mutation: `function_is_unique` that compares with the rank that K tables can have.
    """
    code = np.random.default_rng(0).integers(0, 4, 100)
    codes = np.stack([code, code], axis=1)
    found = tables.certificate(codes, np.ones(codes.shape), 4)
    assert (found.unknowns, found.rank, found.freedom) == (8, 4, 1)
    assert not found.function_is_unique and found.smallest_beyond == 0


def test_features_are_those_of_visited_buckets():
    """Mutation: columns numbered without the table."""
    codes = np.array([[3, 3], [0, 3]])
    scores = np.array([[1.0, 2.0], [3.0, 4.0]])
    columns, values, visited = tables.features(codes, scores, 4)
    np.testing.assert_array_equal(visited, [0, 3, 7])
    np.testing.assert_array_equal(columns, [[1, 2], [0, 2]])
    np.testing.assert_array_equal(values, scores)


def test_shapes_are_checked():
    """Mutation: the check left out."""
    with pytest.raises(ValueError, match="expected"):
        tables.certificate(np.ones((3, 2), int), np.ones((3, 1)), 4)
