"""Linformer as attention through a bounded memory: m slots that the past is written to.

    slots_t = sum_{s <= t, same document} k_s (x) E[s]       [E, m], a running sum
    p_t     = softmax(q_t . slots_t / sqrt(E))               over the m slots
    o_t     = p_t . sum_{s <= t} F[s] (x) v_s

Two calls of `ops.prefix`: the causal prefix form (ABC, Peng et al. 2022), with E and F learned
by position. The published form (Wang et al. 2020) compresses the whole sequence at once, so its
slots hold the future; its last token equals this. With `causal=False` (whole documents, no
state) the sums run over past and future, which is the published form.

It has its own code for positions and takes no rotary ones. Start at `Linformer`.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.config import field
from memoryformer.model.mixers import base, limited
from memoryformer.notation import Activations
from memoryformer.ops import prefix

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class LinformerState(NamedTuple):
    """Compressed keys [B, H, E, m] and values [B, H, m, E]."""

    keys: prefix.PrefixState
    values: prefix.PrefixState


class Linformer(limited.LimitedPositions, base.MultiHead):
    """Causal Linformer (prefix form), E and F shared by a layer's heads."""

    @dataclasses.dataclass(frozen=True)
    class Options(base.PrefixOptions):
        """And the size of E and F."""

        num_slots: int = field("numbers", 64, doc="m, slots of the memory.")
        max_len: int = field(
            "numbers", 0, doc="Positions that E and F have rows for; 0: model.seq_len."
        )

        def __post_init__(self):
            super().__post_init__()
            base.at_least(self, 1, "num_slots")
            base.at_least(self, 0, "max_len")

    EXAMPLES: ClassVar = {  # the paper states no m; 'matched' to its Table 2 at 410M: 26.1G
        "linformer": {"num_slots": 64},
        "linformer_matched": {"num_slots": 40},
    }
    ABOUT = base.About(
        "m slots written by position: the **causal prefix form**",
        "4 m D",
        "2 m E",
        "its own, up to `max_len`",
    )
    LOOKS_AHEAD = True
    HAS_TOKEN_ROWS = True

    @classmethod
    def cost(cls, config: "ModelConfig", length: int) -> base.Cost:
        """4 m D per token: keys and values, each written and read."""
        num_slots, width = config.mixer_options.num_slots, config.embed_dim
        return base.Cost(
            multiply_adds=length * 4 * num_slots * width,
            state_values=2 * num_slots * width,
            parameters=2 * num_slots * cls.max_length(config),
            state_value_bytes=4,
        )

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project, rngs=rngs)
        self.chunk_size = config.mixer_options.prefix_chunk
        self.max_len = self.max_length(config)
        self.num_slots = config.mixer_options.num_slots
        self.causal = config.causal
        shape = (self.max_len, self.num_slots)
        std = sum(shape) ** -0.5  # as a Glorot initialiser with gain 1 / sqrt(2)

        def table() -> nnx.Param:
            value = std * jax.random.normal(rngs.params(), shape)
            return nnx.Param(value, spec="whole", decay=True)

        self.write_keys = table()
        self.write_values = table()

    def __call__(
        self, x: Activations, seq: base.SeqInfo, state: LinformerState | None = None
    ) -> tuple[Activations, LinformerState | None]:
        """[B, L, D] -> [B, L, D] and the state after it."""
        q, k, v = (base.wide(a) for a in self.split(x, seq))  # [B, L, H, E]
        rest = {"chunk_size": self.chunk_size}
        write = self._rows(self.write_keys, seq.positions, k)  # [B, L, H, m]
        q = q * self.head_dim**-0.5
        if not self.causal:
            base.refuse_state(state)
            logits = prefix.total(q, k, write, seq.segment_ids, **rest)
            p = jax.nn.softmax(logits, axis=-1)
            write = self._rows(self.write_values, seq.positions, k)
            y = prefix.total(p, write, v, seq.segment_ids, **rest)
            return self.join(y, x.dtype), None
        before = (None, None) if state is None else state
        logits, keys = prefix.prefix(q, k, write, seq.segment_ids, before[0], **rest)
        p = jax.nn.softmax(logits, axis=-1)
        write = self._rows(self.write_values, seq.positions, k)
        y, values = prefix.prefix(p, write, v, seq.segment_ids, before[1], **rest)
        state = None if state is None else LinformerState(keys, values)
        return self.join(y, x.dtype), state

    def _rows(self, table, positions, like):
        """Rows of a table [max_len, m] for every head; NaN beyond the last position."""
        rows = jnp.take(table[...], positions, axis=0, mode="fill")[:, :, None]
        shape = (*like.shape[:3], self.num_slots)
        return jnp.broadcast_to(rows.astype(like.dtype), shape)

    def init_state(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> LinformerState:
        """2 m E values a head, but not for more tokens than E and F have rows."""
        limited.check_length(self.max_len, max_len)
        heads, width, slots = self.local_heads, self.head_dim, self.num_slots
        return LinformerState(
            prefix.init_state(batch_size, heads, width, slots),
            prefix.init_state(batch_size, heads, slots, width),
        )
