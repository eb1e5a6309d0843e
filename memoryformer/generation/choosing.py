"""How a token is chosen from logits: the most likely, or drawn from the nucleus.

    p(token) ~ softmax(logits / temperature) over the smallest set with mass >= top_p

Start at `choose`.
"""

import jax
import jax.numpy as jnp

from memoryformer.notation import Array
from memoryformer.ops.lookup import narrow as narrow_rows


def choose(
    logits: Array, key: Array, temperature: Array | float, top_p: Array | float
) -> Array:
    """Choose one token per row: float32 [B, V] -> int32 [B]; both knobs may be traced."""

    def greedy(logits):
        return narrow_rows.first_largest(logits)

    def sampled(logits):
        return _sample(logits, key, temperature, top_p).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, sampled, greedy, logits)


def _sample(logits, key, temperature, top_p):
    scaled = logits / jnp.maximum(temperature, 1e-6)
    nucleus = jnp.where(in_nucleus(scaled, top_p), scaled, -jnp.inf)
    # `jax.random.categorical`, but XLA CPU would draw inside the argmax, one at a time.
    noise = jax.lax.optimization_barrier(jax.random.gumbel(key, scaled.shape))
    return jnp.argmax(nucleus + noise, axis=-1)


def in_nucleus(logits: Array, top_p: Array | float) -> Array:
    """Whether the tokens likelier than a token hold less than top_p: [B, V] -> bool [B, V].

    Bisects for the smallest such probability, by its bits, which order as the positive
    floats do: 31 sums over V cost a tenth of one sort.
    """
    mass = jax.nn.softmax(logits, axis=-1)
    bits = jax.lax.bitcast_convert_type(mass, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # the answer is in [low, high]
        middle = low + (high - low) // 2
        above = jnp.sum(jnp.where(bits > middle, mass, 0), axis=-1, keepdims=True)
        enough = above < top_p
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    high = jnp.max(bits, axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return bits >= low
