"""The Recurrent Memory Transformer (Bulatov et al. 2022): memory as tokens of the trunk."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.model import mixers
from memoryformer.model.recurrence import base
from memoryformer.notation import Activations, Array, Bool, Float

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class RMT(base.Recurrence):
    """Memory as tokens: read in front of a chunk, written behind it, after the final norm.

    What reads cannot see the chunk, what writes sees all of it, by causality alone. Memory
    tokens take positions: 0..m-1, the text m.., then the ones that write.
    """

    EXAMPLES: ClassVar = {"rmt": {"num_slots": 16}}

    @classmethod
    def capacity_of(cls, config: "ModelConfig") -> int:
        """S + 2 m: memory tokens stand before and behind a chunk."""
        return base.chunk_size(config) + 2 * config.recurrence_options.num_slots

    @classmethod
    def cost(
        cls, config: "ModelConfig", block: int, project: Callable[[int], Any]
    ) -> base.Cost:
        """2 m tokens more through every block and chunk, and mixing over S + 2 m for S."""
        size, num_slots = base.chunk_size(config), config.recurrence_options.num_slots
        longer = mixers.cost(config, size + 2 * num_slots).multiply_adds
        longer -= mixers.cost(config, size).multiply_adds
        longer += 2 * num_slots * block
        memory = num_slots * config.embed_dim
        return base.Cost(
            multiply_adds=config.seq_len // size * config.num_layers * longer,
            parameters=memory,
            state_values=memory,
        )

    def __init__(self, config, project: Callable, norm: Callable, *, rngs: nnx.Rngs):
        super().__init__(config, project, norm, rngs=rngs)
        self.before = self.num_slots
        shape = (self.num_slots, config.embed_dim)
        memory = config.embed_std * jax.random.normal(rngs.params(), shape)
        # Decayed as the embeddings are, which these tokens stand beside.
        self.memory = nnx.Param(memory, spec="last_axis", decay=True)  # [m, D]

    def initial(self) -> Float[Array, "m D"]:
        """[m, D], trained."""
        return self.memory[...]

    def whole(
        self,
        trunk: base.Trunk,
        memory: base.Memory,
        x: Activations,
        real: Bool[Array, "B S"],
    ) -> tuple[Activations, base.Memory]:
        """[M; x; M] through the trunk: y [B, S, D] and the new memory."""
        m, size = self.num_slots, x.shape[1]
        ones = jnp.ones((x.shape[0], m), bool)
        seq = self.sequence(jnp.concatenate([ones, real, ones], axis=1))
        y, _ = trunk.run_blocks(jnp.concatenate([memory, x, memory], axis=1), seq)
        return y[:, m : m + size], y[:, m + size :]

    def open(
        self, trunk: base.Trunk, state: base.RecurrentState, dtype: jnp.dtype
    ) -> base.RecurrentState:
        """Read the memory."""
        ones = jnp.ones(state.memory.shape[:2], bool)
        seq = self.sequence(ones)
        _, blocks = trunk.run_blocks(state.memory.astype(dtype), seq, state.blocks)
        return state._replace(blocks=blocks)

    def extend(
        self,
        trunk: base.Trunk,
        state: base.RecurrentState,
        x: Activations,
        real: Bool[Array, "B P"],
    ) -> tuple[Activations, base.RecurrentState]:
        """Some tokens of a chunk, after those in the state."""
        seq = self.sequence(real, self.num_slots + state.tokens)
        y, blocks = trunk.run_blocks(x, seq, state.blocks)
        return y, state._replace(blocks=blocks)

    def close(
        self, trunk: base.Trunk, state: base.RecurrentState, dtype: jnp.dtype
    ) -> base.Memory:
        """What the memory tokens behind the chunk become."""
        ones = jnp.ones(state.memory.shape[:2], bool)
        seq = self.sequence(ones, self.num_slots + state.tokens)
        y, _ = trunk.run_blocks(state.memory.astype(dtype), seq, state.blocks)
        return y
