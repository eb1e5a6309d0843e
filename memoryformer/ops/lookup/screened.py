"""The largest logits of an int8 head without reading most of its rows, and exactly.

    y[v] = s_v sum_d q[v, d] x[d]                           today's int8 head
    u[v] >= y[v],  from 0.42 bytes a weight at D = 1024     every row
    y[v] again     in the same arithmetic                   rows with u[v] >= t

t is the k-th largest y of a few rows with the highest u: no row with a smaller u is among the k
largest, nor equal to one. So the answer is the int8 head's bit for bit, ties included. Why
u[v] >= y[v] stands in `native/screen_native.h`, rounding of floats included. Where too many rows
are left, all are read.

The rows are seen through a matrix B whose first columns hold most of them: the eigenvectors of
sum_v w_v w_v^T, rounded to int8, times the fourth roots of their values, so that rows and
states grow smaller alike. Nothing else is needed of B than an inverse: it may be rounded, and no
text is needed to find it. Start at `pack` and `top`.
"""

import ctypes
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.notation import AnyArray, Array, Float, Int
from memoryformer.ops.lookup import integer, narrow
from memoryformer.ops.lookup import native as lookup_native

LEAD = 8  # one column of so many is kept in 8 bits, the others in 2
STEP = 0.9957  # of the 2 bits, in standard deviations: the best for normal numbers
BLOCK = 16  # columns of a norm
GROUP = 64  # columns that share a scale of activations
MOST_ROWS = 0.4  # a larger share of rows costs more than reading all in order
# A smaller head lies in a cache: reading all of it takes no longer than the search.
FEWEST_WEIGHTS = 1 << 20
_UP = 1 + 1e-6  # rounds what is stored as float32 up
_AT_A_TIME = 4096  # rows that are packed together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScreenedMatrix:
    """An int8 matrix [D, V], and what bounds its products.

    exact: the matrix; rotation: B [D, D] by column, int8. tiles: for each 16 outputs, bytes of
    the lead [lead / 4, 16, 4], of the rest [blocks, 16, 4], norms [blocks / 4, 16, 4] and six
    floats a row (see `_tiles`).
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
    """Store a matrix [D, V] as int8, and what bounds it: 1.42 times the bytes and D^2.

    Raises ValueError for weights that are not finite.
    """
    if not np.isfinite(matrix).all():
        raise ValueError("a matrix to be screened: has weights that are not finite.")
    exact = narrow.pack_matrix(matrix, "int8")
    values, scales = np.asarray(exact.values), np.asarray(exact.scales)
    width = exact.width
    rotation = _rotation(values, scales)
    of_columns = np.asarray(rotation.scales, np.float64)
    basis = (np.asarray(rotation.values) * of_columns[:, None]).T  # B
    inverse, sizes = np.linalg.inv(basis), np.linalg.norm(basis, axis=0)
    lead = 4 * -(-width // (4 * LEAD))
    tiles, longest = [], np.zeros(3)
    for start in range(0, len(values), _AT_A_TIME):
        part = np.s_[start : start + _AT_A_TIME]
        rows = values[part] * scales[part, None].astype(np.float64)
        rotated = rows @ inverse.T  # W'
        of_part, kept = _tiles(rotated, lead)
        tiles.append(of_part)
        lengths = (
            np.linalg.norm(a, axis=1) for a in (rows, rotated * sizes, kept * sizes)
        )
        longest = np.maximum(longest, [length.max() for length in lengths])
    slack = np.array([_slack(width, longest)], np.float32)
    return ScreenedMatrix(exact, rotation, np.concatenate(tiles), slack, lead)


def _rotation(values, scales):
    """B by column: eigenvectors of sum_v w_v w_v^T, largest first, times fourth roots."""
    width = values.shape[1]
    moment = np.zeros((width, width))
    for start in range(0, len(values), _AT_A_TIME):
        part = np.s_[start : start + _AT_A_TIME]
        rows = values[part] * scales[part, None]
        moment += rows.T @ rows
    sizes, vectors = np.linalg.eigh(moment)
    sizes, vectors = sizes[::-1], vectors[:, ::-1]
    largest = sizes[0] if sizes[0] > 0 else 1.0
    # Of fourth roots of at least 1e-2, so that B's inverse is at most 100 times larger.
    roots = np.maximum(sizes / largest, 1e-8) ** 0.25
    stored = narrow.pack_matrix(vectors, "int8")
    of_columns = np.asarray(stored.scales) * roots
    return dataclasses.replace(stored, scales=of_columns.astype(np.float32))


def _tiles(rotated, lead):
    """Rows of W' -> uint8 [tiles, bytes], and A [rows, D] as it is stored."""
    count, width = rotated.shape
    blocks = -(-max(0, width - lead) // BLOCK)
    shape = (-(-count // integer.TILE_ROWS) * integer.TILE_ROWS, lead + blocks * BLOCK)
    padded = np.zeros(shape)
    padded[:count, :width] = rotated[:, : shape[1]]
    values, scales = narrow.round_rows(padded[:, :lead])
    bits, steps = _two_bits(padded[:, lead:], max(1, width - lead))
    kept = np.concatenate(
        [
            values * scales[:, None].astype(np.float64),
            (2.0 * bits - 3) * steps[:, None].astype(np.float64),
        ],
        axis=1,
    )
    kept[:, width:] = 0
    left = padded - kept
    norms = np.linalg.norm(left[:, lead:].reshape(len(left), blocks, BLOCK), axis=2)
    norms = np.pad(norms, ((0, 0), (0, -blocks % 4)))
    norm_scales = (norms.max(axis=1, initial=0) / 127 * _UP).astype(np.float32)
    divisors = np.where(norm_scales > 0, norm_scales, 1).astype(np.float64)[:, None]
    norms = np.minimum(np.ceil(norms * _UP / divisors), 127).astype(np.int8)
    bounds = [
        np.linalg.norm(part, axis=1) * _UP
        for part in (kept[:, :lead], left[:, :lead], kept[:, lead:])
    ]  # a_v, e_v and c_v
    floats = np.stack([scales, steps, norm_scales, *bounds]).astype(np.float32)
    floats = floats.reshape(len(floats), -1, integer.TILE_ROWS).swapaxes(0, 1)
    quads = bits.reshape(len(bits), blocks, 4, 4).astype(np.uint8)
    packed = (
        quads[:, :, 0] | quads[:, :, 1] << 2 | quads[:, :, 2] << 4 | quads[:, :, 3] << 6
    )
    parts = [
        integer.to_tiles(values),
        integer.tiled(packed.reshape(len(bits), 4 * blocks)),
        integer.to_tiles(norms),
        np.ascontiguousarray(floats).view(np.uint8),
    ]
    tiles = [part.reshape(shape[0] // integer.TILE_ROWS, -1) for part in parts]
    return np.concatenate(tiles, axis=1), kept[:count, :width]


def _two_bits(columns, width):
    """Rows ~ (2 h - 3) steps[:, None], h in 0 .. 3."""
    deviations = np.sqrt(np.sum(columns**2, axis=1) / width)
    steps = (deviations * STEP / 2).astype(np.float32)
    divisors = np.where(steps > 0, 2 * steps, 1).astype(np.float64)[:, None]
    return np.clip(np.floor(columns / divisors) + 2, 0, 3).astype(np.int8), steps


def _slack(width, longest):
    """S: the rounding of floats, for each unit of |x|.

    A float32 sum of n products, in any of the kernels' orders, errs by at most
    gamma_n = n u / (1 - n u) times the product of lengths, u = 2^-24 (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1): at least eight sums run side by side, and some
    fifty terms are added at their ends. So do today's product, |w_v| |x|, and each value of
    z, |b_d| |x| with column b_d of B; together these change x' . W'_v by at most
    sqrt(D) |(|b_d| W'_vd)_d| gamma |x|. The sums over groups add as many roundings as there are
    groups and a few, of terms below 2 |z_d A_vd|. The inverse of B in float64 is counted as
    1e-9, of which it takes a thousandth. longest: of |w_v|, |(|b_d| W'_vd)_d|, |(|b_d| A_vd)_d|.
    """
    unit = 2.0**-24
    terms = -(-width // 8) + 64
    gamma = terms * unit / (1 - terms * unit)
    of_rows, of_rotated, of_kept = longest
    slack = gamma * (of_rows + width**0.5 * of_rotated)
    slack += 3 * (width / GROUP + 18) * unit * width**0.5 * of_kept
    return (slack + 1e-9 * width * (of_rows + of_rotated)) * _UP


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
        call = lookup_native.ffi_call("screened_top", results, vmap_method="sequential")
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
    stored = (exact.values, exact.scales, rotation.values, rotation.scales)
    operands = (rows, *stored, matrix.tiles, matrix.slack)
    few = rows.shape[0] <= narrow.MAX_VECTORS  # `product` too multiplies more in XLA
    function = narrow.on_cpu(native, in_xla) if few else in_xla
    largest = function(*map(jnp.asarray, operands))
    values, indices = (a.reshape(*x.shape[:-1], k) for a in largest)
    return values, indices


def counts() -> Counts:
    """What `top` has read since this process began; zeros where it is not built."""
    counted = (ctypes.c_int64 * 4)()
    lookup_native.read_counts(counted)
    return Counts(*counted)
