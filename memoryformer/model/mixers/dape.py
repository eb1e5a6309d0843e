"""DAPE V2 (Zheng et al. 2024): a convolution over keys and heads changes the logits.

    S' = S + A + f([S; A]),     f = conv(2H -> W) , leaky relu, conv(W -> H)

Both convolutions run along the keys (3 of them) of one query and across all heads. A is
ALiBi's bias -slope_h (t - s). What a query may not see is 0 before each convolution, the
hidden one too, so that a row's result is the same in a cache, in a pack and alone (the
published code leaves the hidden value just ahead of t). The second convolution has no bias: the
softmax would cancel it.

It needs all logits, so only the plain softmax attention can take it.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.notation import Array, Float, Int
from memoryformer.ops import collectives

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig

WINDOW = 3  # keys


def cost(num_heads: int, hidden: int) -> tuple[int, int]:
    """Multiply-adds for each query and key, and parameters."""
    per_pair = WINDOW * (2 * num_heads * hidden + hidden * num_heads)
    return per_pair, per_pair + hidden


class DapeV2(nnx.Module):
    """S' of a layer; on a `model` axis the heads' logits are gathered."""

    def __init__(self, config: "ModelConfig", *, rngs: nnx.Rngs):
        self.num_heads, hidden = config.num_heads, config.mixer_options.dape_width
        fan_in = WINDOW * 2 * self.num_heads

        def uniform(fan_in, *shape):
            bound = fan_in**-0.5
            return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)

        first = uniform(fan_in, WINDOW, 2 * self.num_heads, hidden)
        second = uniform(WINDOW * hidden, WINDOW, hidden, self.num_heads)
        first_bias = uniform(fan_in, hidden)
        self.first = nnx.Param(first, spec="whole", decay=True)
        self.first_bias = nnx.Param(first_bias, spec="whole", decay=False)
        self.second = nnx.Param(second, spec="last_axis", decay=True)  # [3, W, H]

    def __call__(
        self,
        logits: Float[Array, "B H L M"],
        mask: Array,
        query_index: Int[Array, "B L"],
        key_index: Int[Array, "B M"],
    ) -> Float[Array, "B H L M"]:
        """Change logits whose mask is [B, 1, L, M]; indices count real tokens of a row."""
        distance = key_index[:, None, None, :] - query_index[:, None, :, None]
        heads = jnp.arange(1, self.num_heads + 1, dtype=logits.dtype)
        slopes = 2.0 ** (-8 * heads / self.num_heads)
        alibi = slopes[None, :, None, None] * distance.astype(logits.dtype)
        local = logits.shape[1]
        first = collectives.axis_index(collectives.MODEL_AXIS) * local
        own_alibi = jax.lax.dynamic_slice_in_dim(alibi, first, local, axis=1)
        gathered = collectives.all_gather(logits, collectives.MODEL_AXIS, 1)
        x = jnp.concatenate([gathered, alibi], axis=1)  # [B, 2H, L, M]
        x = _over_keys(jnp.where(mask, x, 0), self.first[...])
        x = x + self.first_bias[...].astype(x.dtype)[None, :, None, None]
        x = jnp.where(mask, jax.nn.leaky_relu(x), 0)
        return logits + own_alibi + _over_keys(x, self.second[...])


def _over_keys(x, kernel):
    """[B, C, L, M] -> [B, F, L, M] with kernel [3, C, F]: 'same' along M."""
    keys, side = x.shape[-1], WINDOW // 2
    x = jnp.pad(x, [(0, 0)] * 3 + [(side, side)])
    taps = [
        jnp.einsum("bclm,cf->bflm", x[..., i : i + keys], kernel[i].astype(x.dtype))
        for i in range(WINDOW)
    ]
    return sum(taps)
