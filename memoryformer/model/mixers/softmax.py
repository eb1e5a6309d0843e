"""Multi-head softmax attention with rotary positions and a key-value cache."""

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model.mixers import base, dape
from memoryformer.notation import Activations, Array
from memoryformer.ops import attention, collectives, ring, window

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of the tokens seen; H is a device's share of the heads.

    By head, so that a product reads them as they lie; M is whole blocks of `over_cache`.
    """

    keys: Array  # [B, H, M, E]
    values: Array  # [B, H, M, E]
    segment_ids: Array  # [B, M] int32; 0 where nothing is stored yet
    length: Array  # [] int32, tokens stored


class Softmax(base.MultiHead):
    """o = MHA(Q(x), K(x), V(x)): every query looks at its own document's past."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """How the logits are formed, and by what."""

        attention: str = field(
            "rounding", "xla", doc="xla | cudnn (GPU) | splash (TPU) | auto."
        )
        logit_transform: str = field("numbers", "none", doc="none | dape_v2.")
        dape_width: int = field("numbers", 32, doc="Hidden width of dape_v2.")

        def __post_init__(self):
            attentions, transforms = attention.IMPLEMENTATIONS, ("none", "dape_v2")
            name = f"{base.OPTIONS}.attention"
            config_lib.choose(self.attention, attentions, name)
            name = f"{base.OPTIONS}.logit_transform"
            config_lib.choose(self.logit_transform, transforms, name)
            base.at_least(self, 1, "dape_width")
            if self.logit_transform != "none" and self.attention != "xla":
                raise ConfigError(
                    f"{base.OPTIONS}.attention={self.attention!r} never forms the logits "
                    f"that logit_transform={self.logit_transform!r} changes: use "
                    "attention='xla'."
                )

        @property
        def is_plain(self) -> bool:
            """Whether plain products form all logits of a query, unchanged."""
            return self.logit_transform == "none" and self.attention == "xla"

    EXAMPLES: ClassVar = {"softmax": {}, "dape_v2": {"logit_transform": "dape_v2"}}
    ABOUT = base.About("softmax over its document's past", "2 L D", "2 L E", "rotary")
    LOOKS_AHEAD = True
    HAS_TOKEN_ROWS = True
    TAKES_ANY_ORDER = True  # ring attention reads positions

    @classmethod
    def cost(cls, config: "ModelConfig", length: int) -> base.Cost:
        """2 L D per token over the whole square, masked or not; keys and values are kept."""
        options = config.mixer_options
        blocks = length + -length % attention.CACHE_BLOCK  # the cache has whole ones
        per_pair = parameters = 0
        if options.logit_transform == "dape_v2":
            per_pair, parameters = dape.cost(config.num_heads, options.dape_width)
        return base.Cost(
            multiply_adds=length * length * (2 * config.embed_dim + per_pair),
            state_values=2 * blocks * config.embed_dim,
            parameters=parameters,
        )

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project, rngs=rngs)
        self.rotary = base.Rotary(config)
        self.implementation = config.mixer_options.attention
        self.sequence_chunk = config.sequence_chunk
        self.causal = config.causal
        uses_dape = config.mixer_options.logit_transform == "dape_v2"
        self.transform = dape.DapeV2(config, rngs=rngs) if uses_dape else None

    @classmethod
    def check(cls, config: "ModelConfig") -> None:
        """Refuse what looks at the past alone in a model that looks ahead."""
        if not config.causal and not config.mixer_options.is_plain:
            raise ConfigError(
                "model.causal=False: only with attention='xla' and logit_transform='none' "
                f"in {base.OPTIONS}."
            )

    @classmethod
    def check_sequence(cls, config: "ModelConfig") -> None:
        """Refuse what needs a query's logits side by side, or a kernel of one device."""
        options = config.mixer_options
        if not options.is_plain:
            raise ConfigError(
                f"mesh: {base.OPTIONS}.attention={options.attention!r} with "
                f"logit_transform={options.logit_transform!r} cannot run over a 'sequence' "
                "axis: ring attention needs attention='xla' and logit_transform='none'."
            )

    def __call__(
        self, x: Activations, seq: base.SeqInfo, state: base.State | None = None
    ) -> tuple[Activations, base.State | None]:
        """[B, L, D] -> [B, L, D]; with a cache, the new tokens follow the stored ones."""
        q, k, v = self.split(x, seq)
        y, state = self.read(q, k, v, seq, state)
        if collectives.axis_size(collectives.SEQUENCE_AXIS) > 1:
            return self.join_kept(y, x.dtype), state
        return self.join(y, x.dtype), state

    def read(
        self, q: Array, k: Array, v: Array, seq: base.SeqInfo, state: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        """Return what every head reads, [B, L, H, E], and the cache after it."""
        batch_size, seq_len = q.shape[:2]
        q, k = self.rotary(q, k, seq)
        if not self.causal:
            base.refuse_state(state)
        if collectives.axis_size(collectives.SEQUENCE_AXIS) > 1:
            return self._around(q, k, v, seq, state), None
        if state is None and self.implementation != "xla":
            y = attention.fused(q, k, v, seq.segment_ids, self.implementation)
            return y, None
        if state is not None and self.transform is None:
            return self._continue(q, k, v, seq, state)
        start: Array | int = 0
        if state is None:
            keys, values, key_segments = k, v, seq.segment_ids
        else:
            start = state.length
            state = _append(state, k, v, seq.segment_ids)
            keys, values = (
                jnp.swapaxes(a, 1, 2).astype(q.dtype)
                for a in (state.keys, state.values)
            )
            key_segments = state.segment_ids
        query_index = _indices(seq_len, batch_size) + start
        key_index = _indices(keys.shape[1], batch_size)
        place = query_index  # where a query's own key stands
        if self.transform is not None:
            # Its windows run over neighbouring keys: padding must not stand between them.
            real = key_segments != 0
            order = jnp.argsort(~real, axis=1, stable=True)
            past = key_index[:, None] <= query_index[:, :, None]
            place = jnp.sum(past & real[:, None], axis=-1) - 1
            keys, values, key_segments, key_index = (
                window.take_rows(x, order)
                for x in (keys, values, key_segments, key_index)
            )
        key_place = _indices(keys.shape[1], batch_size)

        def attend(q, index, segments, place):
            mask = attention.causal_mask(
                index, segments, key_index, key_segments, causal=self.causal
            )
            transform = None
            if self.transform is not None:
                transform = functools.partial(
                    self.transform, query_index=place, key_index=key_place
                )
            return attention.softmax(q, keys, values, mask, transform)

        queries = (q, query_index, seq.segment_ids, place)
        return base.by_chunks(attend, queries, self.sequence_chunk), state

    def _continue(self, q, k, v, seq, state):
        """Append [B, L, H, E] to the cache, and read what it then holds."""
        query_index = _indices(q.shape[1], q.shape[0]) + state.length
        state = _append(state, k, v, seq.segment_ids)

        def attend(q, index, segments):
            return attention.over_cache(q, state.keys, state.values, index, segments,
                                        state.segment_ids, state.length)  # fmt: skip

        queries = (q, query_index, seq.segment_ids)
        return base.by_chunks(attend, queries, self.sequence_chunk), state

    def _around(self, q, k, v, seq, state):
        """Read the parts of the row that lie on other devices."""
        if state is not None:
            raise ConfigError("mesh: a `sequence` axis trains; decode without one.")
        return ring.attend(
            q,
            k,
            v,
            seq.segment_ids,
            seq.positions,
            causal=self.causal,
            tile=self.sequence_chunk or ring.TILE,
        )

    def init_state(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> base.State:
        """Return an empty cache for `max_len` tokens."""
        max_len += -max_len % attention.CACHE_BLOCK
        shape = (batch_size, self.local_heads, max_len, self.head_dim)
        return KVCache(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros((batch_size, max_len), jnp.int32),
            jnp.zeros((), jnp.int32),
        )


def _append(cache: KVCache, k: Array, v: Array, segment_ids: Array) -> KVCache:
    by_head = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if k.shape[1] > attention.FEW:
        # XLA CPU would compute rotary positions while it writes, which one thread does alone.
        by_head = jax.lax.optimization_barrier(by_head)

    def write(stored, new, axis):
        new = new.astype(stored.dtype)
        return jax.lax.dynamic_update_slice_in_dim(stored, new, cache.length, axis)

    return KVCache(
        write(cache.keys, by_head[0], 2),
        write(cache.values, by_head[1], 2),
        write(cache.segment_ids, segment_ids, 1),
        cache.length + k.shape[1],
    )


def _indices(length: int, batch_size: int) -> Array:
    return jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.int32)[None], (batch_size, length)
    )
