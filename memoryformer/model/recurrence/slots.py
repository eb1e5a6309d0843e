"""Memory as slots beside the trunk: read before every block, written after the last.

    reads = reads(M);   y = trunk(x), reader(reads) before each block;   M' = write(M, reads, y)

Start at `Slots`; memformer.py and pmi.py say what is read and what is written.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memoryformer.model.recurrence import base
from memoryformer.notation import Activations, Array, Bool


class OpenChunk(NamedTuple):
    """The memory as blocks read it, and the outputs to be written."""

    reads: Any  # what `reads` returned, as stored
    outputs: Activations  # [B, S, D]
    real: Bool[Array, "B S"]


class Slots(base.Recurrence):
    """What kinds of slots share; a subclass brings `initial`, `reads`, `reader`, `write`."""

    def reads(self, memory: base.Memory) -> Any:
        """Return what a chunk needs of its memory, a tree of arrays [B, ..]."""
        raise NotImplementedError

    def reader(self, reads: Any) -> base.Read:
        """Return what is done before each block: (block, x) -> x."""
        raise NotImplementedError

    def write(
        self, memory: base.Memory, reads: Any, y: Activations, real: Bool[Array, "B S"]
    ) -> base.Memory:
        """Return the memory after a chunk's outputs y [B, S, D]."""
        raise NotImplementedError

    def whole(
        self,
        trunk: base.Trunk,
        memory: base.Memory,
        x: Activations,
        real: Bool[Array, "B S"],
    ) -> tuple[Activations, base.Memory]:
        """The chunk with its memory read: y [B, S, D] and the new memory."""
        reads = self.reads(memory)
        y, _ = trunk.run_blocks(x, self.sequence(real), None, self.reader(reads))
        return y, self.write(memory, reads, y, real)

    def init_chunk(self, state: base.RecurrentState) -> OpenChunk:
        """What is read, and room for a chunk's outputs."""
        batch_size, _, width = state.memory.shape
        dtype = state.memory.dtype
        outputs = jnp.zeros((batch_size, self.chunk_size, width), dtype)
        real = jnp.zeros((batch_size, self.chunk_size), bool)
        return OpenChunk(self._stored_reads(state.memory, dtype), outputs, real)

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
        seq, read = self.sequence(real, state.tokens), self.reader(chunk.reads)
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
        return self.write(memory, chunk.reads, chunk.outputs.astype(dtype), chunk.real)

    def _stored_reads(self, memory, dtype):
        reads = self.reads(memory.astype(dtype))
        return jax.tree.map(lambda read: read.astype(memory.dtype), reads)
