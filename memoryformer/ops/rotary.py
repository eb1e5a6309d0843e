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
    rotary_dim = 2 * int(x.shape[-1] * fraction / 2)
    if rotary_dim == 0:
        return x
    half = rotary_dim // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency.reshape(
        1, 1, 1, half
    )  # [B, L, 1, R/2]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:rotary_dim]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, x[..., rotary_dim:]], axis=-1)
