"""Products of integers: exact sums, the same in every instruction set and in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoryformer.ops.lookup import integer, narrow
from memoryformer.ops.lookup import native as lookup_native

needs_compiler = pytest.mark.skipif(
    not lookup_native.available(), reason="no C++ compiler"
)
GROUP = 64  # 4-bit weights that share a scale


@pytest.fixture(autouse=True)
def default_settings():
    yield
    if lookup_native.available():
        lookup_native.configure()


def rounded(rows, largest):
    """The rule: to nearest, ties to even, times max |x| / largest in float32."""
    scales = np.abs(rows).max(-1, initial=0).astype(np.float32) / np.float32(largest)
    divisors = np.where(scales > 0, scales, np.float32(1))[..., None]
    values = np.clip(np.rint(rows / divisors), -largest, largest)
    return values.astype(np.int64), scales


def expected(x, matrix, kind):
    """The definition in integers and, where it says so, single roundings to float32."""
    q, of_x = rounded(x, 127)
    by_output = np.ascontiguousarray(matrix.T)
    if kind == "w8a8":
        w, of_w = rounded(by_output, 127)
        sums = q @ w.T
        assert np.abs(sums).max(initial=0) < 2**31
        return (sums.astype(np.float32) * of_w[None]) * of_x[:, None]
    padding = ((0, 0), (0, -matrix.shape[0] % GROUP))
    w, of_w = rounded(np.pad(by_output, padding).reshape(matrix.shape[1], -1, GROUP), 7)
    q = np.pad(q, padding).reshape(len(x), -1, GROUP)
    y = np.zeros((len(x), matrix.shape[1]), np.float32)
    for g in range(
        q.shape[1]
    ):  # rounded once a group: float64 holds the product exactly
        sums = (q[:, g] @ w[:, g].T).astype(np.float64)
        y = (sums * of_w[None, :, g].astype(np.float64) + y).astype(np.float32)
    return y * of_x[:, None]


SHAPES = [
    (1, 64, 16),
    (1, 5, 3),
    (3, 100, 7),
    (9, 300, 130),
    (16, 64, 33),
    (21, 72, 50),
]


@needs_compiler
@pytest.mark.parametrize("instructions", lookup_native.INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", integer.KINDS)
def test_products_equal_numpy_bit_for_bit(kind, instructions):
    """Ragged shapes, 1 to 21 vectors. Mutations: the last tile, quad or vector left out; the
    halves of a byte exchanged; an offset of 127 for 128; `_mm256_maddubs` of offset weights,
    which saturates; a scale of the first group for all."""
    lookup_native.configure(instruction_set=instructions)
    random = np.random.default_rng(0)
    for count, width, outputs in SHAPES:
        x = random.standard_normal((count, width), np.float32)
        x[0] *= 0
        matrix = random.standard_normal((width, outputs), np.float32)
        matrix[:, outputs // 2] = 0
        got = integer.product(x, integer.pack(matrix, kind))
        wanted = expected(x, matrix, kind)
        np.testing.assert_array_equal(got, wanted, f"{count, width, outputs}")


@needs_compiler
@pytest.mark.parametrize("instructions", lookup_native.INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", integer.KINDS)
def test_the_largest_sums_do_not_overflow(kind, instructions):
    """127 * 127 * 2^17 and its negative, of 32 bits. Mutation: sums of pairs kept in 16 bits."""
    lookup_native.configure(instruction_set=instructions)
    width = integer.MAX_WIDTH
    matrix = np.ones((width, 3), np.float32)
    matrix[:, 1] = -1
    matrix[::2, 2] = -1
    stored = integer.pack(matrix, kind)
    x = np.ones((2, width), np.float32)
    x[1] = -1
    y = np.asarray(integer.product(x, stored))
    np.testing.assert_allclose(y[:, :2], [[width, -width], [-width, width]], rtol=1e-6)
    np.testing.assert_array_equal(y[:, 2], [0, 0])
    with pytest.raises(ValueError, match=f"at most {width} inputs, not {width + 1}"):
        integer.pack(np.ones((width + 1, 1), np.float32), kind)


@pytest.mark.parametrize("kind", integer.KINDS)
def test_in_xla_too(kind, monkeypatch):
    """The definition for other platforms. Mutations: any of its scales left out."""
    random = np.random.default_rng(1)
    x = random.standard_normal((2, 3, 70), np.float32)
    matrix = random.standard_normal((70, 20), np.float32)
    monkeypatch.setattr(lookup_native, "available", lambda: False)
    got = jax.jit(integer.product)(x, integer.pack(matrix, kind)).reshape(6, 20)
    wanted = expected(x.reshape(6, 70), matrix, kind)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_nothing_depends_on_batch_or_threads():
    """Mutation: a scale of activations for the batch, not for each vector."""
    random = np.random.default_rng(0)
    x = random.standard_normal((19, 192), np.float32)
    for kind in integer.KINDS:
        stored = integer.pack(random.standard_normal((192, 50), np.float32), kind)
        whole = np.asarray(integer.product(x, stored))
        for threads in (1, 3):
            lookup_native.configure(num_threads=threads)
            for n in (0, 7, 18):
                alone = integer.product(x[n : n + 1], stored)
                np.testing.assert_array_equal(alone[0], whole[n])


@pytest.mark.parametrize("built", [True, False])
def test_what_is_not_a_number_stays_so(built, monkeypatch):
    """In its vector only. Mutation: NaN rounded to zero."""
    if not built:
        monkeypatch.setattr(lookup_native, "available", lambda: False)
    x = np.ones((3, 8), np.float32)
    x[1, 3], x[2, 5] = np.nan, np.inf
    y = np.asarray(
        integer.product(x, integer.pack(np.ones((8, 2), np.float32), "w8a8"))
    )
    np.testing.assert_array_equal(np.isnan(y), [[False] * 2, [True] * 2, [True] * 2])


def test_activations_are_rounded_as_rows_are():
    """Mutation: floor for round."""
    x = np.random.default_rng(0).standard_normal((4, 33), np.float32)
    for got, wanted in zip(
        integer.round_activations(jnp.asarray(x)), narrow.round_rows(x), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_activations_of_any_size_are_rounded_by_their_largest():
    """Tiny, huge and none. Mutations: 1 for 0 as the smallest maximum; 128; half of them cut."""
    x = np.array([[1.1e-6, -2e-6, 1.5e-6], [1e20, -3e20, 0], [0, 0, 0]], np.float32)
    values, scales = integer.round_activations(jnp.asarray(x))
    np.testing.assert_array_equal(values, [[70, -127, 95], [42, -127, 0], [0, 0, 0]])
    wanted = np.abs(x).max(axis=1) / np.float32(127)
    np.testing.assert_allclose(scales, wanted, rtol=1e-6)
    values, scales = integer.round_activations(jnp.zeros((2, 0), jnp.float32))
    assert values.shape == (2, 0) and not np.any(scales)


def test_where_each_weight_lies():
    """By hand: sixteen rows side by side, four columns of each; two of 4 bits in a byte.

    Mutations: any number of `tiled`, `to_tiles` or `pack`.
    """
    rows = np.arange(32 * 8, dtype=np.uint8).reshape(32, 8)
    tiles = integer.tiled(rows)
    assert tiles.shape == (2, 2, 16, 4) and tiles.flags.c_contiguous
    for v, d in np.ndindex(32, 8):
        assert tiles[v // 16, d // 4, v % 16, d % 4] == rows[v, d]
    signed = np.array([[-127, 0, 1, 127]] * 16, np.int8)
    assert integer.to_tiles(signed)[0, 0, 0].tolist() == [1, 128, 129, 255]
    random = np.random.default_rng(0)
    matrix = random.standard_normal((70, 20), np.float32)
    for kind, shapes in (
        ("w8a8", ((2, 18, 16, 4), (2, 16))),
        ("w4a8", ((2, 16, 16, 4), (2, 2, 16))),
    ):
        stored = integer.pack(matrix, kind)
        assert (stored.tiles.shape, stored.scales.shape) == shapes
        assert (stored.width, stored.outputs) == (70, 20)
        assert stored.four_bits == (kind == "w4a8")
    weights, scales = rounded(np.pad(matrix.T, ((0, 0), (0, 58))).reshape(20, 2, 64), 7)
    for v, d in ((0, 0), (3, 5), (19, 69), (7, 64)):
        byte = stored.tiles[v // 16, d // 8, v % 16, d % 4]
        half = byte >> 4 if d % 8 >= 4 else byte & 15
        assert int(half) - 8 == weights[v].reshape(-1)[d]
        assert stored.scales[v // 16, d // 64, v % 16] == scales[v, d // 64]
