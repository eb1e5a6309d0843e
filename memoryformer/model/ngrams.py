"""Rows of hashed n-grams, added to the embedding: x_i = W[t_i] + sum_n G_n[bucket(t_{i-n+1} .. t_i)].

    n = 2 .. N     N = `projection_options.ngram_order`
    G_n [R, D]     R = `projection_options.ngram_rows`; 0: none

The address is of tokens alone, so it is known before the first layer. An n-gram ends where its
document begins: the first n - 1 tokens read none. Decoding keeps the last N - 1 tokens. Rows
are trained as the embedding is, without decay. Hashes: `ops.ngrams`.
Start at `NgramRows`.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.errors import ConfigError
from memoryformer.model import mixers
from memoryformer.notation import Activations, Array, Int, Tokens
from memoryformer.ops import lookup
from memoryformer.ops import ngrams as ngrams_ops

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig

Before = Int[Array, "B P"]  # the last P = N - 1 tokens


class NgramRows(nnx.Module):
    """sum_n G_n[bucket_n]: [B, L] -> [B, L, D]."""

    def __init__(self, config: "ModelConfig", *, rngs: nnx.Rngs):
        options = config.projection_options
        self.order, self.num_rows = options.ngram_order, options.ngram_rows
        self.dtype = jnp.dtype(config.dtype)
        # A one-hot product of so many rows would cost more than the model.
        onehot = config.lookup == "onehot"
        self.implementation = "xla" if onehot else config.lookup
        size = ((self.order - 1) * self.num_rows, config.embed_dim)
        rows = config.embed_std * jax.random.normal(rngs.params(), size, jnp.float32)
        self.rows = nnx.Param(rows, spec="columns", decay=False)

    def __call__(
        self, tokens: Tokens, seq: mixers.SeqInfo, before: Before | None = None
    ) -> tuple[Activations, Before]:
        """Return the rows of tokens [B, L], [B, L, D], and the tokens before the next ones."""
        if before is None:
            before = self.init_state(tokens.shape[0])
        orders = range(2, self.order + 1)
        codes = [ngrams_ops.buckets(tokens, before, n, self.num_rows) for n in orders]
        whole = [ngrams_ops.whole(tokens, before, seq.positions, n) for n in orders]
        rows = self.rows[...].astype(self.dtype)
        y = lookup.lookup(
            rows.reshape(self.order - 1, self.num_rows, -1),  # [N - 1, R, D]
            jnp.stack(codes, axis=-1),
            jnp.stack(whole, axis=-1).astype(jnp.float32),
            self.implementation,
        )
        return y.astype(self.dtype), ngrams_ops.last(tokens, before)

    def init_state(self, batch_size: int) -> Before:
        """Return what stands before the first token: nothing."""
        shape = (batch_size, self.order - 1)
        return jnp.full(shape, ngrams_ops.NOTHING, jnp.int32)


def make(config: "ModelConfig", *, rngs: nnx.Rngs) -> NgramRows | None:
    """Make the rows of a model's config, None where it has none."""
    return NgramRows(config, rngs=rngs) if num_values(config) else None


def num_values(config: "ModelConfig") -> int:
    """Return how many values a token reads of them: (N - 1) D."""
    options = config.projection_options
    return (options.ngram_order - 1) * config.embed_dim if options.ngram_rows else 0


def check_sequence(config: "ModelConfig", num_devices: int) -> None:
    """Raise `ConfigError` where the tokens of a row are split over devices."""
    if num_devices > 1 and num_values(config):
        raise ConfigError(
            f"mesh: model.projection_options.ngram_rows={config.projection_options.ngram_rows}: "
            "an n-gram would lie over the border of two devices along 'sequence'; use another "
            "mesh, or ngram_rows=0."
        )
