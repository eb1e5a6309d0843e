"""The largest logits of an int8 head without reading most of its rows, and exactly.

    y[v] = s_v sum_d q[v, d] x[d]                           today's int8 head
    u[v] >= y[v],  from 0.31 bytes a weight at D = 1024     every row
    y[v] again     in the same arithmetic                   rows with u[v] >= t

t is the k-th largest y of a few rows with the highest u: no row with a smaller u is among the k
largest, nor equal to one. So the answer is the int8 head's bit for bit, ties included. Why
u[v] >= y[v] stands in `native/screen_native.h`, rounding of floats included. Where too many rows
are left, all are read.

The rows are seen through a matrix B whose first columns hold most of them: the eigenvectors of
sum_v w_v w_v^T, rounded to int8. Nothing else is needed of B than an inverse, so that it may be
rounded and no text is needed to find it. Start at `pack` and `top`.
"""

import ctypes
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.notation import AnyArray, Array, Float, Int
from memoryformer.ops.lookup import integer, narrow
from memoryformer.ops.lookup import native as lookup_native

LEAD = 4  # one column of so many is kept in 8 bits; of the others, norms by block
BLOCK = 16  # columns of a norm
GROUP = 64  # columns that share a scale of activations
MOST_ROWS = 0.4  # a larger share of rows costs more than reading all in order
_UP = 1 + 1e-6  # rounds what is stored as float32 up
_AT_A_TIME = 4096  # rows that are packed together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScreenedMatrix:
    """An int8 matrix [D, V], and what bounds its products.

    exact: the matrix; rotation: B [D, D] by column, int8. tiles: for each 16 outputs, bytes of
    the lead [lead / 4, 16, 4], norms [blocks / 4, 16, 4] and four floats a row (see `_tiles`).
    slack: float32 [1], what rounding of floats adds to a bound, for each unit of |x|.
    """

    exact: narrow.PackedMatrix
    rotation: narrow.PackedMatrix
    tiles: AnyArray
    slack: AnyArray
    lead: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Counts:
    """What `top` has read in this process.

    vectors: seen. rows: read whole, for one of them. whole: vectors for which all rows were
    read. bytes: of tiles, rows and rotation, of a pass shared by vectors once.
    """

    vectors: int
    rows: int
    whole: int
    bytes: int


