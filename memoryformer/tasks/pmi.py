"""PMI as its authors coded it, with the universal transformer that it was compared with.

"A Framework for Inference Inspired by Human Memory Mechanisms" (Zeng et al. 2024), re-derived
from the equations of their code. One block is used in every layer; a working memory M_w [n, D]
and a long-term memory M_l [C, n, D] go from layer to layer, and tokens meet only through them.

    A    = W_in LN(x)
    M~   = LN1(M_w + att(A, M_w; k));   M~ <- LN2(M~ + f(f(f(f(M~)))))       write
    M_l  <- LN3(M_l + associate(M_l, M~))
    i, f = G_A(mean_t relu(w * A_t)) + G_M[n](tanh M_w)
    M_w  <- sigmoid(i + b_i) tanh(M~) + sigmoid(f + b_f) M_w
    U_w  = att(M_w, A)                                                        read
    U_l  = att(mean_C M_l, A; k);   U_wl = att(U_w, U_l)
    x    <- x + share U_w + (1 - share) U_wl;   x <- x + FFN(LN(x))

    att(kv, q; k) = top_k(softmax(q W_q (kv W_k)^T)) kv W_v

f is relu(W x + b). One W_q, W_k, W_v serve all attentions; there is no 1/sqrt(d) and no output
projection, and the k weights that are kept are not renormalised. `association="sum"` is the
coded M_l, "outer" what the text means: see `model.recurrence.pmi.associate`. Not coded here:
dropout, because every batch of our tasks is fresh. Ours: M_l starts at the same numbers in
every call, so that a run goes on bit for bit; padding is neither written nor counted.

Start at `Encoder`; `PMIConfig` has the published ablations.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model import layers
from memoryformer.model.recurrence.pmi import associate, keep_largest
from memoryformer.notation import Activations, Array, Bool, Float

MEMORIES = ("both", "working", "none")
REPEATS = 4  # of f in a write


@dataclasses.dataclass(frozen=True)
class PMIConfig:
    """The model of a task; every field can be set as `--config.model.FIELD=...`."""

    embed_dim: int = field("numbers", 64, doc="D, the width.")
    num_layers: int = field("numbers", 3, doc="Times that the block is applied.")
    num_heads: int = field("numbers", 4, doc="H; must divide D.")
    key_dim: int = field("numbers", 32, doc="Width of a head's queries and keys.")
    ffn_dim: int = field("numbers", 128, doc="Hidden width of the feed-forward layer.")
    memory: str = field(
        "numbers",
        "both",
        doc="both | working (a shared workspace) | none (a universal transformer).",
    )
    association: str = field(
        "numbers",
        "outer",
        doc="What M_l gains: outer (as the text means it) | sum (as coded).",
    )
    num_slots: int = field("numbers", 8, doc="n, rows of M_w.")
    num_fragments: int = field("numbers", 5, doc="C, fragments of M_l.")
    top_k: int = field("numbers", 5, doc="k, weights kept; 0: all ('+soft').")
    ask_working: bool = field(
        "numbers", True, doc="Whether U_l asks U_w; False: U_l itself ('w/o 2')."
    )
    working_share: float = field(
        "numbers", 0.7, doc="Share of U_w in what is read; 0: none of it ('w/o 3')."
    )
    share_parameters: bool = field(
        "numbers", True, doc="Whether all layers are one block ('w/o 1': neither)."
    )
    share_memory: bool = field(
        "numbers", True, doc="Whether layers hand memories on; False: each starts anew."
    )
    memory_seed: int = field("numbers", 0, doc="Of the numbers where M_l starts.")
    dtype: str = field("numbers", "float32", doc="float32 | float64.")

    def __post_init__(self):
        sizes = ("embed_dim", "num_layers", "num_heads", "key_dim", "ffn_dim")
        config_lib.at_least(self, "model", 1, *sizes, "num_slots", "num_fragments")
        config_lib.at_least(self, "model", 0, "top_k", "memory_seed")
        config_lib.choose(self.memory, MEMORIES, "model.memory")
        config_lib.choose(self.association, ("outer", "sum"), "model.association")
        config_lib.choose(self.dtype, ("float32", "float64"), "model.dtype")
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} does not divide "
                f"model.embed_dim={self.embed_dim}: choose a divisor."
            )
        if not 0 <= self.working_share <= 1:
            raise ConfigError(
                f"model.working_share={self.working_share}: must be between 0 and 1."
            )


class Memories(NamedTuple):
    """What goes from layer to layer."""

    working: Float[Array, "B n D"]
    long_term: Float[Array, "B C n D"]


def first_memories(config: PMIConfig, batch_size: int) -> Memories:
    """M_w the identity padded to [n, D], M_l uniform in [0, 1)."""
    n, width = config.num_slots, config.embed_dim
    rng = np.random.default_rng(config.memory_seed)
    long_term = rng.random((config.num_fragments, n, width))
    one = (jnp.asarray(x, config.dtype) for x in (np.eye(n, width), long_term))
    return Memories(*(jnp.repeat(x[None], batch_size, axis=0) for x in one))


class Encoder(nnx.Module):
    """Tokens [B, T, D] through all layers, and the final norm."""

    def __init__(self, config: PMIConfig, *, rngs: nnx.Rngs):
        self.config = config
        count = 1 if config.share_parameters else config.num_layers
        self.blocks = nnx.Dict(
            {f"{i:02d}": Block(config, rngs=rngs) for i in range(count)}
        )
        self.final_norm = layers.LayerNorm(config.embed_dim)

    def __call__(self, x: Activations, real: Bool[Array, "B T"]) -> Activations:
        """[B, T, D] -> [B, T, D]; sinusoidal positions are added first."""
        x = x + positions(x.shape[1], x.shape[2]).astype(x.dtype)[None]
        first = first_memories(self.config, len(x))

        def layer(carry, block):
            x, after = block(carry[0], real, carry[1])
            return x, after if self.config.share_memory else first

        carry = x, first
        if self.config.share_parameters:  # compiled once
            block, times = self.blocks["00"], self.config.num_layers
            carry = jax.lax.fori_loop(0, times, lambda _, c: layer(c, block), carry)
        else:
            for block in self.blocks.values():
                carry = layer(carry, block)
        x, _ = carry
        return self.final_norm(x)


class Block(nnx.Module):
    """One layer: memories or self-attention, then a feed-forward layer, each behind a norm."""

    def __init__(self, config: PMIConfig, *, rngs: nnx.Rngs):
        width = config.embed_dim
        kind = SelfAttention if config.memory == "none" else Memory
        self.norm1, self.norm2 = layers.LayerNorm(width), layers.LayerNorm(width)
        self.mixer = kind(config, rngs=rngs)
        self.up = dense(config, width, config.ffn_dim, rngs=rngs)
        self.down = dense(config, config.ffn_dim, width, rngs=rngs)

    def __call__(
        self, x: Activations, real: Bool[Array, "B T"], memories: Memories
    ) -> tuple[Activations, Memories]:
        """[B, T, D] -> [B, T, D] and the memories after it."""
        mixed, memories = self.mixer(self.norm1(x), real, memories)
        x = x + mixed
        return x + self.down(jax.nn.relu(self.up(self.norm2(x)))), memories


class SelfAttention(nnx.Module):
    """What a universal transformer has instead: softmax attention among the tokens."""

    def __init__(self, config: PMIConfig, *, rngs: nnx.Rngs):
        width, heads = config.embed_dim, config.num_heads
        self.qkv = dense(config, width, (3, heads, width // heads), rngs=rngs)
        self.out = dense(config, width, width, rngs=rngs)

    def __call__(
        self, x: Activations, real: Bool[Array, "B T"], memories: Memories
    ) -> tuple[Activations, Memories]:
        """[B, T, D] -> [B, T, D]; the memories are handed on as they are."""
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        y = attend(q * q.shape[-1] ** -0.5, k, v, real)
        return self.out(y), memories


class Memory(nnx.Module):
    """Tokens write into the memories and read them: the equations at the top."""

    def __init__(self, config: PMIConfig, *, rngs: nnx.Rngs):
        width, heads, n = config.embed_dim, config.num_heads, config.num_slots
        self.config = config
        self.enter = dense(config, width, width, rngs=rngs)
        self.query = dense(config, width, (heads, config.key_dim), rngs=rngs)
        self.key = dense(config, width, (heads, config.key_dim), rngs=rngs)
        self.value = dense(config, width, (heads, width // heads), rngs=rngs)
        self.hidden = dense(config, width, width, rngs=rngs)
        self.norm1, self.norm2 = layers.LayerNorm(width), layers.LayerNorm(width)
        self.norm3 = layers.LayerNorm(width) if config.memory == "both" else None
        scale = jax.random.normal(rngs.params(), (width,))
        self.gate_scale = nnx.Param(scale, spec="whole", decay=False)  # w
        self.gate_tokens = dense(config, width, (2, width), rngs=rngs)
        bound, shape = (2 * width) ** -0.5, (n, width, 2, width)
        kernel = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        self.gate_slots = nnx.Param(kernel, spec="whole", decay=True)  # G_M
        bias = jnp.zeros((n, 2, width))
        self.gate_slots_bias = nnx.Param(bias, spec="whole", decay=False)
        self.input_bias = nnx.Param(jnp.zeros(()), spec="whole", decay=False)
        self.forget_bias = nnx.Param(jnp.ones(()), spec="whole", decay=False)

    def __call__(
        self, x: Activations, real: Bool[Array, "B T"], memories: Memories
    ) -> tuple[Activations, Memories]:
        """Return U [B, T, D] and the memories after this layer."""
        a = self.enter(x)
        memories = self.write(a, real, memories)
        return self.read(a, real, memories), memories

    def write(
        self, a: Activations, real: Bool[Array, "B T"], memories: Memories
    ) -> Memories:
        """Return the memories after tokens A [B, T, D]."""
        working, long_term = memories
        update = self.norm1(working + self._attend(a, working, real, self.config.top_k))
        hidden = update
        for _ in range(REPEATS):
            hidden = jax.nn.relu(self.hidden(hidden))
        update = self.norm2(update + hidden)
        if self.norm3 is not None:
            gain = associate(long_term, update, self.config.association)
            long_term = self.norm3(long_term + gain)
        enter, keep = self._gates(a, real, working)
        return Memories(enter * jnp.tanh(update) + keep * working, long_term)

    def read(
        self, a: Activations, real: Bool[Array, "B T"], memories: Memories
    ) -> Activations:
        """Return U [B, T, D]."""
        config, every = self.config, jnp.ones(memories.working.shape[:2], bool)
        u_w = self._attend(memories.working, a, every)
        if config.memory == "working":
            return u_w
        u_l = self._attend(memories.long_term.mean(axis=1), a, every, config.top_k)
        if config.ask_working:
            u_l = self._attend(u_w, u_l, real)
        return config.working_share * u_w + (1 - config.working_share) * u_l

    def _gates(self, a, real, working):
        """What of the update enters and what of M_w is kept, both in (0, 1), [B, n, D]."""
        active = jax.nn.relu(a * layers.align(self.gate_scale[...], a.ndim))
        total = jnp.sum(jnp.where(real[..., None], active, 0), axis=1)
        mean = total / jnp.sum(real, axis=1, keepdims=True)
        kernel = self.gate_slots[...].astype(working.dtype)
        gates = jnp.einsum("bnd,ndgf->bngf", jnp.tanh(working), kernel)
        gates = gates + layers.align(self.gate_slots_bias[...], gates.ndim)
        gates = gates + self.gate_tokens(mean)[:, None]
        enter = jax.nn.sigmoid(gates[:, :, 0] + self.input_bias[...])
        return enter, jax.nn.sigmoid(gates[:, :, 1] + self.forget_bias[...])

    def _attend(self, kv, q, real, top_k=0):
        """att(kv, q; k): [B, S, D] for q [B, S, D], kv and real [B, T, D] and [B, T]."""
        return attend(self.query(q), self.key(kv), self.value(kv), real, top_k)


def attend(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B T H E"],
    v: Float[Array, "B T H F"],
    real: Bool[Array, "B T"],
    top_k: int = 0,
) -> Activations:
    """Read real tokens by the softmax of q . k, of each query the `top_k` largest weights."""
    logits = jnp.einsum("bshe,bthe->bhst", q, k)
    logits = jnp.where(real[:, None, None], logits, -jnp.inf)
    weights = keep_largest(jax.nn.softmax(logits, axis=-1), top_k)
    y = jnp.einsum("bhst,bthf->bshf", weights, v)
    return y.reshape(*y.shape[:2], -1)


def positions(length: int, width: int) -> Float[Array, "T D"]:
    """Sines and cosines of wave lengths from 2 pi to 10,000 times that."""
    angle = np.arange(length)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    both = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, -1)
    return jnp.asarray(both[:, :width])


def dense(
    config: PMIConfig, inputs: int, features: Any, *, std: float = 0.0, rngs: nnx.Rngs
) -> layers.Dense:
    """Make a dense layer whose kernel has variance 1 / (3 inputs), as PyTorch's has, or std."""
    return layers.Dense(
        inputs,
        features,
        kernel_std=std or (3 * inputs) ** -0.5,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )
