"""Positive random features of the softmax kernel (FAVOR+, Choromanski et al. 2020).

    exp(q . k / sqrt(E)) = E_w[phi_w(q) phi_w(k)],    phi_w(x) = exp(w . x' - |x'|^2 / 2)

with x' = x E^(-1/4) and w normal; rows w that are orthogonal in blocks of E lower the error.
"""

import jax
import jax.numpy as jnp

from memoryformer.notation import AnyArray, Array, Float


def draw(key: Array, num_features: int, head_dim: int) -> Float[Array, "M E"]:
    """Draw the rows w: orthogonal in blocks of E, with the lengths of normal vectors."""
    directions, lengths = jax.random.split(key)
    blocks = -(-num_features // head_dim)
    rows = orthogonal(directions, head_dim, (blocks,))
    rows = rows.reshape(-1, head_dim)[:num_features]
    normal = jax.random.normal(lengths, (num_features, head_dim))
    return rows * jnp.linalg.norm(normal, axis=-1, keepdims=True)


def orthogonal(key: Array, size: int, shape: tuple[int, ...] = ()) -> Array:
    """Draw orthogonal matrices [*shape, E, E], uniform over all of them.

    The numbers of `jax.random.orthogonal`, up to rounding, without its LAPACK call.
    """
    return orthonormalise(jax.random.normal(key, (*shape, size, size)))


def orthonormalise(x: Float[Array, "*B E R"]) -> Float[Array, "*B E R"]:
    """Gram-Schmidt on the columns: the Q of x = Q R whose R has a positive diagonal.

    No `jnp.linalg.qr`: on CPU two such calls of one program (one a layer) can take all of
    XLA's threads and then wait for one of them for ever.
    """
    columns = jnp.arange(x.shape[-1])

    def column(j, q):
        done = jnp.where(columns < j, q, 0)
        v = jnp.take(q, j, axis=-1)  # [*B, E]
        for _ in range(2):  # once leaves errors that grow with the condition of x
            along = jnp.einsum("...er,...e->...r", done, v, precision="highest")
            v = v - jnp.einsum("...er,...r->...e", done, along, precision="highest")
        v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
        return jnp.where(columns == j, v[..., None], q)

    return jax.lax.fori_loop(0, x.shape[-1], column, x)


def log_features(
    x: Float[Array, "*B E"], rows: Float[AnyArray, "M E"]
) -> Float[Array, "*B M"]:
    """log phi_w(x) for every row w: [.., E] -> [.., M]."""
    x = x * x.shape[-1] ** -0.25
    half_square = 0.5 * jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.einsum("...e,me->...m", x, rows.astype(x.dtype)) - half_square
