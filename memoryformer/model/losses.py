"""Next-token cross-entropy, token by token.

    nats[t] = log sum_v exp(logits[t, v]) - logits[t, target_t]

A loss is a sum of nats and a count of tokens, divided once. On a `model` axis each device
holds its part of the vocabulary, and the sums over it cross that axis.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from memoryformer import model as model_lib
from memoryformer.model import losses, mixers
from memoryformer.notation import Array, Float, Int, Params
from memoryformer.ops import collectives, head


def token_nats(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """Return the nats of each target: float32 [B, L, V], int32 [B, L] -> [B, L]."""
    vocab_size = logits.shape[-1]  # this device's part
    normalizer = log_total(logits)

    local = targets - vocab_size * collectives.axis_index(collectives.MODEL_AXIS)
    here = (local >= 0) & (local < vocab_size)
    index = jnp.clip(local, 0, vocab_size - 1)[..., None]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    chosen = collectives.psum(jnp.where(here, chosen, 0), collectives.MODEL_AXIS)
    return normalizer - chosen


def log_total(logits: Float[Array, "B L V"]) -> Float[Array, "B L"]:
    """log sum_v exp(logits[v]): float32 [B, L, V] -> [B, L]."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    top = collectives.pmax(top, collectives.MODEL_AXIS)
    total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    return jnp.log(collectives.psum(total, collectives.MODEL_AXIS)) + top


Batch = Mapping[str, Array]


def weighted(terms: Float[Array, "B L"], batch: Batch) -> Float[Array, "B L"]:
    """Times the batch's weights, and 0 where these are 0."""
    # Not a product: padding must not turn 0 * inf into nan.
    return jnp.where(batch["weights"] > 0, terms * batch["weights"], 0)


def batch_nats(
    model_config: model_lib.ModelConfig,
    params: Params,
    batch: Batch,
) -> Array:
    """Return the weighted nats of every target: [B, L] float32."""
    return model_nats(model_lib.merge(model_config, params), batch)


def sum_of_nats(
    model_config: model_lib.ModelConfig, params: Params, batch: Batch, *, native: bool
) -> Array:
    """Return the sum of `batch_nats`; `native`: by `ops.head`, where `native_parts` allows it."""
    if not native or model_config.tie_embeddings:
        return jnp.sum(batch_nats(model_config, params, batch))
    model = model_lib.merge(model_config, params)
    seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
    x, _ = model.features(batch["inputs"], seq)
    targets, weights = (batch[name].reshape(-1) for name in ("targets", "weights"))
    assert model.head is not None  # embeddings are not tied
    x, kernel = x.reshape(-1, x.shape[-1]), model.head.kernel[...]
    return head.sum_of_nats(x, kernel, targets, weights)


def model_nats(model: model_lib.Transformer, batch: Batch) -> Array:
    """The same, of a merged model."""
    seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
    logits, _ = model(batch["inputs"], seq)
    return weighted(losses.token_nats(logits, batch["targets"]), batch)
