"""Codes and scores: the released code's, the definition's, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from released import CASES, golden

from memoryformer.ops import hashing

BETA, GAMMA = 1.3, 0.7


def chunks_of(case):
    code_bits = golden(case, "tables").shape[1].bit_length() - 1
    return hashing.split_chunks(jnp.asarray(golden(case, "x")), code_bits)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_released_codes_and_scores(case):
    """The released code's codes bit for bit, its scores within 1e-5.

    Mutations: `>` for `>=` (ties), reversed bit weights, `power` 0 for l1_softmax.
    """
    codes = hashing.hash_codes(chunks_of(case))
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, golden(case, "codes"))
    np.testing.assert_allclose(
        hashing.scores(chunks_of(case), "l1_softmax"),
        golden(case, "scores"),
        rtol=1e-5,
        atol=0,
    )


def test_high_bit_first_and_zero_is_a_set_bit():
    """Mutations: `>` for `>=`; bit weights ascending."""
    chunks = jnp.asarray(
        [[1, -1, -1], [-1, -1, 1], [0, -1, -1], [-0.0, 0, 0], [-1, -1, -1e-30]],
        jnp.float32,
    )
    assert hashing.hash_codes(chunks).tolist() == [4, 1, 4, 7, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_of_sixteen_bits_are_exact(dtype):
    """Every one of the 65,536 codes, from bfloat16 too, compiled and not.

    Mutation: the bits and their weights in the dtype of the chunks.
    """
    chunks = jnp.asarray(oracle.patterns(16), dtype)
    for function in (hashing.hash_codes, jax.jit(hashing.hash_codes)):
        np.testing.assert_array_equal(function(chunks), np.arange(1 << 16))


@pytest.mark.parametrize("code_bits", [1, 4, 8])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_softmax_score_is_the_probability_of_the_bucket(code_bits, temperature):
    """p(z) of a softmax over all 2^tau buckets, Eqs. 8-10.

    Mutation: `beta = 1 / temperature`.
    """
    chunks = normal((50, 3, code_bits))
    chunks[:5, :, 0] = 0
    got = hashing.scores(jnp.asarray(chunks), "softmax", temperature)
    expected = oracle.probability(chunks, temperature)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", hashing.SCORES)
def test_every_score_is_its_definition(kind):
    """Also from bfloat16 chunks, whose scores are float32.

    Mutation: swap the powers of `l1` and `constant`; drop gamma in `_score`.
    """
    for dtype in ("float32", "bfloat16"):
        chunks = jnp.asarray(2 * normal((40, 2, 6), 1), dtype)
        got = hashing.scores(chunks, kind, 0.8, learned=(BETA, GAMMA))
        assert got.dtype == jnp.float32
        wide = np.asarray(chunks, np.float64)
        expected = oracle.scores(wide, kind, 0.8, BETA, GAMMA)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", hashing.SCORES)
def test_gradient_of_every_score(kind):
    """In the chunks, beta and gamma, against float64 central differences.

    Mutations: drop `power` from `slope`; `sigmoid(beta |z|)` for `sigmoid(-beta |z|)`;
    drop `gamma` from `dbeta`.
    """
    chunks = np.random.default_rng(3).normal(size=(5, 2, 4))
    cotangent = np.random.default_rng(4).normal(size=(5, 2))
    arguments = (chunks, np.float64(BETA), np.float64(GAMMA))
    with jax.enable_x64(True):

        def function(chunks, beta, gamma):
            return hashing.scores(chunks, kind, 0.8, learned=(beta, gamma))

        value, pullback = jax.vjp(function, *map(jnp.asarray, arguments))
        assert value.dtype == jnp.float64
        got = pullback(jnp.asarray(cotangent))
    indices = [range(chunks.size), range(1), range(1)]
    expected = oracle.central_differences(
        lambda z, b, g: oracle.scores(z, kind, 0.8, float(b), float(g)),
        arguments,
        cotangent,
        indices,
    )
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.ravel(ours), theirs, rtol=1e-6, atol=1e-8)


def test_learned_score_starts_as_the_released_one():
    """Given or not.

    Mutations: the learned score without ||z||_1; a start at beta = 1.
    """
    chunks = jnp.asarray(normal((20, 3, 8)))
    learned = hashing.scores(chunks, "learned", learned=(2.0, 1.0))
    for start in (learned, hashing.scores(chunks, "learned")):
        np.testing.assert_array_equal(start, hashing.scores(chunks, "l1_softmax"))


@pytest.mark.parametrize("kind", hashing.SCORES)
def test_far_and_zero_chunks_are_finite(kind):
    """Values of 1e4 (p = 1) and a chunk of zeros: no nan, and no gradient at zero.

    Mutation: p as a quotient of exponentials.
    """
    chunks = jnp.stack([jnp.full((8,), 1e4), jnp.full((8,), -1e4), jnp.zeros((8,))])
    learned = (jnp.float32(2), jnp.float32(1))
    value, pullback = jax.vjp(
        lambda z, learned: hashing.scores(z, kind, learned=learned), chunks, learned
    )
    dchunks, _ = pullback(jnp.ones_like(value))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, dchunks)))
    assert not dchunks[2].any()
    if kind == "softmax":
        np.testing.assert_allclose(value, [1, 1, 2.0**-8], rtol=1e-6)


def test_mistakes_are_named():
    """Mutation: `x.shape[-1] // code_bits` for `%`."""
    with pytest.raises(ValueError, match="code_bits=5 does not divide the width 12"):
        hashing.split_chunks(jnp.zeros((2, 12)), 5)
    with pytest.raises(ValueError, match="'softmx': unknown; known: softmax"):
        hashing.scores(jnp.zeros((2, 4)), "softmx")
