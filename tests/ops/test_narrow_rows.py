"""Weights that are only read: what rounding costs, and the same numbers however computed."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P

from memoryformer.ops import hashing
from memoryformer.ops.lookup import narrow as narrow_rows
from memoryformer.ops.lookup import native as lookup_native

needs_compiler = pytest.mark.skipif(
    not lookup_native.available(), reason="no C++ compiler"
)
SCORES = tuple(hashing.SCORES)


@pytest.fixture(autouse=True)
def default_settings():
    yield
    if lookup_native.available():
        lookup_native.configure()


def layer(num_tokens, num_tables, code_bits, features, seed=0):
    """x with exact zeros of both signs, tables and a bias."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((num_tokens, num_tables * code_bits)).astype(np.float32)
    x[random.random(x.shape) < 0.05] = 0.0
    x[random.random(x.shape) < 0.05] = -0.0
    tables = random.standard_normal((num_tables, 1 << code_bits, features))
    return x, tables.astype(np.float32), random.standard_normal(features, np.float32)


def expected_layer(x, tables, bias, score, temperature=1.0, learned=(2.0, 1.0)):
    """The definition in float64."""
    tables = np.asarray(tables, np.float64)
    return oracle.memory_layer(x, tables, bias, score, temperature, *learned)


def error(got, wanted):
    return np.abs(np.asarray(got, np.float64) - wanted).max() / np.abs(wanted).max()


SHAPES = [(1, 1, 1, 1), (1, 40, 8, 96), (3, 33, 5, 70), (17, 7, 10, 33), (300, 4, 2, 5)]


@needs_compiler
@pytest.mark.parametrize("instructions", lookup_native.INSTRUCTION_SETS)
@pytest.mark.parametrize("score", SCORES)
def test_a_layer_in_one_call_equals_its_definition(score, instructions):
    """Ragged shapes, every score. Red if `Confidence` forgets the factors after the last
    eight, if OnePlusExp skips its tail, or if the bias is added to the first token only."""
    lookup_native.configure(instruction_set=instructions)
    trained = (1.7, 0.6)
    learned = tuple(map(jnp.float32, trained)) if score == "learned" else None
    for i, shape in enumerate(SHAPES):
        x, tables, bias = layer(*shape, seed=i)
        tables = narrow_rows.pack_tables(tables, "float32")
        y = narrow_rows.memory_layer(x, tables, bias, score, 1.3, learned)
        wanted = expected_layer(x, tables.values, bias, score, 1.3, trained)
        assert error(y, wanted) < 2e-6, shape


@needs_compiler
@pytest.mark.parametrize("instructions", lookup_native.INSTRUCTION_SETS)
@pytest.mark.parametrize("code_bits", [1, 3, 8, 11, 16])
def test_codes_are_the_references_bit_for_bit(code_bits, instructions):
    """A table whose row c holds c tells which row was read. Red if zero or minus zero is
    not a set bit, NaN is one, or the first value of a chunk is the low bit."""
    lookup_native.configure(instruction_set=instructions)
    random = np.random.default_rng(code_bits)
    x = random.standard_normal((200, 3 * code_bits)).astype(np.float32)
    special = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45]
    chosen = random.random(x.shape) < 0.3
    x[chosen] = random.choice(np.array(special, np.float32), chosen.sum())
    codes = hashing.hash_codes(hashing.split_chunks(jnp.asarray(x), code_bits))
    rows = np.zeros((3, 1 << code_bits, 3), np.float32)
    for k in range(3):
        rows[k, :, k] = np.arange(1 << code_bits)
    tables = narrow_rows.pack_tables(rows, "float32")
    read = narrow_rows.memory_layer(x, tables, None, "constant", 1.0)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(codes, np.float32))


