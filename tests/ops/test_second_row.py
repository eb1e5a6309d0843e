"""The second row of each table: across the least certain bit, weighed by its probability."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from memoryformer.ops import hashing, lookup
from memoryformer.ops.lookup import narrow as narrow_rows
from memoryformer.ops.lookup import native as lookup_native

# The learned score has every number that the others fix.
WITH_ROWS = [
    pytest.param(name, marks=() if name == "learned" else pytest.mark.slow)
    for name in hashing.SCORES
    if hashing.has_probability(name)
]
TRAINED = (1.7, 0.6)


def operands(dtype=np.float64, shape=(6, 3, 4, 5)):
    """x [N, K tau], tables [K, C, F], bias [F], dy [N, F]."""
    n, k, bits, features = shape
    rng = np.random.default_rng(0)
    sizes = ((n, k * bits), (k, 1 << bits, features), (features,), (n, features))
    return [rng.normal(size=size).astype(dtype) for size in sizes]


def definition(kind):
    def function(x, tables, bias, beta, gamma):
        knobs = float(beta), float(gamma)
        return oracle.memory_layer(x, tables, bias, kind, 0.8, *knobs, rows_read=2)

    return function


@pytest.mark.parametrize("kind", WITH_ROWS)
def test_two_rows_and_all_gradients_in_float64(kind):
    """Against the oracle, which ranks buckets by a softmax over all, and its differences.

    Mutations: the most certain bit flipped; `code_bits - least`; gamma left out of the second
    weight; the sum over rows left out; no gradient through the smallest magnitude.
    """
    x, tables, bias, dy = operands()
    arguments = (x, tables, bias, *map(np.float64, TRAINED))
    with jax.enable_x64(True):

        def layer(x, tables, bias, *learned):
            return lookup.memory_layer(x, tables, bias, kind, 0.8, "xla", learned, 2)

        y, pullback = jax.vjp(layer, *map(jnp.asarray, arguments))
        gradients = pullback(jnp.asarray(dy))
    np.testing.assert_allclose(y, definition(kind)(*arguments), rtol=1e-10)
    read = np.flatnonzero(np.abs(gradients[1]).sum(axis=-1))[:9] * 5 + 2
    indices = [range(0, 72, 5), [*read, 3], range(5), [0], [0]]
    differences = oracle.central_differences(definition(kind), arguments, dy, indices)
    for got, where, expected in zip(gradients, indices, differences, strict=True):
        got = np.ravel(got)[list(where)]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(not lookup_native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("kind", WITH_ROWS)
def test_the_native_layer_and_the_native_lookup(kind):
    """One call for decoding, of float32 and int8 rows, and the lookup with its gradients.

    Mutations: `least` never moved in `HashToken`; the second rows' sums left out; `second`
    of K in place of N K; int8 scales of the first row for both.
    """
    learned = tuple(map(jnp.float32, TRAINED)) if kind == "learned" else None
    for shape in ((1, 40, 8, 96), (17, 7, 5, 33)):
        x, tables, bias, dy = operands(np.float32, shape)
        wanted = definition(kind)(x, tables, bias, *TRAINED)
        packed = narrow_rows.pack_tables(tables, "float32")
        close(narrow_rows.memory_layer(x, packed, bias, kind, 0.8, learned, 2), wanted)
        packed = narrow_rows.pack_tables(tables, "int8")
        whole = np.asarray(narrow_rows.widen_tables(packed))
        wanted = definition(kind)(x, whole, bias, *TRAINED)
        close(narrow_rows.memory_layer(x, packed, bias, kind, 0.8, learned, 2), wanted)

    def gradients(implementation):
        def layer(x, tables):
            knobs = kind, 0.8, implementation, learned, 2
            return lookup.memory_layer(x, tables, None, *knobs)

        return jax.vjp(layer, jnp.asarray(x), jnp.asarray(tables))[1](jnp.asarray(dy))

    for native, xla in zip(gradients("native"), gradients("xla"), strict=True):
        close(native, xla, 1e-5)


def close(got, wanted, tolerance=2e-6):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert np.abs(got - wanted).max() < tolerance * np.abs(wanted).max()


def test_the_layer_does_not_jump_where_a_bit_flips():
    """On either side of zero both buckets are read, with equal weights: the layer with one row
    jumps there, this one does not. Mutation: the second weight without its exponential.
    """
    x, tables, *_ = operands(np.float32)
    x[:, 5] = np.array([-1e-6, 1e-6] * 3)
    x[1::2] = np.where(np.arange(12) == 5, x[1::2], x[::2])
    for rows, largest in ((1, np.inf), (2, 1e-4)):
        y = np.asarray(lookup.memory_layer(jnp.asarray(x), tables, rows_read=rows))
        jump = np.abs(y[1::2] - y[::2]).max()
        assert jump < largest and (rows == 2 or jump > 0.05)
