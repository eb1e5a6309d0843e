"""The native head equals its definition in float64: nats and gradients, whatever the shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoryformer.ops import head
from memoryformer.ops.lookup import native

pytestmark = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler, no native head"
)
# N, D, V: ragged, one of each, wide, more tokens than a tile, a vocabulary of one panel.
SHAPES = ((7, 5, 13), (1, 1, 1), (3, 300, 40), (200, 20, 67), (97, 33, 32))


@pytest.fixture(autouse=True)
def default_settings():
    yield
    native.configure()


def operands(shape, scale=1.0):
    N, D, V = shape
    rng = np.random.default_rng(0)
    x, kernel = (scale * rng.normal(size=s) for s in ((N, D), (D, V)))
    weights = rng.uniform(0.5, 2.0, N) * (np.arange(N) % 4 != 3)
    return (
        jnp.asarray(x, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
        jnp.asarray(rng.integers(0, V, N), jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def definition(x, kernel, targets, weights):
    """(nats, dx, dkernel) in float64."""
    x, kernel, weights = (np.asarray(a, np.float64) for a in (x, kernel, weights))
    logits = x @ kernel
    logits -= logits.max(axis=1, keepdims=True)
    totals, rows = np.exp(logits).sum(axis=1), np.arange(len(x))
    nats = (weights * (np.log(totals) - logits[rows, targets])).sum()
    dlogits = np.exp(logits) / totals[:, None]
    dlogits[rows, targets] -= 1
    dlogits *= weights[:, None]
    return nats, dlogits @ kernel.T, x.T @ dlogits


def value_and_gradients(x, kernel, targets, weights):
    call = jax.value_and_grad(head.sum_of_nats, argnums=(0, 1))
    nats, (dx, dkernel) = call(x, kernel, targets, weights)
    return nats, dx, dkernel


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("instructions", native.INSTRUCTION_SETS)
def test_equals_the_definition(shape, instructions):
    """Some tokens without weight. Mutations in head_native.h: logits beyond the vocabulary left
    at zero; `weight` of a token left out; `d > 0` or `p > 0` true; `columns` of a whole panel.
    """
    native.configure(instruction_set=instructions)
    given = operands(shape)
    for ours, exact in zip(
        value_and_gradients(*given), definition(*given), strict=True
    ):
        bound = 2e-6 * max(np.abs(exact).max(), 1e-3)
        np.testing.assert_allclose(ours, exact, rtol=2e-6, atol=bound)


def test_logits_beyond_the_range_of_exp():
    """Of hundreds. Mutation: the maximum not subtracted."""
    given = operands((9, 16, 50), scale=5.0)
    for ours, exact in zip(
        value_and_gradients(*given), definition(*given), strict=True
    ):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-4)


def test_nothing_depends_on_the_number_of_threads():
    """To the bit. Mutation: nats added as tiles end."""
    given, found = operands((300, 64, 700)), []
    for threads in (1, 4):
        native.configure(num_threads=threads)
        found.append(value_and_gradients(*given))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_what_is_no_number_is_seen():
    """One token of them: the sum is none either, unless it has no weight.

    Mutation: its probabilities multiplied by the weight 0.
    """
    x, kernel, targets, weights = operands((8, 4, 9))
    bad = x.at[2].set(jnp.nan)
    assert np.isnan(head.sum_of_nats(bad, kernel, targets, weights))
    without = weights.at[2].set(0.0)
    for array in value_and_gradients(bad, kernel, targets, without)[:2]:
        assert np.isfinite(array).all()
