"""A causal PMI: a working memory that is gated and a long-term one that associates.

Ours, after "A Framework for Inference Inspired by Human Memory Mechanisms" (Zeng et al. 2024),
whose model looks both ways and passes its memories through depth (`tasks.pmi` has that one).
Here they go from chunk to chunk. Start at `PMI`; `keep_largest` and `associate` serve both.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model.mixers.base import wide
from memoryformer.model.recurrence import base
from memoryformer.model.recurrence.slots import Slots
from memoryformer.notation import Activations, Array, Bool, Float
from memoryformer.ops import collectives

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


def keep_largest(weights: Float[Array, "*B S"], k: int) -> Float[Array, "*B S"]:
    """Zero all but the k largest weights of each row; k = 0 or k >= S keeps all.

    What is kept is not renormalised, as published. Equals of the k-th largest are kept.
    """
    if not 0 < k < weights.shape[-1]:
        return weights
    least = jax.lax.stop_gradient(jax.lax.top_k(weights, k)[0][..., -1:])
    return jnp.where(weights >= least, weights, 0)


def associate(
    fragments: Float[Array, "B C n D"], slots: Float[Array, "B n D"], association: str
) -> Float[Array, "B C n D"]:
    """What long-term memory M_l gains from slots M.

    outer   M[n] (M_l[c,n] . M[n]) / D     M[n] M[n]^T, applied to what is there; ours
    sum     M[n] sum_d M_l[c,n,d]          as published code computes its "outer product"
    """
    slots = slots[:, None]  # [B, 1, n, D]
    axis = collectives.MODEL_AXIS
    if association == "outer":
        return slots * collectives.mean(fragments * slots, axis)
    width = fragments.shape[-1] * collectives.axis_size(axis)
    return slots * collectives.mean(fragments, axis) * width


class PMI(Slots):
    """Working memory M_w [n, D] and long-term memory M_l [C, n, D], one after the other in M.

        U_w, U_l = att(norm(x), M_w), att(norm(x), mean_C M_l; k)            before each block
        x <- x + share U_w + (1 - share) U_l

        M~  = norm(M_w + att(M_w, y; k)),   M~ <- norm(M~ + relu(f(M~)))     after a chunk
        M_l <- norm(M_l + associate(M_l, M~))
        [i, f] = G_y(norm(mean_t y)) + G_w(norm(M_w))
        M_w <- sigmoid(i + b_i) tanh(M~) + sigmoid(f + b_f) M_w

    att(q, kv; k) keeps the k largest weights of each query. Its projections are the same for
    tokens and slots, for reading and writing, and in all blocks. Beside looking back only, this
    differs from the published model:

    * What is read from both memories is averaged. U_l asking U_w would let a token see later ones.
    * Logits are divided by sqrt(E), f is applied once, the slots share G_w, and G_y reads a mean
      of either sign.
    * Memories start at trained values, and slots are projected behind a norm: a padded identity
      and values in [0, 1) have the same signs everywhere, so that a hash could not tell them apart.
    """

    of_memory = ("hidden", "gate_chunk", "gate_slots")

    @dataclasses.dataclass(frozen=True)
    class Options(base.Recurrence.Options):
        """And the size of the long-term memory, how sparsely is written, what is read."""

        num_fragments: int = field(
            "numbers", 5, doc="C, copies of the slots in long-term memory."
        )
        top_k: int = field(
            "numbers",
            5,
            doc="k, weights kept in writing and in reading long-term memory; 0: all.",
        )
        working_share: float = field(
            "numbers", 0.7, doc="Share of working memory in what is read."
        )

        def __post_init__(self):
            super().__post_init__()
            config_lib.at_least(self, base.OPTIONS, 1, "num_fragments")
            config_lib.at_least(self, base.OPTIONS, 0, "top_k")
            if not 0 <= self.working_share <= 1:
                raise ConfigError(
                    f"{base.OPTIONS}.working_share={self.working_share}: must be "
                    "between 0 and 1."
                )

    EXAMPLES: ClassVar = {"pmi": {"num_slots": 8}}

    @classmethod
    def cost(
        cls, config: "ModelConfig", block: int, project: Callable[[int], Any]
    ) -> base.Cost:
        """Of a chunk: each block projects S queries and reads 2 n slots with 4 S n D; 2 n keys
        and values; the writer projects n queries, S keys and values, n hidden rows and
        n + 1 pairs of gates, and takes 2 n S D and 2 C n D.
        """
        size, options = base.chunk_size(config), config.recurrence_options
        n, fragments = options.num_slots, options.num_fragments
        width, num_layers = config.embed_dim, config.num_layers
        one, two = project(width), project(2 * width)
        read = size * one.multiply_adds + 4 * size * n * width
        write = (2 * n + size) * two.multiply_adds + 2 * n * one.multiply_adds
        write += (n + 1) * two.multiply_adds + 2 * n * (size + fragments) * width
        chunks = config.seq_len // size
        memory = n * (1 + fragments) * width
        return base.Cost(
            multiply_adds=chunks * (num_layers * read + write),
            parameters=memory + 2,
            projections=(one, one, two, two, two),
            norms=6,
            state_values=memory + (5 * n + size) * width,
        )

    def __init__(self, config, project: Callable, norm: Callable, *, rngs: nnx.Rngs):
        super().__init__(config, project, norm, rngs=rngs)
        options = config.recurrence_options
        self.num_fragments, self.top_k = options.num_fragments, options.top_k
        self.working_share = options.working_share
        self.head_dim, width = config.head_dim, config.embed_dim
        self.query = project(width, width)
        self.key_value = project(width, (2, width))
        self.token_norm, self.slot_norm = norm(width), norm(width)
        self.hidden = project(width, width)
        self.written_norm, self.hidden_norm = norm(width), norm(width)
        self.long_term_norm = norm(width)
        self.chunk_norm = norm(width)
        self.gate_chunk = project(width, (2, width))
        self.gate_slots = project(width, (2, width))
        self.input_bias = nnx.Param(jnp.zeros(()), spec="whole", decay=False)
        self.forget_bias = nnx.Param(jnp.ones(()), spec="whole", decay=False)
        # Slots of working memory start at length 1, as rows of the published identity do;
        # those of long-term memory at the length that a norm gives them.
        draw = jax.random.normal(rngs.params(), (self.num_slots, width))
        self.working = nnx.Param(draw * width**-0.5, spec="last_axis", decay=True)
        shape = (self.num_fragments, self.num_slots, width)
        draw = jax.random.normal(rngs.params(), shape)
        self.long_term = nnx.Param(draw, spec="last_axis", decay=True)

    def initial(self) -> Float[Array, "m D"]:
        """Return both memories, as trained: [n + C n, D]."""
        working, long_term = self.working[...], self.long_term[...]
        flat = long_term.reshape(-1, working.shape[-1])
        return jnp.concatenate([working, flat])

    def reads(self, memory: base.Memory) -> tuple[Array, Array]:
        """Queries of the slots [B, n, D], and keys and values of both memories
        [B, 2 n, 2, D]: tokens come last through both projections, for `model.codes`.
        """
        working, long_term = self._parted(memory)
        normed = self.slot_norm(working)
        recalled = self.slot_norm(jnp.mean(long_term, axis=1))
        both = jnp.concatenate([normed, recalled], axis=1)
        return self.query(normed), self.key_value(both)

    def reader(self, reads: tuple[Array, Array]) -> base.Read:
        """Before each block: x + share U_w + (1 - share) U_l."""
        n = self.num_slots
        keys_values = reads[1]

        def read(block, x):
            q = self.query(self.token_norm(x))
            u_w = self._attend(q, keys_values[:, :n])
            u_l = self._attend(q, keys_values[:, n:], self.top_k)
            u = self.working_share * u_w + (1 - self.working_share) * u_l
            return x + u.astype(x.dtype)

        return read

    def write(
        self,
        memory: base.Memory,
        reads: tuple[Array, Array],
        y: Activations,
        real: Bool[Array, "B S"],
    ) -> base.Memory:
        """[B, n + C n, D], [B, S, D] -> [B, n + C n, D]."""
        working, long_term = self._parted(memory)
        attended = self._attend(reads[0], self.key_value(y), self.top_k, real)
        update = self.written_norm(working + attended.astype(working.dtype))
        update = self.hidden_norm(update + jax.nn.relu(self.hidden(update)))
        long_term = long_term + associate(long_term, update, "outer")
        long_term = self.long_term_norm(long_term)
        gates = wide(self.gate_slots(self.slot_norm(working)))
        gates += wide(self.gate_chunk(self.chunk_norm(_mean(y, real))))
        enter = jax.nn.sigmoid(gates[:, :, 0] + self.input_bias[...])
        keep = jax.nn.sigmoid(gates[:, :, 1] + self.forget_bias[...])
        working = enter * jnp.tanh(wide(update)) + keep * wide(working)
        flat = long_term.reshape(len(memory), -1, memory.shape[-1])
        return jnp.concatenate([working.astype(memory.dtype), flat], axis=1)

    def _parted(self, memory):
        """[B, m, D] -> [B, n, D], [B, C, n, D]."""
        n = self.num_slots
        shape = (len(memory), self.num_fragments, n, memory.shape[-1])
        return memory[:, :n], memory[:, n:].reshape(shape)

    def _attend(self, q, keys_values, top_k=0, real=None):
        """[B, S, D], [B, T, 2, D] -> [B, S, D] in float32."""
        heads = (-1, self.head_dim)
        k, v = (
            wide(keys_values)[:, :, i].reshape(*keys_values.shape[:2], *heads)
            for i in range(2)
        )
        q = wide(q).reshape(*q.shape[:2], *heads)
        logits = jnp.einsum("bshe,bthe->bhst", q, k) * self.head_dim**-0.5
        if real is not None:  # a chunk of padding alone stays finite
            real = real[:, None, None]
            logits = jnp.where(real, logits, jnp.finfo(logits.dtype).min)
        weights = keep_largest(jax.nn.softmax(logits, axis=-1), top_k)
        if real is not None:
            weights = jnp.where(real, weights, 0)
        y = jnp.einsum("bhst,bthe->bshe", weights, v)
        return y.reshape(*y.shape[:2], -1)


def _mean(y, real):
    """Mean over the real tokens: [B, S, D] -> [B, 1, D]."""
    total = jnp.sum(jnp.where(real[..., None], y, 0), axis=1, keepdims=True)
    count = jnp.maximum(jnp.sum(real, axis=1), 1).astype(y.dtype)
    return total / count[:, None, None]
