"""All blocks of a model of memory layers, for a few tokens, in one native call.

    z = norm1(x);  q, k, v = ML(z);  cache <- k, v;  m = attention(q, cache), or ML of it
    sequential     a = x + m;  y = a + ffn(norm2(a))
    parallel       y = x + m + ffn(norm2(x))
    eq13           y = z + m + ffn(z)
    ffn(z)         ML_2(LayerNorm(ML_1(z))), or one memory layer

The modules of `model` are the definition. This sums rows in their order, norms and attention in
another. All threads work on each step, and XLA runs nothing between: its own code took half of
a token's time at the width of base. What a token gets depends neither on the others in
the call nor on the threads, bit for bit. Caches are read and written in place: donate them.
Start at `read`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from memoryformer.notation import AnyArray, Array, Float, Int
from memoryformer.ops.lookup import native

RESIDUALS = ("sequential", "parallel", "eq13")
MAX_TOKENS = 32  # of a call; longer pieces of prompts go through the blocks themselves


class Layer(NamedTuple):
    """A memory layer's tables [K, C, F], scales [K, C] of int8, bias [F] and score."""

    tables: AnyArray
    scales: AnyArray | None
    bias: AnyArray | None
    beta: ArrayLike
    gamma: ArrayLike


class Norm(NamedTuple):
    """An RMSNorm, or with a bias a LayerNorm."""

    scale: Array
    bias: Array | None


class Block(NamedTuple):
    """One block; `norm2` is None in eq13, `out` without W_O, `up` and `middle` where ffn is one layer."""

    norm1: Norm
    norm2: Norm | None
    qkv: Layer
    out: Layer | None
    up: Layer | None
    middle: Norm | None
    down: Layer


@dataclasses.dataclass(frozen=True)
class Form:
    """What all blocks have in common. power: of |z| in a score. middle_eps: of `Block.middle`."""

    heads: int
    residual: str
    eps: float
    middle_eps: float
    power: int
    rows_read: int


def read(
    x: Float[Array, "N D"],
    turns: tuple[Float[Array, "N R"], Float[Array, "N R"]],
    segment_ids: Int[Array, "B L"],
    blocks: Sequence[Block],
    final_norm: Norm,
    caches: Sequence[Sequence[Array]],
    form: Form,
) -> tuple[Float[Array, "N D"], list[list[Array]]]:
    """Read N = B L tokens, L after what each of B caches holds: normed features, caches.

    turns: cosines and sines of rotary positions. caches: of each block keys and values
    [B, H, M, E], segments [B, M] and the tokens stored []. All floats are float32, tables of
    one type. Raises RuntimeError without a compiler.
    """
    present = [layer for layer in _layers(blocks[0]) if layer is not None]
    knobs = [
        [
            jnp.asarray(v, jnp.float32)
            for layer in _layers(block)
            for v in ((layer.beta, layer.gamma) if layer is not None else (0, 0))
        ]
        for block in blocks
    ]
    stacked = jnp.stack([jnp.stack(row) for row in knobs])
    leading = (x, *turns, segment_ids, stacked)
    operands = [*leading, *_arrays(final_norm)]
    places: list[jax.ShapeDtypeStruct] = []
    aliases: dict[int, int] = {}  # operand -> result
    for block, cache in zip(blocks, caches, strict=True):
        operands += _of_block(block)
        for array in cache:
            aliases[len(operands)] = 1 + len(places)
            operands.append(array)
            places.append(jax.ShapeDtypeStruct(array.shape, array.dtype))
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    call = native.ffi_call("blocks", [result, *places], input_output_aliases=aliases)
    y, *flat = call(
        *operands,
        heads=np.int64(form.heads),
        residual=np.int64(RESIDUALS.index(form.residual)),
        layer_norm=final_norm.bias is not None,
        eps=np.float32(form.eps),
        middle_eps=np.float32(form.middle_eps),
        power=bool(form.power),
        two_rows=form.rows_read == 2,
        has_out=blocks[0].out is not None,
        has_up=blocks[0].up is not None,
        has_bias=present[0].bias is not None,
    )
    width = len(caches[0])
    return y, [flat[i : i + width] for i in range(0, len(flat), width)]


def _layers(block):
    return block.qkv, block.out, block.up, block.down


def _arrays(part):
    """What there is of a norm or of a layer, in order; a layer's knobs are apart."""
    if part is None:
        return []
    arrays = part[:3] if isinstance(part, Layer) else part
    return [array for array in arrays if array is not None]


def _of_block(block):
    return [
        array
        for part in (
            block.norm1,
            block.norm2,
            block.qkv,
            block.out,
            block.up,
            block.middle,
            block.down,
        )
        for array in _arrays(part)
    ]
