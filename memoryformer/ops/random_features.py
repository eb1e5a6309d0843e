"""Positive random features of the softmax kernel (FAVOR+, Choromanski et al. 2020).

    exp(q . k / sqrt(E)) = E_w[phi_w(q) phi_w(k)],    phi_w(x) = exp(w . x' - |x'|^2 / 2)

with x' = x E^(-1/4) and w normal; rows w that are orthogonal in blocks of E lower the error.
"""

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, Float


def draw(key: Array, num_features: int, head_dim: int) -> Float[Array, "M E"]:
    """Draw the rows w: orthogonal in blocks of E, with the lengths of normal vectors."""
    directions, lengths = jax.random.split(key)
    blocks = -(-num_features // head_dim)
    normal = jax.random.normal(directions, (blocks, head_dim, head_dim))
    q, r = jnp.linalg.qr(normal)
    # The signs make q uniform over the rotations, whatever the QR algorithm's convention.
    q = q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    rows = q.reshape(-1, head_dim)[:num_features]
    normal = jax.random.normal(lengths, (num_features, head_dim))
    return rows * jnp.linalg.norm(normal, axis=-1, keepdims=True)


def log_features(
    x: Float[Array, "*B E"], rows: Float[Array, "M E"]
) -> Float[Array, "*B M"]:
    """log phi_w(x) for every row w: [.., E] -> [.., M]."""
    x = x * x.shape[-1] ** -0.25
    half_square = 0.5 * jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.einsum("...e,me->...m", x, rows.astype(x.dtype)) - half_square
