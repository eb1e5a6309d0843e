"""Memformer (Wu et al. 2020): memory as slots that blocks read and one writer updates."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model.mixers.base import wide
from memoryformer.model.recurrence import base
from memoryformer.model.recurrence.slots import Slots
from memoryformer.notation import Activations, Array, Bool, Float
from memoryformer.ops import collectives

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class Memformer(Slots):
    """Memory as slots: every block reads them, one writer updates them after the last.

        x <- x + Attn(q = norm(x), kv = norm(M))                       before each block
        a_i = softmax(q_i . [k_i; K(y)] / (tau sqrt(E)))               slot i: itself and y
        m_i' = a_i [m_i; V(y)],    M' = (m' + b) / |m' + b|,   M_init = b / |b|

    q_i and k_i are projections of norm(m_i). The published model reads in an encoder, without
    norms; ours is its decoder-only form, and the norm is a learned factor for slots of length
    1, which a hash needs: tables are hardly read where all values are near zero.
    """

    of_memory = ("query",)  # projections of slots

    @dataclasses.dataclass(frozen=True)
    class Options(base.Recurrence.Options):
        """And how sharply slots choose what is written to them."""

        temperature: float = field("numbers", 0.5, doc="tau of writing.")

        def __post_init__(self):
            super().__post_init__()
            if self.temperature <= 0:
                raise ConfigError(
                    f"{base.OPTIONS}.temperature={self.temperature}: must be > 0."
                )

    EXAMPLES: ClassVar = {"memformer": {"num_slots": 64}}

    @classmethod
    def cost(
        cls, config: "ModelConfig", block: int, project: Callable[[int], Any]
    ) -> base.Cost:
        """Of a chunk: each block projects S queries and m keys and values and reads them with
        2 S m D; the writer projects m queries and S + m keys and values, and 2 m (S + 1) D.
        """
        size, num_slots = base.chunk_size(config), config.recurrence_options.num_slots
        width, num_layers = config.embed_dim, config.num_layers
        q, kv = project(width), project(2 * width)
        out = (project(width),) if config.output_projection else ()
        read = size * sum(layer.multiply_adds for layer in (q, *out))
        read += num_slots * kv.multiply_adds + 2 * size * num_slots * width
        write = num_slots * q.multiply_adds + (size + num_slots) * kv.multiply_adds
        write += 2 * num_slots * (size + 1) * width
        chunks = config.seq_len // size
        return base.Cost(
            multiply_adds=chunks * (num_layers * read + write),
            parameters=num_slots * width,
            projections=(q, kv, *out) * num_layers + (q, kv),
            norms=2 * num_layers + 1,
            state_values=(num_slots + 2 * num_slots * num_layers + size) * width,
        )

    def __init__(self, config, project: Callable, norm: Callable, *, rngs: nnx.Rngs):
        super().__init__(config, project, norm, rngs=rngs)
        self.head_dim, width = config.head_dim, config.embed_dim
        self.width, self.temperature = width, config.recurrence_options.temperature
        self.readers = nnx.List(
            [_Reader(config, project, norm) for _ in range(config.num_layers)]
        )
        self.norm = norm(width)
        self.query = project(width, width)
        self.key_value = project(width, (2, width))
        bias = jax.random.normal(rngs.params(), (self.num_slots, width)) * width**-0.5
        # Not decayed: its direction is where slots start, and its length, against that of
        # what is written, says how fast they forget. Zero would leave no start at all.
        self.bias = nnx.Param(bias, spec="last_axis", decay=False)  # [m, D]

    def initial(self) -> Float[Array, "m D"]:
        """b / |b|."""
        return self._normalised(jnp.zeros_like(self.bias[...]))

    def reads(self, memory: base.Memory) -> tuple[Array, ...]:
        """Keys and values [B, m, 2, H, E] of each block."""
        return tuple(reader.keys_values(memory) for reader in self.readers)

    def reader(self, reads: tuple[Array, ...]) -> base.Read:
        """Let every block read with its own projections."""
        return lambda i, x: self.readers[i](x, reads[i])

    def write(
        self,
        memory: base.Memory,
        reads: tuple[Array, ...],
        y: Activations,
        real: Bool[Array, "B S"],
    ) -> base.Memory:
        """[B, m, D], [B, S, D] -> [B, m, D]."""
        heads = (-1, self.head_dim)
        normed = self.norm(memory)
        q = wide(self.query(normed)).reshape(*memory.shape[:2], *heads)
        own = wide(self.key_value(normed))[:, :, 0].reshape(q.shape)
        kv = wide(self.key_value(y)).reshape(*y.shape[:2], 2, *heads)
        before = wide(memory).reshape(q.shape)
        scale = self.temperature * self.head_dim**0.5
        itself = jnp.sum(q * own, axis=-1) / scale  # [B, m, H]
        tokens = jnp.einsum("bmhe,bshe->bmhs", q, kv[:, :, 0]) / scale
        tokens = jnp.where(real[:, None, None], tokens, -jnp.inf)
        weights = jnp.concatenate([itself[..., None], tokens], axis=-1)
        weights = jax.nn.softmax(weights, axis=-1)
        written = weights[..., :1] * before
        written += jnp.einsum("bmhs,bshe->bmhe", weights[..., 1:], kv[:, :, 1])
        return self._normalised(written.reshape(memory.shape)).astype(memory.dtype)

    def _normalised(self, slots):
        """(m + b) / |m + b|."""
        bias = self.bias[...]
        moved = slots + bias.reshape((1,) * (slots.ndim - 2) + bias.shape)
        square = collectives.mean(moved**2, collectives.MODEL_AXIS) * self.width
        return moved * jax.lax.rsqrt(jnp.maximum(square, 1e-30))


class _Reader(nnx.Module):
    """x + Attn(q = norm(x), kv = norm(M)) for one block: every slot is seen by every token."""

    of_memory = ("key_value",)

    def __init__(self, config, project: Callable, norm: Callable):
        self.head_dim, width = config.head_dim, config.embed_dim
        self.norm, self.memory_norm = norm(width), norm(width)
        self.query = project(width, width)
        self.key_value = project(width, (2, width))
        needs_out = config.output_projection
        self.out = project(width, width, output=True) if needs_out else None

    def keys_values(self, memory: base.Memory) -> Array:
        """[B, m, D] -> [B, m, 2, H, E]."""
        kv = self.key_value(self.memory_norm(memory))
        return kv.reshape(*memory.shape[:2], 2, -1, self.head_dim)

    def __call__(self, x: Activations, keys_values: Array) -> Activations:
        """[B, L, D] -> [B, L, D]."""
        q = self.query(self.norm(x))
        q = wide(q).reshape(*x.shape[:2], -1, self.head_dim)
        k, v = (wide(keys_values)[:, :, i] for i in range(2))
        logits = jnp.einsum("blhe,bmhe->blhm", q, k) * self.head_dim**-0.5
        y = jnp.einsum("blhm,bmhe->blhe", jax.nn.softmax(logits, axis=-1), v)
        y = y.reshape(x.shape).astype(x.dtype)
        return x + (y if self.out is None else self.out(y))
