"""Weights that are only read: narrow, laid out for decoding, and without gradients.

    kind        tables [K, C, ..]             matrix [D, V], stored by output as [V, D]
    float32     as they are                   as it is
    bfloat16    rounded                       rounded
    int8        a scale for each row          a scale for each output
    int4        -                             a scale for 64 weights of an output

A scale is the largest magnitude over 127 (7 for int4), so an entry moves by at most half of
it. On CPU the native code reads both, a memory layer in one call with its hash and scores;
elsewhere, and where it cannot be built, they are widened in XLA. Start at `pack_tables` and
`pack_matrix`, then `memory_layer` and `product`.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.notation import AnyArray, Array, Float, Int
from memoryformer.ops import hashing, lookup
from memoryformer.ops.lookup import native as lookup_native

TABLE_KINDS = ("float32", "bfloat16", "int8")
MATRIX_KINDS = (*TABLE_KINDS, "int4")
# Above this, widening a matrix once and multiplying with it costs less than reading it for
# every four vectors.
MAX_VECTORS = 32
_HUGE_PAGE = 2 << 20
T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTables:
    """Tables [K, C, ..] of float32, bfloat16 or int8; scales [K, C] of int8, else None."""

    values: AnyArray
    scales: AnyArray | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix [D, V] by output: values [V, D] (int4: [V, D' / 2], D' = D padded to 64s)."""

    values: AnyArray
    scales: AnyArray | None  # int8: [V]; int4: [V, D' / 64]
    width: int = dataclasses.field(metadata={"static": True})  # D


def round_rows(
    rows: Float[np.ndarray, "*B F"], largest: int = 127
) -> tuple[Int[np.ndarray, "*B F"], Float[np.ndarray, "*B"]]:
    """Round rows [.., F] to int8 in [-largest, largest], times one float32 scale a row [..].

    rows ~ values * scales[.., None], off by at most half a scale; a row of zeros has scale 0.
    Exports hold these values too (`convert.export`), and `convert.reference_reader` reads them.
    """
    scales = np.abs(rows).max(axis=-1, initial=0).astype(np.float32)
    scales = scales / np.float32(largest)
    # A row of zeros stays 0 whatever it is divided by.
    divisors = np.where(scales > 0, scales, np.float32(1))[..., None]
    values = np.clip(np.rint(rows / divisors), -largest, largest)
    return values.astype(np.int8), scales


def pack_tables(tables: np.ndarray, kind: str) -> PackedTables:
    """Store tables as one of `TABLE_KINDS`."""
    tables = np.asarray(tables)
    if kind != "int8":
        return PackedTables(tables.astype(jnp.dtype(kind)), None)
    rows = tables.reshape(*tables.shape[:2], -1)
    values, scales = round_rows(rows)
    return PackedTables(values.reshape(tables.shape), scales)


def pack_matrix(matrix: Float[np.ndarray, "D V"], kind: str) -> PackedMatrix:
    """Store a matrix by output, as one of `MATRIX_KINDS`."""
    by_output = np.ascontiguousarray(np.asarray(matrix).T)
    num_outputs, width = by_output.shape
    if kind == "int8":
        return PackedMatrix(*round_rows(by_output), width)
    if kind != "int4":
        return PackedMatrix(by_output.astype(jnp.dtype(kind)), None, width)
    group = lookup_native.INT4_GROUP
    by_output = np.pad(by_output, ((0, 0), (0, -width % group)))
    values, scales = round_rows(by_output.reshape(num_outputs, -1, group), 7)
    low, high = np.split((values + 8).astype(np.uint8), 2, axis=-1)  # [V, D' / 64, 32]
    return PackedMatrix((low | high << 4).reshape(num_outputs, -1), scales, width)


def widen_tables(tables: PackedTables) -> Array:
    """Return float32 tables [K, C, ..]."""
    values = jnp.asarray(tables.values, jnp.float32)
    if tables.scales is None:
        return values
    return values * tables.scales.reshape(
        *tables.scales.shape, *(1,) * (values.ndim - 2)
    )


def widen_matrix(matrix: PackedMatrix) -> Float[Array, "D V"]:
    """Return the float32 matrix."""
    values = jnp.asarray(matrix.values)
    scales = matrix.scales
    if scales is None:
        return values.astype(jnp.float32).T
    if values.dtype != jnp.uint8:
        return (values.astype(jnp.float32) * scales[:, None]).T
    half = lookup_native.INT4_GROUP // 2
    pairs = values.reshape(values.shape[0], -1, half).astype(jnp.int32)
    whole = jnp.concatenate([pairs & 15, pairs >> 4], axis=-1) - 8
    wide = whole.astype(jnp.float32) * scales[..., None]
    return wide.reshape(values.shape[0], -1)[:, : matrix.width].T


