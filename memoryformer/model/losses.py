"""Next-token cross-entropy, token by token.

    nats[t] = log sum_v exp(logits[t, v]) - logits[t, target_t]

A loss is a sum of nats and a count of tokens, divided once. On a `model` axis each device
holds its part of the vocabulary, and the sums over it cross that axis.
"""

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, Float, Int
from memoryformer.ops import collectives

MODEL_AXIS = "model"


def token_nats(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """Return the nats of each target: float32 [B, L, V], int32 [B, L] -> [B, L]."""
    vocab_size = logits.shape[-1]  # this device's part
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    top = collectives.pmax(top, MODEL_AXIS)
    total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    log_total = jnp.log(collectives.psum(total, MODEL_AXIS)) + top

    local = targets - vocab_size * collectives.axis_index(MODEL_AXIS)
    here = (local >= 0) & (local < vocab_size)
    index = jnp.clip(local, 0, vocab_size - 1)[..., None]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    chosen = collectives.psum(jnp.where(here, chosen, 0), MODEL_AXIS)
    return log_total - chosen
