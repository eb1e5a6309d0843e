"""Rotary position embedding on the first part of each head (GPT-NeoX convention).

The first R = 2 * (E * fraction / 2) entries of a head are read as R/2 pairs (i, i + R/2), and pair
i is turned by the angle position * base^(-2i/R); the rest of the head is left as it is.
"""

import jax.numpy as jnp

from memoryformer.notation import Array, Float, Int


def rotate(
    x: Float[Array, "B L H E"],
    positions: Int[Array, "B L"],
    fraction: float = 0.25,
    base: float = 10_000.0,
) -> Float[Array, "B L H E"]:
    """Turn the first `fraction` of every head by its position; angles in float32."""
    half = num_pairs(x.shape[-1], fraction)
    if half == 0:
        return x
    cos, sin = (turn.astype(x.dtype) for turn in turns(positions, half, base))
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, x[..., 2 * half :]], axis=-1)


def turns(
    positions: Int[Array, "B L"], pairs: int, base: float
) -> tuple[Float[Array, "B L 1 R"], Float[Array, "B L 1 R"]]:
    """Cosines and sines of the angles of R pairs, float32."""
    frequency = base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angle = positions[..., None, None].astype(jnp.float32) * frequency.reshape(
        1, 1, 1, pairs
    )
    return jnp.cos(angle), jnp.sin(angle)


def num_pairs(width: int, fraction: float) -> int:
    """R of heads of a width: whole pairs within `fraction` of it."""
    return int(width * fraction / 2)