def memory_layer(
    x: Float[AnyArray, "*B D"],
    tables: PackedTables,
    bias: AnyArray | None,
    score: str,
    temperature: float,
    learned: hashing.Learned | None = None,
    rows_read: int = 1,
) -> Float[Array, "*B F"]:
    """Compute y = sum_k s(z_k) T_k[h(z_k)] + b: [.., D] -> [.., F], axes after C joined."""
    num_tables, num_buckets = tables.values.shape[:2]
    values = tables.values.reshape(num_tables, num_buckets, -1)
    rows = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.reshape(-1)
    power, beta, gamma = hashing.constants(score, temperature, learned)

    def native(x, values, scales, bias):
        knobs = power, beta, gamma, rows_read
        return lookup_native.memory_layer(x, values, scales, bias, *knobs)

    def in_xla(x, values, scales, bias):
        chunks = hashing.split_chunks(x, num_buckets.bit_length() - 1)
        codes, scores = hashing.addresses(
            chunks, score, temperature, learned, rows_read
        )
        if scales is not None:  # the row's scale goes with its score
            scores = scores * _scales_of(scales, codes)
        y = lookup.lookup(values, codes, scores, "xla")
        y = y if rows_read == 1 else jnp.sum(y, axis=0)
        return y if bias is None else y + bias[None]

    function = on_cpu(native, in_xla) if power in lookup_native.POWERS else in_xla
    operands = (rows, values, tables.scales, bias)
    y = function(*jax.tree.map(jnp.asarray, operands))
    return y.reshape(*x.shape[:-1], -1)


def _scales_of(scales, codes):
    """The scales [K, C] of the rows that codes [.., K] read: [.., K]."""
    tables = jnp.arange(scales.shape[0]).reshape((1,) * (codes.ndim - 1) + (-1,))
    return scales[tables, codes]


def product(x: Float[AnyArray, "*B D"], matrix: PackedMatrix) -> Float[Array, "*B V"]:
    """Multiply x with a packed matrix: [.., D] -> float32 [.., V]."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)

    def native(x, values, scales):
        padding = values.shape[1] * (2 if values.dtype == jnp.uint8 else 1) - x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, padding)))
        return lookup_native.matrix_product(x, values, scales)

    def in_xla(x, values, scales):
        return x @ widen_matrix(PackedMatrix(values, scales, matrix.width))

    few = rows.shape[0] <= MAX_VECTORS
    function = on_cpu(native, in_xla) if few else in_xla
    operands = (rows, matrix.values, matrix.scales)
    y = function(*jax.tree.map(jnp.asarray, operands))
    return y.reshape(*x.shape[:-1], -1)


def first_largest(y: Float[AnyArray, "*B V"]) -> Int[Array, "*B"]:
    """The argmax of float32 values: the first of equal ones, NaN before all numbers.

    XLA's own on a CPU takes as long for 50,000 values as a read of 10 MB.
    """

    def native(y):
        places = jax.ShapeDtypeStruct(y.shape[:-1], jnp.int32)
        call = lookup_native.ffi_call(
            "first_largest", places, vmap_method="broadcast_all"
        )
        return call(y)

    def in_xla(y):
        return jnp.argmax(y, axis=-1).astype(jnp.int32)

    usable = y.size and y.dtype == jnp.float32
    return (on_cpu(native, in_xla) if usable else in_xla)(y)


def in_huge_pages(array: AnyArray) -> Array:
    """Copy an array to memory that asks for huge pages; small ones are left as they are.

    Random rows are read four times as fast from them: a row then costs no walk of the page
    tables. On other platforms than CPU: the array on the default device.
    """
    array = np.asarray(array)
    if jax.default_backend() != "cpu" or array.nbytes < 2 * _HUGE_PAGE:
        return jnp.asarray(array)
    # numpy advises huge pages for large arrays (NUMPY_MADVISE_HUGEPAGE); this one begins
    # at a page's border, and `device_put` takes it over without a copy.
    memory = np.empty(array.nbytes + _HUGE_PAGE, np.int8)
    start = -memory.ctypes.data % _HUGE_PAGE
    aligned = memory[start : start + array.nbytes]
    aligned[...] = np.ascontiguousarray(array).reshape(-1).view(np.int8)
    return jax.device_put(aligned.view(array.dtype).reshape(array.shape))


def on_cpu(native: Callable[..., T], in_xla: Callable[..., T]) -> Callable[..., T]:
    """Return `native` where it is built and runs, `in_xla` elsewhere."""
    if jax.default_backend() != "cpu" or not lookup_native.available():
        return in_xla

    def run(*operands):
        return jax.lax.platform_dependent(*operands, cpu=native, default=in_xla)

    return run