def pack(matrix: Float[np.ndarray, "D V"]) -> ScreenedMatrix:
    """Store a matrix [D, V] as int8, and what bounds it: 1.3 times the bytes and D^2.

    Raises ValueError for weights that are not finite.
    """
    if not np.isfinite(matrix).all():
        raise ValueError("a matrix to be screened: has weights that are not finite.")
    exact = narrow.pack_matrix(matrix, "int8")
    values, scales = np.asarray(exact.values), np.asarray(exact.scales)
    width = exact.width
    rotation = _rotation(values, scales)
    basis = (rotation.values * rotation.scales[:, None].astype(np.float64)).T  # B
    inverse = np.linalg.inv(basis)
    lead = 4 * -(-width // (4 * LEAD))
    tiles, sizes = [], np.zeros(3)
    for start in range(0, len(values), _AT_A_TIME):
        part = np.s_[start : start + _AT_A_TIME]
        rows = values[part] * scales[part, None].astype(np.float64)
        rotated = rows @ inverse.T  # W'
        of_part, kept = _tiles(rotated, lead)
        tiles.append(of_part)
        lengths = (np.linalg.norm(a, axis=1).max() for a in (rows, rotated, kept))
        sizes = np.maximum(sizes, list(lengths))
    slack = np.array([_slack(basis, sizes, lead)], np.float32)
    return ScreenedMatrix(exact, rotation, np.concatenate(tiles), slack, lead)


def _rotation(values, scales):
    """Eigenvectors of sum_v w_v w_v^T, largest first: B by column."""
    width = values.shape[1]
    moment = np.zeros((width, width))
    for start in range(0, len(values), _AT_A_TIME):
        part = np.s_[start : start + _AT_A_TIME]
        rows = values[part] * scales[part, None]
        moment += rows.T @ rows
    vectors = np.linalg.eigh(moment)[1][:, ::-1]
    return narrow.pack_matrix(vectors, "int8")


def _tiles(rotated, lead):
    """Rows of W' -> uint8 [tiles, bytes], and A, the lead as it is stored."""
    rows = -(-len(rotated) // integer.TILE_ROWS) * integer.TILE_ROWS
    rotated = np.pad(rotated, ((0, rows - len(rotated)), (0, 0)))
    first = np.zeros((rows, lead), np.float64)
    first[:, : min(lead, rotated.shape[1])] = rotated[:, :lead]
    values, scales = narrow.round_rows(first)
    kept = values * scales[:, None].astype(np.float64)
    blocks = -(-max(0, rotated.shape[1] - lead) // BLOCK)
    norms = np.zeros((rows, -(-blocks // 4) * 4))
    for block in range(blocks):
        start = lead + block * BLOCK
        norms[:, block] = np.linalg.norm(rotated[:, start : start + BLOCK], axis=1)
    norm_scales = (norms.max(axis=1, initial=0) / 127 * _UP).astype(np.float32)
    divisors = np.where(norm_scales > 0, norm_scales, 1).astype(np.float64)[:, None]
    norms = np.minimum(np.ceil(norms * _UP / divisors), 127).astype(np.int8)
    rounded = np.linalg.norm(kept, axis=1) * _UP  # a_v
    left = np.linalg.norm(first - kept, axis=1) * _UP  # e_v
    floats = np.stack([scales, norm_scales, rounded, left]).astype(np.float32)
    floats = floats.reshape(4, -1, integer.TILE_ROWS).swapaxes(0, 1)
    parts = [integer.to_tiles(values), integer.to_tiles(norms)]
    parts += [np.ascontiguousarray(floats).view(np.uint8)]
    tiles = [part.reshape(rows // integer.TILE_ROWS, -1) for part in parts]
    return np.concatenate(tiles, axis=1), kept


def _slack(basis, sizes, lead):
    """S: the rounding of floats, for each unit of |x|.

    A float32 sum of n products, in any of the kernels' orders, errs by at most
    gamma_n = n u / (1 - n u) times the product of lengths, u = 2^-24 (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1): at least eight sums run side by side, and some
    fifty terms are added at their ends. So do today's product (|w_v|), the rotation (each of
    its D results, |B|_F |W'_v|) and the sums over groups (|B| |A_v|, twice). The inverse of B
    in float64 is counted as 1e-9, of which it takes a thousandth.
    """
    unit = 2.0**-24
    terms = -(-len(basis) // 8) + 64
    gamma = terms * unit / (1 - terms * unit)
    of_rows, of_rotated, of_kept = sizes
    largest = np.linalg.norm(basis, 2)
    slack = gamma * (of_rows + np.linalg.norm(basis) * of_rotated)
    slack += (lead / GROUP + 16) * unit * 3 * largest * of_kept
    return (slack + 1e-9 * len(basis) * (of_rows + largest * of_rotated)) * _UP


def product(x: Float[AnyArray, "*B D"], matrix: ScreenedMatrix) -> Float[Array, "*B V"]:
    """All of y: [.., D] -> float32 [.., V], as `narrow.product` of the int8 matrix."""
    return narrow.product(x, matrix.exact)


def top(
    x: Float[AnyArray, "*B D"],
    matrix: ScreenedMatrix,
    k: int = 1,
    most_rows: float = MOST_ROWS,
) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"]]:
    """The k largest of `product` and their places, largest first: [.., D] -> [.., k] each.

    Equal bit for bit to a sort of `product`; of equal logits the lower place comes first, and
    NaN before all numbers. All rows are read where more than `most_rows` of them are left.
    Raises ValueError for a k outside [1, V].
    """
    outputs = matrix.exact.values.shape[0]
    if not 1 <= k <= outputs:
        raise ValueError(f"k={k}: must be in [1, {outputs}].")
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)

    def native(x, *operands):
        shape = (x.shape[0], k)
        results = [jax.ShapeDtypeStruct(shape, t) for t in (jnp.float32, jnp.int32)]
        name = "memoryformer_screened_top"
        call = jax.ffi.ffi_call(name, results, vmap_method="sequential")
        share = np.float32(most_rows)
        return tuple(call(x, *operands, lead=np.int64(matrix.lead), most_rows=share))

    def in_xla(x, values, scales, *_):
        whole = narrow.PackedMatrix(values, scales, matrix.exact.width)
        y = narrow.product(x, whole)
        if k > 1:
            return tuple(jax.lax.top_k(y, k))
        best = jnp.argmax(y, axis=-1, keepdims=True)
        return jnp.take_along_axis(y, best, axis=-1), best.astype(jnp.int32)

    exact, rotation = matrix.exact, matrix.rotation
    operands = (rows, exact.values, exact.scales, rotation.values, rotation.scales)
    operands = (*operands, matrix.tiles, matrix.slack)
    few = rows.shape[0] <= narrow.MAX_VECTORS  # `product` too multiplies more in XLA
    function = narrow.on_cpu(native, in_xla) if few else in_xla
    found = function(*map(jnp.asarray, operands))
    values, indices = (a.reshape(*x.shape[:-1], k) for a in found)
    return values, indices


def counts() -> Counts:
    """What `top` has read since this process began; zeros where it is not built."""
    counted = (ctypes.c_int64 * 4)()
    lookup_native.read_counts(counted)
    return Counts(*counted)
