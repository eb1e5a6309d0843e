"""The fast Walsh-Hadamard transform, of blocks: a rotation that costs log2 n additions a value.

    H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2):     H H' = I

A width D is cut into blocks of n values, n the largest power of two that divides D.
Start at `transform`.
"""

import jax.numpy as jnp

from memoryformer.notation import Array, Float


def transform(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Multiply each block of the last axis by H_n: [.., D] -> [.., D]."""
    leading, width = x.shape[:-1], x.shape[-1]
    size = block_size(width)
    x = x.reshape(*leading, width // size, size)
    half = 1
    while half < size:
        pairs = x.reshape(*leading, -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2).reshape(*leading, width // size, size)
        half *= 2
    return x.reshape(*leading, width) * size**-0.5


def block_size(width: int) -> int:
    """n, the largest power of two that divides the width."""
    return width & -width