@needs_compiler
def test_extreme_scores():
    """Huge, tiny and infinite values as in the reference, a negative trained beta too.
    Red if exp's argument is not clamped."""
    values = [0, 1e-30, 1e-3, 20, 80, 88, 200, 1e30, np.inf, -np.inf, np.nan]
    x = np.repeat(np.array(values, np.float32)[:, None], 4, axis=1)
    tables = narrow_rows.pack_tables(np.ones((1, 16, 1), np.float32), "float32")
    for score, learned in (
        ("softmax", None),
        ("l1_softmax", None),
        ("learned", (-1, 1)),
    ):
        learned = learned and tuple(map(jnp.float32, learned))
        chunks = jnp.asarray(x)[:, None]
        wanted = hashing.scores(chunks, score, 1.0, learned)
        got = narrow_rows.memory_layer(x, tables, None, score, 1.0, learned)
        np.testing.assert_allclose(got, wanted, rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("kind", narrow_rows.MATRIX_KINDS)
@pytest.mark.parametrize("width, outputs", [(64, 10), (100, 7), (5, 3), (300, 130)])
def test_products_equal_their_stored_weights(width, outputs, kind):
    """Against float64 and the weights as stored, 1 to 9 vectors and more. Red if the last
    outputs, the last columns or the odd vectors are skipped, or nibbles swapped."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((width, outputs)).astype(np.float32)
    stored = narrow_rows.pack_matrix(matrix, kind)
    wide = np.asarray(narrow_rows.widen_matrix(stored), np.float64)
    for count in (1, 3, 4, 9, narrow_rows.MAX_VECTORS + 1):
        x = random.standard_normal((count, width)).astype(np.float32)
        assert error(narrow_rows.product(x, stored), x.astype(np.float64) @ wide) < 2e-6
    bound = {"float32": 0, "bfloat16": 2**-8, "int8": 0.5 / 127, "int4": 0.5 / 7}[kind]
    largest = np.abs(matrix).max(axis=0)
    assert (np.abs(wide - matrix) <= 1.0001 * bound * largest).all()


def test_int8_layers_err_no_more_than_their_rows_may():
    """|y8 - y| <= sum_k s(z_k) max|row k| / 254. Red if a scale belongs to a table and not
    to a row, or is rounded down so that the largest entry is clipped."""
    x, tables, bias = layer(50, 16, 8, 60)
    tables *= (
        np.random.default_rng(1).uniform(0.01, 10, (16, 256, 1)).astype(np.float32)
    )
    stored = narrow_rows.pack_tables(tables, "int8")
    y = narrow_rows.memory_layer(x, stored, bias, "l1_softmax", 1.0)
    wanted = expected_layer(x, tables, bias, "l1_softmax")
    largest = np.repeat(np.abs(tables).max(-1, keepdims=True), 60, axis=-1)
    bound = expected_layer(x, largest / 254, 0, "l1_softmax")
    assert (np.abs(np.asarray(y) - wanted) <= 1.001 * bound + 1e-5).all()


def test_rows_of_zeros_and_packing_again():
    """Zeros stay zeros; what was rounded rounds to itself. Red if 0 is divided by 0."""
    tables = np.zeros((2, 4, 8), np.float32)
    tables[0, 1] = np.linspace(-3, 1, 8)
    once = np.asarray(narrow_rows.widen_tables(narrow_rows.pack_tables(tables, "int8")))
    assert not once[1].any() and np.isfinite(once).all()
    twice = np.asarray(narrow_rows.widen_tables(narrow_rows.pack_tables(once, "int8")))
    np.testing.assert_allclose(twice, once, rtol=1e-6)
    matrix = narrow_rows.pack_matrix(np.zeros((64, 2), np.float32), "int4")
    assert not np.asarray(narrow_rows.widen_matrix(matrix)).any()


@needs_compiler
def test_nothing_depends_on_threads_or_batch():
    """Red if the vectors of four tokens are summed in another order than those of one."""
    random = np.random.default_rng(0)
    x = random.standard_normal((9, 192)).astype(np.float32)
    for kind in narrow_rows.MATRIX_KINDS:
        matrix = narrow_rows.pack_matrix(random.standard_normal((192, 50)), kind)
        whole = np.asarray(narrow_rows.product(x, matrix))
        for num_threads in (1, 3):
            lookup_native.configure(num_threads=num_threads)
            for n in range(9):
                alone = narrow_rows.product(x[n : n + 1], matrix)
                np.testing.assert_array_equal(alone[0], whole[n])


@needs_compiler
def test_inside_jit_vmap_and_shard_map(monkeypatch):
    """Red if vmap_method is not 'sequential', or if only the first device's part is read."""
    x, tables, bias = layer(16, 6, 4, 40)
    stored = narrow_rows.pack_tables(tables, "int8")
    matrix = narrow_rows.pack_matrix(tables.reshape(24, -1)[:, :77], "int8")

    def both(x):
        y = narrow_rows.memory_layer(x, stored, bias, "softmax", 1.0)
        return y, narrow_rows.product(x, matrix)

    whole = both(x)
    mapped = jax.jit(jax.vmap(both))(x.reshape(4, 4, -1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(
        jax.shard_map(
            both, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
        )
    )(x)
    monkeypatch.setattr(lookup_native, "available", lambda: False)
    in_xla = both(x)
    for one, two, three, four in zip(whole, mapped, sharded, in_xla, strict=True):
        np.testing.assert_array_equal(two.reshape(one.shape), one)
        np.testing.assert_array_equal(three, one)
        np.testing.assert_allclose(four, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8"])
def test_huge_pages_change_no_value(dtype):
    """Small arrays, large ones, of a size that ends inside a page. Red if the copy begins
    before the border or the type is lost."""
    for size in (10, (5 << 20) + 3):
        array = np.arange(size).astype(np.uint8).astype(jnp.dtype(dtype))
        got = narrow_rows.in_huge_pages(array)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(got), array)


def test_many_vectors_are_multiplied_in_xla(monkeypatch):
    """From 33 on; elsewhere than on CPU always. Mutations: `<` for `<=`; 33 for 32."""
    offered = []

    def on_cpu(native, in_xla):
        offered.append(native)
        return in_xla

    whole = narrow_rows.on_cpu
    monkeypatch.setattr(narrow_rows, "on_cpu", on_cpu)
    matrix = narrow_rows.pack_matrix(np.ones((4, 2), np.float32), "float32")
    for count, offers in ((32, 1), (33, 1), (1, 2)):
        y = narrow_rows.product(np.ones((count, 4), np.float32), matrix)
        np.testing.assert_array_equal(y, np.full((count, 2), 4.0))
        assert len(offered) == offers
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(lookup_native, "available", lambda: True)
    assert whole(min, max) is max
    large = np.zeros(5 << 20, np.int8)
    monkeypatch.setattr(jax, "device_put", None)
    assert narrow_rows.in_huge_pages(large).shape == large.shape


def test_huge_pages_begin_at_their_borders():
    """From two pages on, where a page is 2 MB. Mutations: 3 for 2; 21 for 20; any sign."""
    page = 2 << 20
    for size in (2 * page, 2 * page + 64):
        got = narrow_rows.in_huge_pages(np.zeros(size, np.int8))
        assert got.unsafe_buffer_pointer() % page == 0
