"""Memformer (Wu et al. 2020): memory as slots that blocks read and one writer updates."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model.mixers.base import wide
from memoryformer.model.recurrence import base
from memoryformer.notation import Activations, Array, Bool, Float
from memoryformer.ops import collectives

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class _OpenChunk(NamedTuple):
    """Memformer: the memory as every block reads it, and the outputs to be written."""

    reads: tuple[Array, ...]  # of each block, keys and values [B, m, 2, H, E]
    outputs: Activations  # [B, S, D]
    real: Bool[Array, "B S"]


class Memformer(base.Recurrence):
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

    def whole(
        self,
        trunk: base.Trunk,
        memory: base.Memory,
        x: Activations,
        real: Bool[Array, "B S"],
    ) -> tuple[Activations, base.Memory]:
        """The chunk with its memory read: y [B, S, D] and the new memory."""
        reads = self._reads(memory)
        y, _ = trunk.run_blocks(x, self.sequence(real), None, self._reader(reads))
        return y, self._write(memory, y, real)

    def init_chunk(self, state: base.RecurrentState) -> _OpenChunk:
        """Keys and values of the slots, and room for a chunk's outputs."""
        batch_size, _, width = state.memory.shape
        dtype = state.memory.dtype
        outputs = jnp.zeros((batch_size, self.chunk_size, width), dtype)
        real = jnp.zeros((batch_size, self.chunk_size), bool)
        return _OpenChunk(self._stored_reads(state.memory, dtype), outputs, real)

    def open(
        self, trunk: base.Trunk, state: base.RecurrentState, dtype: jnp.dtype
    ) -> base.RecurrentState:
        """Project the memory once for all tokens of the chunk."""
        reads = self._stored_reads(state.memory, dtype)
        real = jnp.zeros_like(state.chunk.real)
        return state._replace(chunk=state.chunk._replace(reads=reads, real=real))

    def extend(
        self,
        trunk: base.Trunk,
        state: base.RecurrentState,
        x: Activations,
        real: Bool[Array, "B P"],
    ) -> tuple[Activations, base.RecurrentState]:
        """Some tokens of a chunk, after those in the state."""
        chunk = state.chunk
        seq, read = (
            self.sequence(real, state.tokens),
            self._reader(chunk.reads),
        )
        y, blocks = trunk.run_blocks(x, seq, state.blocks, read)
        outputs = jax.lax.dynamic_update_slice_in_dim(
            chunk.outputs, y.astype(chunk.outputs.dtype), state.slots, axis=1
        )
        real = jax.lax.dynamic_update_slice_in_dim(
            chunk.real, real, state.slots, axis=1
        )
        chunk = chunk._replace(outputs=outputs, real=real)
        return y, state._replace(blocks=blocks, chunk=chunk)

    def close(
        self, trunk: base.Trunk, state: base.RecurrentState, dtype: jnp.dtype
    ) -> base.Memory:
        """Write the chunk's outputs."""
        memory, chunk = state.memory.astype(dtype), state.chunk
        return self._write(memory, chunk.outputs.astype(dtype), chunk.real)

    def _reads(self, memory):
        return tuple(reader.keys_values(memory) for reader in self.readers)

    def _stored_reads(self, memory, dtype):
        reads = self._reads(memory.astype(dtype))
        return tuple(kv.astype(memory.dtype) for kv in reads)

    def _reader(self, reads):
        return lambda i, x: self.readers[i](x, reads[i])

    def _write(self, memory, y, real):
        """[B, m, D], [B, S, D] -> [B, m, D]."""
        heads = (-1, self.head_dim)
        normed = self.norm(memory)
        q = wide(self.query(normed)).reshape(*memory.shape[:2], *heads)
        own = wide(self.key_value(normed))[:, :, 0].reshape(q.shape)
        kv = wide(self.key_value(y)).reshape(*y.shape[:2], 2, *heads)
        slots = wide(memory).reshape(q.shape)
        scale = self.temperature * self.head_dim**0.5
        itself = jnp.sum(q * own, axis=-1) / scale  # [B, m, H]
        tokens = jnp.einsum("bmhe,bshe->bmhs", q, kv[:, :, 0]) / scale
        tokens = jnp.where(real[:, None, None], tokens, -jnp.inf)
        weights = jnp.concatenate([itself[..., None], tokens], axis=-1)
        weights = jax.nn.softmax(weights, axis=-1)
        written = weights[..., :1] * slots
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
