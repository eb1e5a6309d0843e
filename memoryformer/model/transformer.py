"""The language model: embedding, blocks, final norm, head.

    a = x + Mixer(norm1(x))          y = a + FFN(norm2(a))            (residual='sequential')

A memory block's projections are `layers.MemoryLayer`s: Q, K and V share one hash, there is no
output projection and no activation, and FFN = MemoryLayer(D -> K (tau+2)), LayerNorm,
MemoryLayer(K chunks of tau+2 bits -> D). Its dense twin is Pythia's block. Which parts of a block
are which, projection='mixed' says for each layer (`parts`).

Start at `Transformer`; from outside, at `init` and `forward`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from memoryformer.model import (
    codes,
    layers,
    memory_sum,
    mixers,
    ngrams,
    parts,
    recurrence,
    stack,
)
from memoryformer.model.config import ACTIVATIONS, NORMS, ModelConfig
from memoryformer.notation import Activations, Array, Float, Tokens


def make_norm(config: ModelConfig, features: int) -> nnx.Module:
    """Make the block's norm."""
    return NORMS[config.norm](features, eps=config.norm_eps)


def make_projection(
    config: ModelConfig,
    in_features: int,
    features: int | tuple[int, ...],
    *,
    output: bool = False,
    std: float = 0.0,
    part: parts.Part | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Make a projection as a memory layer or a dense one: the block's one factory.

    Args:
      config: the model's.
      in_features: D.
      features: F, or several axes such as (3, D), which share one hash.
      output: the projection writes to the residual stream.
      std: of the weights; 0 takes `mixer_std`, or `output_std` if `output` and dense.
      part: dense, memory or a sum of several, and how; None is as `projection` says.
      rngs: where the weights come from.
    """
    dtype = jnp.dtype(config.dtype)
    part, options = part or parts.usual(config), config.projection_options
    if part.kind == "dense":
        default = options.output_std if output else config.mixer_std
        return layers.Dense(
            in_features,
            features,
            kernel_std=std or default,
            split_inputs=output,
            dtype=dtype,
            rngs=rngs,
        )
    terms = [
        layers.MemoryLayer(
            in_features,
            features,
            code_bits=part.code_bits,
            score=config.score,
            temperature=options.temperature,
            implementation=config.lookup,
            use_bias=options.memory_bias and number == 0,
            table_std=std or config.mixer_std,
            bias_std=options.bias_std,
            mix=mix,
            thresholds=part.thresholds,
            rows_read=options.rows_read,
            dtype=dtype,
            rngs=rngs,
        )
        for number, mix in enumerate(part.mixes)
    ]
    return terms[0] if len(terms) == 1 else memory_sum.MemorySum(terms)


class MemoryFeedForward(nnx.Module):
    """y = ML_2(LayerNorm(act(ML_1(x)))), ML_1 widening every chunk by `extra_bits`."""

    def __init__(self, config: ModelConfig, part: parts.Part, *, rngs: nnx.Rngs):
        bits = part.code_bits + config.projection_options.extra_bits
        hidden = config.embed_dim // part.code_bits * bits
        make = functools.partial(make_projection, config, std=config.ffn_std, rngs=rngs)
        self.up = make(config.embed_dim, hidden, part=part)
        self.activation = config.ffn_activation
        self.norm = layers.LayerNorm(hidden)
        wider = dataclasses.replace(part, code_bits=bits)
        self.down = make(hidden, config.embed_dim, part=wider)

    def __call__(self, x: Activations) -> Activations:
        """[B, L, D] -> [B, L, D]."""
        return self.down(self.norm(ACTIVATIONS[self.activation](self.up(x))))


class DenseFeedForward(nnx.Module):
    """y = W_2 act(W_1 x + b_1) + b_2."""

    def __init__(self, config: ModelConfig, part: parts.Part, *, rngs: nnx.Rngs):
        hidden = config.projection_options.ffn_multiple * config.embed_dim
        make = functools.partial(make_projection, config, part=part, rngs=rngs)
        self.up = make(config.embed_dim, hidden, std=config.ffn_std)
        self.activation = config.ffn_activation
        self.down = make(hidden, config.embed_dim, output=True)

    def __call__(self, x: Activations) -> Activations:
        """[B, L, D] -> [B, L, D]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


def memory_block(
    config: ModelConfig, part: parts.Part, *, rngs: nnx.Rngs
) -> nnx.Module:
    """Make a feed-forward layer of one memory layer, or a sum of several, D -> D."""
    width = config.embed_dim
    return make_projection(
        config, width, width, std=config.ffn_std, part=part, rngs=rngs
    )


FEED_FORWARD: dict[str, Callable[..., nnx.Module]] = {
    "memory": MemoryFeedForward,
    "dense": DenseFeedForward,
    "memory_block": memory_block,
}


class Block(nnx.Module):
    """One layer: a sequence mixer and a feed-forward layer, each behind a norm."""

    def __init__(self, config: ModelConfig, *, layer: int = 0, rngs: nnx.Rngs):
        self.parts = parts.of_layer(config, layer)

        def project(*sizes, output=False, **options):
            part = self.parts.output if output else self.parts.qkv
            options |= {"output": output, "part": part, "rngs": rngs}
            return make_projection(config, *sizes, **options)

        self.residual = config.residual
        self.sequence_chunk = config.sequence_chunk
        self.norm1 = make_norm(config, config.embed_dim)
        self.mixer = mixers.MIXERS[config.mixer](
            config, project, rngs=rngs, layer=layer
        )
        eq13 = config.residual == "eq13"  # one norm for both
        self.norm2 = None if eq13 else make_norm(config, config.embed_dim)
        ffn = self.parts.ffn
        self.ffn = FEED_FORWARD[ffn.kind](config, ffn, rngs=rngs)

    def __call__(
        self, x: Activations, seq: mixers.SeqInfo, state: mixers.State | None = None
    ) -> tuple[Activations, mixers.State | None]:
        """[B, L, D] -> [B, L, D] and the mixer's state."""
        normed = self.norm1(x)
        mixed, state = self.mixer(normed, seq, state)
        if self.norm2 is None:  # eq13: X = Norm(X) overwrites the residual stream
            return normed + mixed + self._feed_forward(normed), state
        if self.residual == "parallel":  # Pythia
            return x + mixed + self._feed_forward(self.norm2(x)), state
        x = x + mixed
        return x + self._feed_forward(self.norm2(x)), state

    def _feed_forward(self, x):
        ffn, params = codes.pure(self.ffn)
        ffn = functools.partial(ffn, params)
        y, read = mixers.by_chunks(ffn, (x,), self.sequence_chunk)
        codes.give(self.ffn, read)
        return y


class Transformer(nnx.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        size = (config.vocab_size, config.embed_dim)
        dtype = jnp.dtype(config.dtype)
        self.embed = layers.Embed(
            *size,
            std=config.embed_std,
            is_head=config.tie_embeddings,
            dtype=dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List(
            [Block(config, layer=i, rngs=rngs) for i in range(config.num_layers)]
        )
        self.remat, self.scan_layers = config.remat, config.scan_layers
        self.streams = mixers.MIXERS[config.mixer].streams(config)
        self.final_norm = make_norm(config, config.embed_dim)
        head = functools.partial(layers.Head, std=config.head_std, dtype=dtype)
        self.head = None if config.tie_embeddings else head(*size[::-1], rngs=rngs)
        project = functools.partial(make_projection, config, rngs=rngs)
        norm = functools.partial(make_norm, config)
        self.recurrence = recurrence.make(config, project, norm, rngs=rngs)
        self.ngrams = ngrams.make(config, rngs=rngs)
        self.has_token_rows = config.projection_options.token_rows

    def __call__(
        self, tokens: Tokens, seq: mixers.SeqInfo, state: mixers.State | None = None
    ) -> tuple[Float[Array, "B L V"], mixers.State | None]:
        """[B, L] -> float32 logits [B, L, V] and the state after these tokens."""
        x, state = self.features(tokens, seq, state)
        return self.logits(x), state

    def features(
        self, tokens: Tokens, seq: mixers.SeqInfo, state: mixers.State | None = None
    ) -> tuple[Activations, mixers.State | None]:
        """[B, L] -> normed [B, L, D], what the head reads."""
        if self.has_token_rows:
            seq = seq._replace(tokens=tokens)
        run = self.run_blocks
        if self.recurrence is not None:
            run = functools.partial(self.recurrence, self)
        if self.ngrams is None or state is None:
            return run(self.embedded(tokens, seq), seq, state)
        before, inner = state
        rows, before = self.ngrams(tokens, seq, before)
        x, inner = run(self.embed(tokens) + rows, seq, inner)
        return x, (before, inner)

    def embedded(self, tokens: Tokens, seq: mixers.SeqInfo) -> Activations:
        """[B, L] -> [B, L, D], what the first block reads of whole rows."""
        x = self.embed(tokens)
        return x if self.ngrams is None else x + self.ngrams(tokens, seq)[0]

    def run_blocks(
        self,
        x: Activations,
        seq: mixers.SeqInfo,
        state: mixers.State | None = None,
        read: recurrence.Read | None = None,
    ) -> tuple[Activations, mixers.State | None]:
        """[B, L, D] through all blocks and the final norm, `read` before each block."""
        if self.streams:  # a memory goes through depth in the place of a state
            memory = None
            for block in self.blocks:
                x, memory = block(x, seq, memory)
            return self.final_norm(x), None
        if state is None and (self.scan_layers or self.remat != "none"):
            x = stack.run_blocks(self.blocks, x, seq, self.remat, self.scan_layers)
            return self.final_norm(x), None
        new_state = []
        for i, block in enumerate(self.blocks):
            x = x if read is None else read(i, x)
            x, block_state = block(x, seq, None if state is None else state[i])
            new_state.append(block_state)
        return self.final_norm(x), None if state is None else tuple(new_state)

    def logits(self, x: Activations) -> Float[Array, "*B V"]:
        """Read the head (or the transposed embedding): [.., D] -> float32 [.., V]."""
        if self.head is not None:
            return self.head(x)
        return self.embed.attend(x)

    def init_state(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> mixers.State:
        """Return the state before any token; a recurrence has one of any length."""
        if self.recurrence is not None:
            inner = self.recurrence.init_state(self, batch_size, dtype)
        else:
            inner = self.init_blocks(batch_size, max_len, dtype)
        if self.ngrams is None:
            return inner
        return self.ngrams.init_state(batch_size), inner

    def init_blocks(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> mixers.State:
        """Return the state of every block, before any token."""
        return tuple(
            b.mixer.init_state(batch_size, max_len, dtype) for b in self.blocks
        )
