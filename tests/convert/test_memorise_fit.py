"""Tables in closed form: against dense least squares, and against what theory gives."""

import math

import numpy as np
import pytest

from memoryformer import errors
from memoryformer.convert import memorise
from memoryformer.convert.memorise import fit

K, C, F = 3, 4, 5


def observations(num_tokens, seed=0, unread=()):
    """Random codes but those in `unread`, scores above 0, outputs with a mean."""
    rng = np.random.default_rng(seed)
    codes = rng.choice([c for c in range(C) if c not in unread], (num_tokens, K))
    scores = rng.uniform(0.5, 2, (num_tokens, K))
    return memorise.Observations(codes, scores, 3 + rng.normal(size=(num_tokens, F)))


def parts(whole, count=3):
    for arrays in zip(*(np.array_split(a, count) for a in whole), strict=True):
        yield memorise.Observations(*arrays)


def dense_solution(seen, ridge):
    """Ridge as rows below the matrix, the bias by centring: numpy's lstsq."""
    matrix = np.zeros((len(seen.codes), K * C))
    for n, (codes, scores) in enumerate(zip(seen.codes, seen.scores, strict=True)):
        for k in range(K):
            matrix[n, k * C + codes[k]] = scores[k]
    centre, target = matrix.mean(0), seen.outputs.mean(0)
    centred = matrix - centre
    scale = ridge * np.square(centred).sum(0).mean()
    left = np.concatenate([centred, math.sqrt(scale) * np.eye(K * C)])
    right = np.concatenate([seen.outputs - target, np.zeros((K * C, F))])
    weights = np.linalg.lstsq(left, right, rcond=None)[0]
    return weights.reshape(K, C, F), target - centre @ weights


@pytest.mark.parametrize("ridge", [1e-1, 1e-3])
def test_it_is_least_squares(ridge):
    """To 1e-9, over batches of any size. Mutations: the mean of A or of Y not taken off; the ridge
    not times the mean diagonal; a batch's A'Y written over instead of added.
    """
    seen = observations(200)
    result = memorise.fit_tables(parts(seen), observations(50, 1), C, ridges=[ridge])
    tables, bias = dense_solution(seen, ridge)
    np.testing.assert_allclose(result.tables, tables, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.bias, bias, rtol=0, atol=1e-9)
    assert result.solver == "exact" and result.num_tokens == 200


def test_conjugate_gradients_find_the_same():
    """To their tolerance, and they say how far they are. Mutations: the rank-one term of the means
    left out of `times`; the ridge left out of it; nothing told.
    """
    seen = observations(300)
    options = {"ridges": [1e-1, 1e-2], "tolerance": 1e-6}
    exact = memorise.fit_tables(parts(seen), observations(50, 1), C, **options)
    told: list[int] = []
    found = memorise.fit_tables(
        parts(seen),
        observations(50, 1),
        C,
        solver="gradients",
        told=told.append,
        **options,
    )
    assert told.count(1) == 2  # ridges
    assert set(told) == set(range(1, max(told) + 1))
    np.testing.assert_allclose(found.tables, exact.tables, rtol=0, atol=3e-5)
    np.testing.assert_allclose(found.bias, exact.bias, rtol=0, atol=3e-5)
    assert 0 < found.iterations <= 40 and found.residual < 3e-6
    stopped = memorise.fit_tables(
        parts(seen), observations(50, 1), C, solver="gradients", max_iterations=1,
        ridges=[1e-2],
    )  # fmt: skip
    assert stopped.iterations == 1 and stopped.residual > 1e-4


def test_the_ridge_is_that_of_the_held_out_tokens():
    """Noise is best not fitted at all, and each smaller ridge leaves more: two are tried.

    Mutations: `max` for `min`; the fitted tokens for those held out; no end at the second.
    """
    result = memorise.fit_tables([observations(40)], observations(4000, 1), C)
    tried = result.unexplained_by_ridge
    assert list(tried) == [1e-1, 1e-2]
    assert result.ridge == max(fit.RIDGES) == min(tried, key=tried.get)
    assert result.unexplained == tried[result.ridge] > 1


def test_rows_that_no_token_reads():
    """The mean of rows one bit away, by how often they are read; else of the table.

    Mutations: the weights left out; two bits away; rows that were read filled as well.
    """
    tables = np.arange(16.0).reshape(1, 8, 2) + 1
    counts = np.array([[4, 1, 3, 0, 0, 0, 0, 0]])
    filled = fit.fill_unread(tables, counts)[0]
    np.testing.assert_array_equal(filled[:3], tables[0, :3])
    np.testing.assert_allclose(filled[3], (1 * tables[0, 1] + 3 * tables[0, 2]) / 4)
    np.testing.assert_allclose(filled[4], tables[0, 0])  # 5 and 6 are not read
    whole = (4 * tables[0, 0] + tables[0, 1] + 3 * tables[0, 2]) / 8
    np.testing.assert_allclose(filled[7], whole)  # neither 3, 5 nor 6 is read
    seen = observations(200, unread=(2,))
    result = memorise.fit_tables([seen], observations(50, 1), C)
    assert result.unread_rows == 0.25
    near = result.tables[:, [0, 3]]
    assert (result.tables[:, 2] >= near.min(1)).all()
    assert (result.tables[:, 2] <= near.max(1)).all()


@pytest.mark.parametrize(
    "score, expected",
    [
        ("constant", 1 - 2 / math.pi),
        ("l1", 1 - (1 + 7 * 2 / math.pi) / 8),  # .318
    ],
)
def test_white_inputs_and_a_linear_map(score, expected):
    """What a sign says of a Gaussian value, and its size of the others. No training.

    Mutation: the score left out of the design.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120_000, 16))
    y = x @ rng.normal(size=(16, 3))
    z = x.reshape(len(x), 2, 8)
    codes = ((z >= 0) << np.arange(8)).sum(-1)
    scores = np.abs(z).sum(-1) if score == "l1" else np.ones(codes.shape)
    first, held_out = np.split(np.arange(len(x)), [100_000])
    seen, others = (
        memorise.Observations(codes[i], scores[i], y[i]) for i in (first, held_out)
    )
    result = memorise.fit_tables([seen], others, 256)
    assert result.unexplained == pytest.approx(expected, abs=6e-3)


def test_no_token_is_refused():
    with pytest.raises(errors.ConfigError, match="no token to fit tables to"):
        memorise.fit_tables([], observations(5), C)
