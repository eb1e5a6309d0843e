"""Rows of tokens beside what Q, K and V read: (q, k, v) = Projection(norm(x)) + P_l[t].

    P_l [V, 3, D]     one of each block l; `projection_options.token_rows`

A block's projection hashes the residual stream, in which the token is mixed with all else. A row
of its own tells each head which token it looks at and passes on. Rows per layer and token are
those of Gemma 3n (added to the stream, with a gate) and of value embeddings in public
speed-runs (added to V alone); on Q, K and V, without a gate, is ours. Tokens reach the mixers in
`SeqInfo.tokens`. Rows are drawn as the projection is and trained without decay.
Start at `TokenRows`.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.errors import ConfigError
from memoryformer.notation import Array, Float, Int

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig

FIELD = "model.projection_options.token_rows"


class TokenRows(nnx.Module):
    """P[t]: int [B, L] -> [B, L, count, D]."""

    def __init__(self, config: "ModelConfig", count: int, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        shape = (config.vocab_size, count, config.embed_dim)
        rows = config.mixer_std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.rows = nnx.Param(rows, spec="columns", decay=False)

    def __call__(self, tokens: Int[Array, "B L"] | None) -> Float[Array, "B L P D"]:
        """Read a row for each token; ids outside the vocabulary give NaN, as `Embed`."""
        if tokens is None:
            raise ValueError(f"{FIELD}=True: SeqInfo.tokens is None; give the tokens.")
        rows = jnp.take(self.rows[...], tokens, axis=0, mode="fill")
        return rows.astype(self.dtype)


def make(config: "ModelConfig", count: int, *, rngs: nnx.Rngs) -> TokenRows | None:
    """Make the rows of one mixer with `count` projections, None for a model without."""
    rows = config.projection_options.token_rows
    return TokenRows(config, count, rngs=rngs) if rows else None


def refuse(config: "ModelConfig", what: str) -> None:
    """Raise `ConfigError` for a model with such rows, to which `what` gives no tokens."""
    if config.projection_options.token_rows:
        raise ConfigError(
            f"{FIELD}=True: {what} gives mixers no tokens to find rows by; use a model with "
            "token_rows=False."
        )
