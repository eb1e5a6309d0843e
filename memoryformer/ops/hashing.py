"""Hash codes and scores: from an activation to (which row, how much of it).

A vector of K*tau values is split into K chunks z of tau values each (Eq. 6). The signs
of a chunk, read as a binary number, are its code h(z) (Eqs. 2-4); its score s(z) says how
firmly the chunk sits in that bucket (Eqs. 8-10). Every score is one formula,

    s(z) = ||z||_1^a * exp(gamma * sum_i log sigmoid(beta |z_i|))

    kind          a   beta      gamma     source
    softmax       0   2/t       1         paper, Eqs. 9-11: p(z), a softmax over 2^tau buckets
    l1_softmax    1   2/t       1         the released code (t = 1)
    l1            1   -         0         control
    constant      0   -         0         control
    learned       1   trained   trained   generalises the above

The index has no gradient and no straight-through estimator; the score has

    ds/dz_i = sign(z_i) * q * (a ||z||_1^(a-1) + ||z||_1^a * gamma * beta * sigmoid(-beta |z_i|)),

with q the exponential above.

A layer may read a second row of each table, that of the bucket across the least certain bit
j = argmin_i |z_i|. It weighs s'(z) = s(z) exp(-gamma beta |z_j|): for `softmax` the probability
of that bucket. Both weigh the same where z_j = 0, so their sum does not jump there, and the
gradient of z_j has the difference of the two rows. A score without an exponential has no such
weight. Izhikevich (arXiv:2512.11843) takes a gradient over the same bit.

A new row of the table works wherever a memory layer is computed: what has
the formula in another language (`native.memory_layer`) serves the powers a that it
lists, and XLA computes the rest. Start at `addresses`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from memoryformer.notation import Array, Chunks, Codes, Float, Int, Scores

Learned = tuple[ArrayLike, ArrayLike]  # (beta, gamma)

# kind -> (a, gamma); gamma None: it and beta are trained.
SCORES = {
    "softmax": (0, 1),
    "l1_softmax": (1, 1),
    "l1": (1, 0),
    "constant": (0, 0),
    "learned": (1, None),
}


def split_chunks(x: Float[Array, "*B D"], code_bits: int) -> Chunks:
    """Split the last axis into chunks of `code_bits` values: [.., D] -> [.., K, tau]."""
    if code_bits < 1 or x.shape[-1] % code_bits:
        raise ValueError(
            f"code_bits={code_bits} does not divide the width {x.shape[-1]}: choose a "
            "width that is a multiple of it."
        )
    return x.reshape(*x.shape[:-1], x.shape[-1] // code_bits, code_bits)


def hash_codes(chunks: Chunks) -> Codes:
    """Read the signs of each chunk as a binary number: [.., K, tau] -> int32 [.., K].

    The first value of a chunk is the high bit, and zero counts as a set bit, as in the
    released code and the paper's Fig. 2. Never formed in bf16, exact only to 256. Written
    once more in C++ (`lookup/native/decode_native.h`) and in NumPy, for readers of exports
    (`convert/reference_reader.py`); tests hold them equal.
    """
    code_bits = chunks.shape[-1]
    bit_weights = 1 << jnp.arange(code_bits - 1, -1, -1, dtype=jnp.int32)
    bits = (chunks >= 0).astype(jnp.int32)
    return jnp.einsum("...i,i->...", bits, bit_weights)


def addresses(
    chunks: Chunks,
    kind: str = "softmax",
    temperature: float = 1.0,
    learned: Learned | None = None,
    rows_read: int = 1,
) -> tuple[Int[Array, "*R K"], Float[Array, "*R K"]]:
    """Codes and scores of the rows to read of each table: [.., K, tau] -> [.., K] each.

    With `rows_read` of 2 they are [2, .., K], the second row being that of `second_bucket`.
    """
    codes, weights = hash_codes(chunks), scores(chunks, kind, temperature, learned)
    if rows_read == 1:
        return codes, weights
    _, beta, gamma = constants(kind, temperature, learned)
    second = second_bucket(chunks, codes, weights, beta, gamma)
    return jnp.stack([codes, second[0]]), jnp.stack([weights, second[1]])


def second_bucket(
    chunks: Chunks, codes: Codes, scores: Scores, beta: ArrayLike, gamma: ArrayLike
) -> tuple[Codes, Scores]:
    """Flip the least certain bit j: h with bit j flipped, s exp(-gamma beta |z_j|); [.., K] each.

    Of equal ones the first is flipped. beta and gamma are differentiated.
    """
    magnitude = jnp.abs(chunks.astype(scores.dtype))
    least = jnp.argmin(magnitude, axis=-1)
    code_bits = chunks.shape[-1]
    flipped = jnp.left_shift(1, code_bits - 1 - least).astype(codes.dtype)
    # A mask, not a gather: its gradient is a product, not a scatter.
    mask = jax.nn.one_hot(least, code_bits, dtype=jnp.bool_)
    smallest = jnp.sum(jnp.where(mask, magnitude, 0), axis=-1)
    factor = jnp.asarray(beta, scores.dtype) * jnp.asarray(gamma, scores.dtype)
    return codes ^ flipped, scores * jnp.exp(-factor * smallest)


def has_probability(kind: str) -> bool:
    """Whether a score has an exponential, which a second row needs."""
    return SCORES[kind][1] != 0


def is_learned(kind: str) -> bool:
    """Whether a score has trained scalars (beta, gamma)."""
    return SCORES[kind][1] is None


def constants(
    kind: str, temperature: float, learned: Learned | None
) -> tuple[int, ArrayLike, ArrayLike]:
    """(a, beta, gamma) of a score; see `scores`. Raises ValueError for an unknown kind."""
    if kind not in SCORES:
        raise ValueError(f"score={kind!r}: unknown; known: {', '.join(SCORES)}.")
    power, gamma = SCORES[kind]
    beta = 2.0 / temperature
    if gamma is not None:
        return power, beta, gamma
    return power, *((beta, 1) if learned is None else learned)


def scores(
    chunks: Chunks,
    kind: str = "softmax",
    temperature: float = 1.0,
    learned: Learned | None = None,
) -> Scores:
    """Score each chunk: [.., K, tau] -> float32 [.., K]; see the module's table.

    `learned` holds the scalars (beta, gamma) of a kind that trains them; they are
    differentiated, and left out they are (2/t, 1), where training begins.
    """
    power, beta, gamma = constants(kind, temperature, learned)
    dtype = jnp.promote_types(chunks.dtype, jnp.float32)
    beta, gamma = jnp.asarray(beta, dtype), jnp.asarray(gamma, dtype)
    return _score(power, chunks.astype(dtype), beta, gamma)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(power: int, chunks: Chunks, beta: Array, gamma: Array) -> Scores:
    magnitude = jnp.abs(chunks)
    sharpness = jnp.sum(jax.nn.log_sigmoid(beta * magnitude), axis=-1)
    return jnp.sum(magnitude, axis=-1) ** power * jnp.exp(gamma * sharpness)


def _score_fwd(power, chunks, beta, gamma):
    return _score(power, chunks, beta, gamma), (chunks, beta, gamma)


def _score_bwd(power, residuals, dscores):
    chunks, beta, gamma = residuals
    magnitude = jnp.abs(chunks)
    log_sigmoid = jax.nn.log_sigmoid(beta * magnitude)
    sigmoid_of_minus = jax.nn.sigmoid(-beta * magnitude)
    norm = jnp.sum(magnitude, axis=-1)  # ||z||_1  [.., K]
    length = norm**power
    growth = power if power in (0, 1) else (power * norm ** (power - 1))[..., None]
    confidence = jnp.exp(gamma * jnp.sum(log_sigmoid, axis=-1))  # q  [.., K]
    slope = growth + length[..., None] * gamma * beta * sigmoid_of_minus
    dchunks = (dscores * confidence)[..., None] * jnp.sign(chunks) * slope
    weight = dscores * length * confidence
    dbeta = jnp.sum(weight * gamma * jnp.sum(magnitude * sigmoid_of_minus, axis=-1))
    dgamma = jnp.sum(weight * jnp.sum(log_sigmoid, axis=-1))
    return dchunks, dbeta, dgamma


_score.defvjp(_score_fwd, _score_bwd)
