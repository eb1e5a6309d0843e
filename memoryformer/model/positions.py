"""Several tokens read at once, with the bits of one after another, and the state set back.

    x_j, state_j = what the model returns after the first j of L tokens, j = 1 .. L

Everything that treats positions apart is computed for all L together, so that weights are read
once: norms, and on CPU the native products and memory layers, which sum in one order however
many vectors they are given. Softmax attention reads its cache with the bits of single queries
(`attention.over_cache`). Other products of XLA's are summed in another order, and so are the sums
of other mixers: `why_not` names the models that have some. Start at `read`, then `keep`.
"""

import jax
import jax.numpy as jnp

from memoryformer.model import fused, mixers, params, parts, transformer
from memoryformer.notation import Array, Float, Params, Tokens
from memoryformer.ops import attention
from memoryformer.ops.lookup import native

MAX_POSITIONS = attention.FEW  # L


def why_not(config: transformer.ModelConfig) -> str:
    """Say why a model cannot be read so here; '' if it can."""
    if jax.default_backend() != "cpu" or not native.available():
        return "it needs a CPU and the native code"
    if not config.causal:
        return "model.causal=False: nothing is decoded"
    if config.mixer != "softmax" or not config.mixer_options.is_plain:
        return (
            f"model.mixer={config.mixer!r} sums over the past in another order for several "
            "tokens; only plain softmax does not"
        )
    if config.recurrence != "none":
        return (
            f"model.recurrence={config.recurrence!r} moves its memory at a chunk's end"
        )
    if config.tie_embeddings:
        return "model.tie_embeddings=True: the head is a product of XLA's"
    if config.projection_options.ngram_rows:
        return (
            "model.projection_options.ngram_rows: what it keeps of the last tokens is not "
            "set back"
        )
    blocks = (parts.of_layer(config, i) for i in range(config.num_layers))
    if any("orthogonal" in part.mixes for block in blocks for part in block):
        return "the mix 'orthogonal' of a memory layer is a product of XLA's"
    return ""


def read(
    config: transformer.ModelConfig,
    weights: Params,
    state: mixers.State,
    tokens: Tokens,
    seq: mixers.SeqInfo,
) -> tuple[Float[Array, "L D"], mixers.State]:
    """Read one row [1, L] of at most `MAX_POSITIONS` tokens: features of each, and states.

    weights: as `narrow.prepare` stored them. The states are for `keep` only.
    """
    model = params.merge(config, weights)
    x, states = fused.features(config, model, tokens, seq, state)
    return x[0], states


def keep(states: mixers.State, length: int, count: Array) -> mixers.State:
    """The state after the first `count` of the `length` tokens that `read` has read."""

    def kept(cache):
        filled = cache.length - length + count
        index = jnp.arange(cache.segment_ids.shape[1])[None]
        segment_ids = jnp.where(index < filled, cache.segment_ids, 0)
        return cache._replace(segment_ids=segment_ids, length=filled)

    return tuple(kept(cache) for cache in states)
