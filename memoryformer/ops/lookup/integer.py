"""Integer products: narrow weights times activations that are rounded too.

    kind    weights                                  activations
    w8a8    int8, a scale for each output            int8, a scale for each vector
    w4a8    4 bits, a scale for 64 of an output      the same

    y[n, v] = s_n (s_v sum_d q[n, d] w[v, d]),  q[n] = round(x[n] / s_n),  s_n = max |x[n]| / 127

Sums are exact integers, so that all instruction sets (VNNI, AVX2, none) give the same bits.
Rounding goes to the nearest, ties to even. Activations in floats are `narrow`, the reference.
Start at `pack` and `product`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.notation import AnyArray, Array, Float, Int
from memoryformer.ops.lookup import narrow
from memoryformer.ops.lookup import native as lookup_native

KINDS = ("w8a8", "w4a8")
TILE_ROWS = 16  # rows of a matrix that lie side by side, four columns of each
MAX_WIDTH = 1 << 17  # 127 * 127 * 2^17 is the largest sum that 32 bits hold


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerMatrix:
    """A matrix [D, V] in tiles of 16 outputs, uint8 [V / 16, D' / 4, 16, 4].

    D' is D padded to fours, or to 64s for 4 bits, of which a byte holds two: [.., D' / 8, ..].
    Scales are [V / 16, 16], or [V / 16, D' / 64, 16].
    """

    tiles: AnyArray
    scales: AnyArray
    width: int = dataclasses.field(metadata={"static": True})  # D
    outputs: int = dataclasses.field(metadata={"static": True})  # V

    @property
    def four_bits(self) -> bool:
        """Whether weights have 4 bits."""
        return self.scales.ndim == 3


def pack(matrix: Float[np.ndarray, "D V"], kind: str) -> IntegerMatrix:
    """Store a matrix for integer products; raises ValueError above `MAX_WIDTH` inputs."""
    by_output = np.ascontiguousarray(np.asarray(matrix).T)
    outputs, width = by_output.shape
    if width > MAX_WIDTH:
        raise ValueError(f"{kind}: takes at most {MAX_WIDTH} inputs, not {width}.")
    group = lookup_native.INT4_GROUP if kind == "w4a8" else 4
    padding = (-outputs % TILE_ROWS, -width % group)
    by_output = np.pad(by_output, ((0, padding[0]), (0, padding[1])))
    if kind == "w8a8":
        values, scales = narrow.round_rows(by_output)
        scales = scales.reshape(-1, TILE_ROWS)
        return IntegerMatrix(to_tiles(values), scales, width, outputs)
    values, scales = narrow.round_rows(by_output.reshape(len(by_output), -1, group), 7)
    eights = (values + 8).astype(np.uint8).reshape(len(by_output), -1, 2, 4)
    pairs = (eights[:, :, 0] | eights[:, :, 1] << 4).reshape(len(by_output), -1)
    scales = scales.reshape(-1, TILE_ROWS, scales.shape[1]).swapaxes(1, 2)
    return IntegerMatrix(tiled(pairs), np.ascontiguousarray(scales), width, outputs)


def to_tiles(values: Int[np.ndarray, "V D"]) -> np.ndarray:
    """Lay int8 rows side by side, sixteen to a tile, plus 128: V of 16s and D of 4s."""
    return tiled((values.astype(np.int16) + 128).astype(np.uint8))


def tiled(values: np.ndarray) -> np.ndarray:
    """Lay bytes [V, Q * 4] side by side, four of each of sixteen rows: [V / 16, Q, 16, 4]."""
    shape = (len(values) // TILE_ROWS, TILE_ROWS, values.shape[1] // 4, 4)
    tiles = values.reshape(shape)
    return np.ascontiguousarray(tiles.swapaxes(1, 2))


def round_activations(
    x: Float[Array, "N D"],
) -> tuple[Int[Array, "N D"], Float[Array, " N"]]:
    """Round vectors to int8 times a scale each; what is not finite gives NaN and zeros."""
    scales = jnp.max(jnp.abs(x), axis=-1, initial=0) / 127
    scales = jnp.where(jnp.isfinite(scales), scales, jnp.nan)
    usable = jnp.where(scales > 0, scales, 1)[:, None]
    values = jnp.where(scales[:, None] > 0, jnp.round(x / usable), 0)
    return jnp.clip(values, -127, 127).astype(jnp.int8), scales


def product(x: Float[AnyArray, "*B D"], matrix: IntegerMatrix) -> Float[Array, "*B V"]:
    """Multiply rounded x with a packed matrix: [.., D] -> float32 [.., V]."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    four_bits = matrix.four_bits
    padded = matrix.tiles.shape[1] * (8 if four_bits else 4)
    rows = jnp.pad(rows, ((0, 0), (0, padded - rows.shape[1])))

    def native(x, tiles, scales):
        y = jax.ShapeDtypeStruct((x.shape[0], matrix.outputs), jnp.float32)
        call = lookup_native.ffi_call("integer_product", y, vmap_method="sequential")
        return call(x, tiles, scales, four_bits=four_bits)

    def in_xla(x, tiles, scales):
        values, of_x = round_activations(x)
        group = lookup_native.INT4_GROUP if four_bits else padded
        values = values.reshape(len(values), -1, group)
        weights = _weights(tiles, four_bits).reshape(-1, values.shape[1], group)
        sums = jnp.einsum(
            "ngj,vgj->ngv", values, weights, preferred_element_type="int32"
        )
        if not four_bits:
            y = sums[:, 0] * scales.reshape(1, -1) * of_x[:, None]
            return y[:, : matrix.outputs]
        scales = scales.swapaxes(0, 1).reshape(1, sums.shape[1], -1)
        y = jnp.sum(sums * scales, axis=1) * of_x[:, None]
        return y[:, : matrix.outputs]

    function = narrow.on_cpu(native, in_xla) if padded else in_xla
    y = function(rows, jnp.asarray(matrix.tiles), jnp.asarray(matrix.scales))
    return y.reshape(*x.shape[:-1], -1)


def _weights(tiles, four_bits):
    """[V', D'] of int8."""
    if not four_bits:
        weights = (tiles.astype(jnp.int16) - 128).astype(jnp.int8)
    else:
        halves = jnp.stack([tiles & 15, tiles >> 4], axis=2).astype(jnp.int8) - 8
        weights = halves.reshape(tiles.shape[0], -1, *tiles.shape[2:])
    return weights.swapaxes(1, 2).reshape(tiles.shape[0] * TILE_ROWS, -1)
